"""What a person or a Ray job starts."""
