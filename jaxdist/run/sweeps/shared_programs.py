"""Programs that several runs of a process share: a learning rate and a seed enter the compiled step as arguments.

Runs that differ in these alone use one step, traced and compiled once. Its bits are those of a run by itself, because
the program is the same one.
"""

import dataclasses
import numbers
from collections.abc import Sequence
from typing import Any

import jax

from jaxdist.config.experiment import Experiment
from jaxdist.optimizers import Optimizer
from jaxdist.run import components

RATE = "optimizer.learning_rate"
SHARING = (RATE, "seed")
"""The settings that runs with the same programs may differ in."""
MOST_KEPT = 8


class SharedPrograms:
    """Puts experiments together, with the programs of an earlier one where these are the same."""

    def __init__(self) -> None:
        self._made: list[components.Parts] = []

    def put_together(
        self,
        experiment: Experiment,
        *,
        devices: Sequence[jax.Device],
        identity: components.Identity | None = None,
    ) -> components.Parts:
        """Return the parts of `experiment`; for the arguments and errors see `components.put_together`."""
        for made in reversed(self._made):
            same_devices = list(made.strategy.mesh.devices.flat) == list(devices)
            if same_devices and shares_programs(made.experiment, experiment):
                found = made.with_other_inputs(experiment, identity)
                if found is not None:
                    return found
        parts = components.put_together(experiment, devices=devices, identity=identity)
        self._made = [*self._made[1 - MOST_KEPT :], parts]
        return parts


def shares_programs(one: Experiment, other: Experiment) -> bool:
    """Return whether two experiments differ in SHARING at most, and each learning rate is a number."""
    return all(
        _equal(ours, theirs)
        for (name, ours), theirs in zip(_fields(one).items(), _fields(other).values(), strict=True)
        if name != "seed"
    )


def _fields(experiment: Experiment) -> dict[str, Any]:
    found = {field.name: getattr(experiment, field.name) for field in dataclasses.fields(experiment)}
    optimizer = experiment.optimizer
    if isinstance(optimizer, Optimizer) and isinstance(optimizer.learning_rate, numbers.Real):
        found["optimizer"] = dataclasses.replace(optimizer, learning_rate=1.0)
    return found


def _equal(one: Any, other: Any) -> bool:
    """Return whether two settings are one object, or equal; what cannot be compared is not equal."""
    if one is other:
        return True
    try:
        return type(one) is type(other) and bool(one == other)
    except (TypeError, ValueError):  # arrays
        return False
