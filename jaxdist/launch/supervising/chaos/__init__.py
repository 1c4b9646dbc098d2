"""Chaos: an experiment trained twice, undisturbed and with faults, must make the same model."""
