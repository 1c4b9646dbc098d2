"""One experiment on several numbers of devices: how efficient each is, and where the network bounds it."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from jaxdist.errors import UserError
from jaxdist.plan.estimate import Estimate


@dataclasses.dataclass(frozen=True)
class SweepRow:
    """One number of devices of a sweep.

    Attributes:
      made: its plan.
      extrapolated: why it was not compiled but extrapolated; empty where it was compiled.
      efficiency: examples a second and device, relative to the first row.
      relief: times as many examples a device, in a larger batch or in more microbatches of one step, with which the
        network would bound the step no more: it sends the same for them. 1 where it does not bound the step.
    """

    made: Estimate
    efficiency: float
    relief: int
    extrapolated: str = ""


def rows(made: Sequence[Estimate], extrapolated: Mapping[int, str] = MappingProxyType({})) -> list[SweepRow]:
    """Return a row for each plan, in their order; the first is what efficiency is relative to.

    `extrapolated` says of plans that were not compiled, by their number of devices, why.
    """
    base = _rate(made[0])
    return [SweepRow(each, _rate(each) / base, relief(each), extrapolated.get(each.num_devices, "")) for each in made]


def extrapolate(made: Estimate, count: int) -> Estimate:
    """Return the plan on more devices than could be compiled for, from that on fewer, with as many examples a device.

    What a device computes and holds is taken as it was: an upper bound where the state is sharded over more devices.
    What it sends in a ring grows by the ring's factor (n-1)/n. Slower links beyond the largest compiled topology are
    not known.

    Raises:
      UserError: the number of devices is no multiple of those that were compiled for.
    """
    if count % made.num_devices:
        raise UserError(
            f"A sweep continues in multiples of the {made.num_devices} devices that were compiled for; got {count}."
        )
    times = count // made.num_devices
    ring = ((count - 1) / count) / ((made.num_devices - 1) / made.num_devices) if made.num_devices > 1 else 1.0
    axis = next(iter(made.mesh))
    return dataclasses.replace(
        made,
        topology=f"{made.topology} x {times}",
        mesh={**made.mesh, axis: made.mesh[axis] * times},
        num_devices=count,
        global_batch_size=made.global_batch_size * times,
        batch_bytes=made.batch_bytes * times,
        flops_per_step=made.flops_per_step * times,
        bound_seconds={**made.bound_seconds, "network": made.bound_seconds["network"] * ring},
        collectives={kind: (number, sent * ring) for kind, (number, sent) in made.collectives.items()},
        collective_axes={name: sent * ring for name, sent in made.collective_axes.items()},
        collective_lines={line: sent * ring for line, sent in made.collective_lines.items()},
        compiler_seconds=None,
    )


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
