"""The report: one self-contained page about one or several runs, also while they train."""
