"""From a config to the plan of a run: derived values, refusals and advice."""
