"""One run: the loop, its hooks, an attempt in a process, recovery."""
