"""What one training step needs, read from the program that the real compiler made.

Bytes and collectives are the compiled program's own. Times are bounds: arithmetic, memory traffic and network traffic,
each at its peak rate (roofline model; Williams, Waterman and Patterson, 2009); the largest bounds the step.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from jaxdist import errors
from jaxdist.config.experiment import Experiment
from jaxdist.errors import UserError
from jaxdist.plan import collectives, flops
from jaxdist.plan.topology import Topology
from jaxdist.run import components

PyTree = Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeviceBytes:
    """Bytes of one device's memory while a step runs.

    Attributes:
      params: the device's part of the params.
      opt_state: of the optimizer's state.
      model_state: of the model's statistics.
      batch: of the batch.
      gradients: of one gradient, float32, sharded as the params are.
      activations: everything else the program holds at its peak: activations, gathered params, working memory.
      program: the program's code.
    """

    params: int
    opt_state: int
    model_state: int
    batch: int
    gradients: int
    activations: int
    program: int

    @property
    def total(self) -> int:
        """The sum of all of them."""
        return sum(dataclasses.astuple(self))

    @property
    def moved(self) -> int:
        """Bytes that must go to or from memory at least: all of it is read or written once a step."""
        return self.total - self.program + self.params + self.opt_state


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
    """What training an experiment on a topology needs; `to_json` names the same things.

    Attributes:
      experiment: its name.
      topology: as the user wrote it.
      strategy: that was compiled.
      mesh: axis name -> size.
      num_devices: of the mesh.
      num_microbatches: parts of a device's batch.
      global_batch_size: examples of a step.
      num_params: elements, over all devices.
      steps: the step at which the run ends at the latest; None where no limit is known.
      bytes: of one device.
      device_memory: bytes a device has; None where it is the machine's own.
      flops_per_step: over all devices, counted in the traced step (see `flops`).
      bound_seconds: `compute`, `memory` and `network`, each a lower bound of the step's time.
      compiler_seconds: the compiler's own estimate, where it gives one.
      collectives: kind -> (how many, bytes each device sends in them).
      collective_lines: `FILE:LINE` -> bytes each device sends because of it.
      peak_flops_per_second: of one device.
      measured_rates: whether the rates behind the bounds were measured on this machine, and not a data sheet's.
    """

    experiment: str
    topology: str
    strategy: str
    mesh: Mapping[str, int]
    num_devices: int
    num_microbatches: int
    global_batch_size: int
    num_params: int
    steps: int | None
    bytes: DeviceBytes
    device_memory: int | None
    flops_per_step: float
    bound_seconds: Mapping[str, float]
    compiler_seconds: float | None
    collectives: Mapping[str, tuple[int, float]]
    collective_lines: Mapping[str, float]
    peak_flops_per_second: float
    measured_rates: bool

    @property
    def fits(self) -> bool | None:
        """Whether a device's memory holds it; None where the device shares this machine's memory."""
        return None if self.device_memory is None else self.bytes.total <= self.device_memory

    @property
    def bound_by(self) -> str:
        """The name of the largest bound."""
        return max(self.bound_seconds, key=lambda name: self.bound_seconds[name])

    @property
    def step_seconds(self) -> float:
        """The largest bound: no step can be faster."""
        return self.bound_seconds[self.bound_by]

    @property
    def model_flops_utilization(self) -> float:
        """FLOPs of a step / (step_seconds x num_devices x peak FLOP/s): 1 where arithmetic bounds the step."""
        return self.flops_per_step / (self.step_seconds * self.num_devices * self.peak_flops_per_second)

    def to_json(self, *, price_per_hour: float | None = None) -> dict[str, Any]:
        """Return everything as plain JSON data; the price is that of an hour of the whole topology."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "bytes"}
        return fields | {
            "bytes_per_device": self.bytes.total,
            "bytes_by_kind": dataclasses.asdict(self.bytes),
            "fits": self.fits,
            "step_seconds": self.step_seconds,
            "bound_by": self.bound_by,
            "model_flops_utilization": self.model_flops_utilization,
            "examples_per_second": self.global_batch_size / self.step_seconds,
            "collectives": {
                kind: {"count": count, "sent_bytes": sent} for kind, (count, sent) in self.collectives.items()
            },
            **self.cost(price_per_hour),
        }

    def cost(self, price_per_hour: float | None) -> dict[str, float]:
        """Return the `hours` that all steps take at least and, with a price, their `price`; empty without an end."""
        if self.steps is None:
            return {}
        hours = self.steps * self.step_seconds / 3600
        return {"hours": hours} | ({} if price_per_hour is None else {"price": hours * price_per_hour})


def with_dividing_batch(experiment: Experiment, topology: Topology) -> Experiment:
    """Return `experiment` with a global batch that divides over the topology: its own, else the next larger one.

    The batch of an experiment for a laptop is often smaller than the number of devices of a pod.
    """
    parts = len(topology.devices) * experiment.num_microbatches
    batch = -(-experiment.global_batch_size // parts) * parts
    return dataclasses.replace(experiment, global_batch_size=batch)


def estimate(experiment: Experiment, topology: Topology) -> Estimate:
    """Compile one training step of `experiment` for `topology` and return what it needs.

    Raises:
      UserError: the experiment does not fit the topology, or its step is no single program.
    """
    if experiment.reduction == "canonical":
        raise UserError(
            "A canonical step is several programs, one of them per logical shard; plan compiles one. "
            "Plan with --reduction mean: canonical needs two gradient vectors more on each device."
        )
    with errors.as_user_error():
        parts = components.put_together(experiment, devices=topology.devices)
        compiled, step_flops = compile_step(parts)
    return read(compiled, step_flops, parts, topology)


def compile_step(parts: components.Parts) -> tuple[jax.stages.Compiled, float]:
    """Return the training step, compiled for the devices that `parts` were put together for, and its FLOPs."""
    rows = NamedSharding(parts.strategy.mesh, PartitionSpec(parts.strategy.batch_axes))
    batch = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=rows) for name, leaf in parts.fields.items()}
    step: Any = parts.step
    traced = step.trace(parts.abstract_state, batch)
    return traced.lower().compile(), flops.count(traced.jaxpr)


def read(compiled: jax.stages.Compiled, step_flops: float, parts: components.Parts, topology: Topology) -> Estimate:
    """Return the Estimate of a compiled step."""
    experiment, mesh, chip = parts.experiment, parts.strategy.mesh, topology.chip
    found = collectives.collectives(compiled.as_text() or "")
    held = device_bytes(compiled, parts)
    costs = compiled.cost_analysis() or {}
    bounds = {
        "compute": step_flops / mesh.size / chip.flops_per_second,
        "memory": held.moved / chip.memory_bytes_per_second,
        "network": collectives.sent_bytes(found) / chip.link_bytes_per_second,
    }
    return Estimate(
        experiment=experiment.name,
        topology=topology.name,
        strategy=experiment.strategy,
        mesh=dict(mesh.shape),
        num_devices=mesh.size,
        num_microbatches=experiment.num_microbatches,
        global_batch_size=experiment.global_batch_size,
        num_params=sum(leaf.size for leaf in jax.tree.leaves(parts.abstract_state.params)),
        steps=experiment.stop.last_step(parts.loader.steps_per_epoch),
        bytes=held,
        device_memory=chip.memory_bytes,
        flops_per_step=step_flops,
        bound_seconds=bounds,
        compiler_seconds=costs.get("optimal_seconds"),
        collectives=collectives.summarize(found),
        collective_lines=by_line(found),
        peak_flops_per_second=chip.flops_per_second,
        measured_rates=topology.runs_here,
    )


def device_bytes(compiled: jax.stages.Compiled, parts: components.Parts) -> DeviceBytes:
    """Return what one device holds while the compiled step runs."""
    memory: Any = compiled.memory_analysis()
    state = parts.abstract_state
    held = {name: _shard_bytes(getattr(state, name)) for name in ("params", "opt_state", "model_state")}
    beside = memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    gradients = min(sum(4 * math.prod(_shard_shape(leaf)) for leaf in jax.tree.leaves(state.params)), beside)
    return DeviceBytes(
        **held,
        batch=max(memory.argument_size_in_bytes - sum(held.values()), 0),
        gradients=gradients,
        activations=beside - gradients,
        program=memory.generated_code_size_in_bytes,
    )


def by_line(found: Sequence[collectives.Collective]) -> dict[str, float]:
    """Return for each line of code the bytes that a device sends because of it, most first."""
    lines: dict[str, float] = {}
    for each in found:
        lines[each.caused_by] = lines.get(each.caused_by, 0.0) + each.sent_bytes
    return dict(sorted(lines.items(), key=lambda item: -item[1]))


def _shard_shape(leaf: jax.ShapeDtypeStruct) -> tuple[int, ...]:
    assert leaf.sharding is not None
    return leaf.sharding.shard_shape(leaf.shape)


def _shard_bytes(tree: PyTree) -> int:
    return sum(math.prod(_shard_shape(leaf)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
