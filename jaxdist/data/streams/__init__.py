"""Data without random access: shards that are read forward, in an order that any number of processes shares."""
