"""The time of a step from rates that short programs were measured to reach on the devices of this machine."""
