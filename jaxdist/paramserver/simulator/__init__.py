"""Simulates whole runs of the parameter server in one thread: `Simulation`, with the drivers of production."""

from jaxdist.paramserver.simulator.fault_rates import CALM, FAST, Faults, Hardware
from jaxdist.paramserver.simulator.simulation import Roles, Simulation, Stuck

__all__ = ["CALM", "FAST", "Faults", "Hardware", "Roles", "Simulation", "Stuck"]
