"""The user's own code inside a run: the hooks of the experiment."""
