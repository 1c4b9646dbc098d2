"""What is read from a compiled program: its buffers, collectives, FLOPs, and the lines of code they come from."""
