"""Sources, one file a kind: data sets with random access by id."""
