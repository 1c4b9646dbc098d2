"""What of the user's own runs inside a run: the hooks of the experiment."""
