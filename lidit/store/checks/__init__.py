"""Is a corpus what was written? Its files, its families, its rows anew."""
