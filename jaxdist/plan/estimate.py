"""What one training step needs, read from the program that the real compiler made.

Bytes and collectives are the compiled program's own. Times are bounds: arithmetic, memory traffic and network traffic,
each at its peak rate (roofline model; Williams, Waterman and Patterson, 2009); the largest bounds the step.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from jaxdist import errors
from jaxdist.config.experiment import Experiment
from jaxdist.errors import UserError
from jaxdist.plan.compiled import collectives, facts, live_buffers
from jaxdist.plan.topology import Topology
from jaxdist.run import components
from jaxdist.run.diagnosis import flops, utilization

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
      padding: what the arguments take more than their elements, as tiles of a TPU do.
      program: the program's code.
    """

    params: int
    opt_state: int
    model_state: int
    batch: int
    gradients: int
    activations: int
    padding: int
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
      batch_bytes: of a step's examples, over all devices.
      num_params: elements, over all devices.
      steps: the step at which the run ends at the latest; None where no limit is known.
      bytes: of one device.
      device_memory: bytes a device has; None where it is the machine's own.
      flops_per_step: over all devices, counted in the traced step (see `flops`).
      bound_seconds: `compute`, `memory` and `network`, each a lower bound of the step's time.
      compiler_seconds: the compiler's own estimate, where it gives one.
      collectives: kind -> (how many, bytes each device sends in them).
      collective_axes: axis of the mesh, or several joined by `+` -> bytes each device sends across it.
      collective_lines: `FILE:LINE` -> bytes each device sends because of it.
      buffers: the largest arrays that are in memory at the peak.
      peak_flops_per_second: of one device.
      peak_bytes_per_second: of one device, to and from its memory.
      measured_rates: whether the rates behind the bounds were measured on this machine, and not a data sheet's.
      source: where the rates are from.
      note: what the compiler could not know.
      delivered_examples_per_second: what the data gave on this machine when that was measured, else None.
      tokens_per_example: length of a row of tokens; None where the examples are no tokens.
      predicted_seconds: the time of a step by measured rates of its operations; None without a calibration.
      calibration: when and how those rates were measured; empty without.
    """

    experiment: str
    topology: str
    strategy: str
    mesh: Mapping[str, int]
    num_devices: int
    num_microbatches: int
    global_batch_size: int
    batch_bytes: int
    num_params: int
    steps: int | None
    bytes: DeviceBytes
    device_memory: int | None
    flops_per_step: float
    bound_seconds: Mapping[str, float]
    compiler_seconds: float | None
    collectives: Mapping[str, tuple[int, float]]
    collective_axes: Mapping[str, float]
    collective_lines: Mapping[str, float]
    buffers: Sequence[live_buffers.Buffer]
    peak_flops_per_second: float
    peak_bytes_per_second: float
    measured_rates: bool
    source: str
    note: str
    delivered_examples_per_second: float | None = None
    tokens_per_example: int | None = None
    predicted_seconds: float | None = None
    calibration: str = ""

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
        """The predicted time with a calibration, else the largest bound: no step can be faster."""
        return self.predicted_seconds or self.bound_seconds[self.bound_by]

    @property
    def examples_per_second(self) -> float:
        """Examples of all devices."""
        return self.global_batch_size / self.step_seconds

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens of all devices, padding included; None where the examples are no tokens."""
        return self.tokens_per_example and self.tokens_per_example * self.examples_per_second

    @property
    def input_bytes_per_second(self) -> float:
        """Bytes of batches that the data must deliver for no step to wait."""
        return self.batch_bytes / self.step_seconds

    @property
    def model_flops_utilization(self) -> float:
        """FLOPs of a step / (step_seconds x num_devices x peak FLOP/s): 1 where arithmetic bounds the step."""
        return self.flops_per_step / (self.step_seconds * self.num_devices * self.peak_flops_per_second)

    def to_json(self, *, price_per_hour: float | None = None) -> dict[str, Any]:
        """Return everything as plain JSON data; the price is that of an hour of the whole topology."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "bytes"}
        return fields | {
            "buffers": [dataclasses.asdict(each) for each in self.buffers],
            "rates": "measured" if self.measured_rates else "model",
            "input_bytes_per_second": self.input_bytes_per_second,
            "bytes_per_device": self.bytes.total,
            "bytes_by_kind": dataclasses.asdict(self.bytes),
            "fits": self.fits,
            "step_seconds": self.step_seconds,
            "bound_by": self.bound_by,
            "model_flops_utilization": self.model_flops_utilization,
            "examples_per_second": self.examples_per_second,
            "tokens_per_second": self.tokens_per_second,
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
        traced = trace_step(parts)
        found = facts.of_lowered(traced.lower(), topology.devices, topology.name)
        return read(found, flops.count(traced.jaxpr), parts, topology)


def trace_step(parts: components.Parts) -> Any:
    """Return the training step, traced for the devices that `parts` were put together for."""
    step: Any = parts.step
    return step.trace(parts.abstract_state, utilization.batch_of(parts))


def read(program: facts.ProgramFacts, step_flops: float, parts: components.Parts, topology: Topology) -> Estimate:
    """Return the Estimate of a step from what was read off its compiled program."""
    experiment, mesh, chip = parts.experiment, parts.strategy.mesh, topology.chip
    found = program.collectives
    held = device_bytes(program, parts)
    bounds = {
        "compute": step_flops / mesh.size / chip.flops_per_second,
        "memory": held.moved / chip.memory_bytes_per_second,
        # Each collective at the rate of the slowest link it crosses.
        "network": sum(each.sent_bytes / chip.bytes_per_second(each.devices) for each in found),
    }
    return Estimate(
        experiment=experiment.name,
        topology=topology.name,
        strategy=experiment.strategy,
        mesh=dict(mesh.shape),
        num_devices=mesh.size,
        num_microbatches=experiment.num_microbatches,
        global_batch_size=experiment.global_batch_size,
        batch_bytes=batch_bytes(parts),
        num_params=sum(leaf.size for leaf in jax.tree.leaves(parts.abstract_state.params)),
        steps=experiment.stop.last_step(parts.loader.steps_per_epoch),
        bytes=held,
        device_memory=chip.memory_bytes,
        flops_per_step=step_flops,
        bound_seconds=bounds,
        compiler_seconds=program.optimal_seconds,
        collectives=collectives.summarize(found),
        collective_axes=sent_by(lambda each: "+".join(each.axes(mesh.shape)), found),
        collective_lines=sent_by(lambda each: each.caused_by, found),
        buffers=program.buffers,
        peak_flops_per_second=chip.flops_per_second,
        peak_bytes_per_second=chip.memory_bytes_per_second,
        measured_rates=topology.runs_here,
        source=chip.source,
        note=topology.note,
        tokens_per_example=utilization.tokens_per_example(parts.fields, experiment.inputs),
        **_predicted(program, topology),
    )


def _predicted(program: facts.ProgramFacts, topology: Topology) -> dict[str, Any]:
    made = topology.calibration
    if made is None:
        return {}
    held = program.argument_bytes + program.temp_bytes
    seconds = made.rates.step_seconds(program.operations, temp_bytes=program.temp_bytes, held_bytes=held)
    return {"predicted_seconds": seconds, "calibration": made.describe()}


def sent_by(
    name_of: Callable[[collectives.Collective], str], found: Sequence[collectives.Collective]
) -> dict[str, float]:
    """Return for each name that `name_of` gives a collective the bytes that a device sends, most first."""
    sums: dict[str, float] = {}
    for each in found:
        sums[name_of(each)] = sums.get(name_of(each), 0.0) + each.sent_bytes
    return dict(sorted(sums.items(), key=lambda item: -item[1]))


def device_bytes(program: facts.ProgramFacts, parts: components.Parts) -> DeviceBytes:
    """Return what one device holds while the compiled step runs."""
    state = parts.abstract_state
    held = {name: _shard_bytes(getattr(state, name)) for name in ("params", "opt_state", "model_state")}
    beside = program.temp_bytes + program.output_bytes
    batch = batch_bytes(parts) // math.prod(parts.strategy.mesh.shape[axis] for axis in parts.strategy.batch_axes)
    gradients = min(sum(4 * math.prod(_shard_shape(leaf)) for leaf in jax.tree.leaves(state.params)), beside)
    return DeviceBytes(
        **held,
        batch=batch,
        gradients=gradients,
        activations=beside - gradients,
        padding=max(program.argument_bytes - sum(held.values()) - batch, 0),
        program=program.code_bytes,
    )


def batch_bytes(parts: components.Parts) -> int:
    """Return the bytes of a global batch."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in parts.fields.values())


def _shard_shape(leaf: jax.ShapeDtypeStruct) -> tuple[int, ...]:
    assert leaf.sharding is not None
    return leaf.sharding.shard_shape(leaf.shape)


def _shard_bytes(tree: PyTree) -> int:
    return sum(math.prod(_shard_shape(leaf)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
