"""The environment of a process: its launcher, signals, output and temporary files."""
