"""The scheduler's state machine: one module for each stage."""
