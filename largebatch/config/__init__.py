"""The config of a run: its schema, the file it is read from, its help."""
