"""State that outlives a step: checkpoints on disk, snapshots in memory, and the manifest that verifies both."""
