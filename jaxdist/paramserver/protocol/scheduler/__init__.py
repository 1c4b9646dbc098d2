"""The scheduler's state machine, a file for each of its stages."""
