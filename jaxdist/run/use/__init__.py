"""What is done with a run or an experiment: load, predict, evaluate, export; list and compare; verify."""
