"""Run directories in object storage: a working copy on this machine trains, and a mirror uploads what it writes."""
