"""The commands of the command line, one file each: what a command does with its options."""
