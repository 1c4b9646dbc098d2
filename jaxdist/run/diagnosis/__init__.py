"""What is wrong with an experiment, or slow: a trace of its steps, and short trials."""
