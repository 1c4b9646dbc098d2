"""The report: one self-contained page about one run or several, also while they train."""
