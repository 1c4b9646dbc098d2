"""Experiments as data: what an experiment file returns, how it is loaded and overridden."""
