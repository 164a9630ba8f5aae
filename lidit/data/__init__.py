"""Reading a corpus for training: order, draws, collation, feed."""
