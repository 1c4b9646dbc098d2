"""The protocol as state machines: messages in, messages and effects out; no I/O, no clock, no JAX."""
