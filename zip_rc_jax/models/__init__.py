"""The transformer of all families, its cache, and its files."""
