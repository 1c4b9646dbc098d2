"""A parameter-server run: the experiment on its servers and workers, watched by an observer."""
