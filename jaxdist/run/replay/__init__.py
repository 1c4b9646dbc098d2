"""Steps that were made, looked at again: recorded by hashes, compared between runs, computed a second time."""
