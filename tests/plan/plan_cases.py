"""The tiny experiment, planned for eight devices of a made-up chip."""

import dataclasses
import functools

import jax
import tiny_experiment

from jaxdist.plan import chips, estimate, topology

CHIP = chips.Chip("small", 1 << 30, 1e12, 1e11, 1e10, 1, "made up for a test")


def eight_devices():
    return topology.Topology("cpu:8", jax.devices()[:8], CHIP, runs_here=True)


@functools.cache
def plan(**changes):
    experiment = dataclasses.replace(tiny_experiment.get_config(), name="tiny", **changes)
    return experiment, estimate.estimate(experiment, eight_devices())
