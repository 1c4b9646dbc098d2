"""How a process finds and joins its job, and what all processes of a job agree on."""
