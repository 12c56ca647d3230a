"""A character-level transformer, trained in NumPy."""
