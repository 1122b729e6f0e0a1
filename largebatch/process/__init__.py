"""What surrounds a process: its launcher, its signals, its output, its temporary files."""
