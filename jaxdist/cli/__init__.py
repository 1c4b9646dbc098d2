"""The command line: the parser, one file a command, and the entry points of `python -m`."""
