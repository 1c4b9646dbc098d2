"""The parameter server: workers pull and push, servers apply, a scheduler decides; the protocol's core does no I/O."""
