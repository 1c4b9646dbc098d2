"""Sweeps: many runs of one experiment with other settings, and which of them is best."""
