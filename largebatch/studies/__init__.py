"""Several runs compared, and a config timed."""
