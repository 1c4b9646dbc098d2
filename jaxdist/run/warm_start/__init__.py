"""Runs that begin with weights of another run or of a file: reading them by name, matching them, placing them."""
