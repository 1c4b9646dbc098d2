"""One experiment on several numbers of devices: how efficient each is, and where the network bounds it."""

import dataclasses
import math
from collections.abc import Sequence

from jaxdist.plan.estimate import Estimate


@dataclasses.dataclass(frozen=True)
class SweepRow:
    """One number of devices of a sweep.

    Attributes:
      made: its plan.
      efficiency: examples a second and device, relative to the first row.
      relief: times as many examples a device, in a larger batch or in more microbatches of one step, with which the
        network would bound the step no more: it sends the same for them. 1 where it does not bound the step.
    """

    made: Estimate
    efficiency: float
    relief: int


def rows(made: Sequence[Estimate]) -> list[SweepRow]:
    """Return a row for each plan, in their order; the first is what efficiency is relative to."""
    base = _rate(made[0])
    return [SweepRow(each, _rate(each) / base, relief(each)) for each in made]


def relief(made: Estimate) -> int:
    """Return `SweepRow.relief` of a plan; gradients are sent once a step, however many examples made them."""
    bounds = made.bound_seconds
    alone = max(bounds["compute"], bounds["memory"])
    return max(math.ceil(bounds["network"] / alone), 1) if alone else 1


def takes_over(found: Sequence[SweepRow]) -> int | None:
    """Return the least number of devices from which on the network bounds every row; None where it does not."""
    bound = None
    for row in reversed(found):
        if row.made.bound_by != "network":
            break
        bound = row.made.num_devices
    return bound


def _rate(made: Estimate) -> float:
    return made.global_batch_size / made.step_seconds / made.num_devices
