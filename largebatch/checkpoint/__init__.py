"""Checkpoints: the folder they lie in and how they are written."""
