"""What is stored in a run directory: record, metrics, example ledger, lock."""
