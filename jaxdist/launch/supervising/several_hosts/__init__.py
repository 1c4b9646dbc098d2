"""The supervisors of several hosts: they keep copies of each other's snapshots and agree on who takes part."""
