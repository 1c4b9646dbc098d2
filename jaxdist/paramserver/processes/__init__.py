"""The protocol's state machines as real processes: drivers, the crew that restarts them, machines."""
