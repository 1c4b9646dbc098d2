"""Experiment trackers as writers, one a file; each package is an extra."""
