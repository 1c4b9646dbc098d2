"""Checks for what goes wrong silently: replicas that drift apart, a second compilation, values that are not finite."""
