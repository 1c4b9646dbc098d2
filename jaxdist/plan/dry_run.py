"""`jaxdist train --dry-run`: everything is put together and compiled for the devices of this machine, and sized.

Nothing is trained and nothing is written. A canonical step is several programs that are compiled when they are first
called; so that one is called, once, on the first batch.
"""

import dataclasses
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from jaxdist import errors
from jaxdist.config.experiment import Experiment
from jaxdist.plan import estimate
from jaxdist.plan.showing.plan_text import size_text
from jaxdist.run import components, preflight
from jaxdist.run.diagnosis import utilization
from jaxdist.spmd.layout import path_name

TREES = ("params", "opt_state", "model_state")
_MOST_LEAVES = 12
_WIDTH = 80


@dataclasses.dataclass(frozen=True)
class LeafSize:
    """A leaf of the state: its path, shape, dtype, bytes, and how many of them one device holds."""

    path: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int
    device_bytes: int


@dataclasses.dataclass(frozen=True)
class ProgramSize:
    """Bytes of one device for a compiled program: what goes in, what comes out, working memory, code.

    `reused` are those of its outputs that take the place of inputs.
    """

    arguments: int
    outputs: int
    reused: int
    temporary: int
    code: int

    @property
    def total(self) -> int:
        """What the device holds at the program's peak."""
        return self.arguments + self.outputs - self.reused + self.temporary + self.code


@dataclasses.dataclass(frozen=True, kw_only=True)
class DryRun:
    """What a run would need on these devices.

    Attributes:
      title: experiment, devices, strategy.
      batch: shape and dtype of each field of a global batch.
      leaves: by tree, the largest first.
      step: None for a canonical one, which is several programs.
      evaluation: None without held-out data, or for canonical reduction.
      flops_per_step: over all devices; None for a canonical step.
      peak_flops_per_second: of one device; None where its kind is not known.
      compile_seconds: that both programs took.
    """

    title: str
    batch: Mapping[str, str]
    leaves: Mapping[str, Sequence[LeafSize]]
    step: ProgramSize | None
    evaluation: ProgramSize | None
    flops_per_step: float | None
    peak_flops_per_second: float | None
    compile_seconds: float

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain data."""
        found = dataclasses.asdict(self)
        for name in ("step", "evaluation"):
            program = getattr(self, name)
            found[name] = program and found[name] | {"total": program.total}
        return found


def dry_run(experiment: Experiment, devices: Sequence[jax.Device]) -> DryRun:
    """Put `experiment` together, compile a step and an evaluation, and return their sizes.

    Raises:
      UserError: anything that would refuse the run.
    """
    with errors.as_user_error():
        preflight.check_settings(experiment)
        parts = components.put_together(experiment, devices=devices)
        parts.check_weights()
        begin = time.perf_counter()
        step, evaluation = _compiled(parts) if experiment.reduction != "canonical" else _called(parts)
    mesh, state = parts.strategy.mesh, parts.abstract_state
    axes = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
    return DryRun(
        title=f"{experiment.name}: {mesh.size} device{'s' if mesh.size > 1 else ''} ({axes}), {experiment.strategy}, "
        f"{experiment.reduction}",
        batch={name: f"{tuple(leaf.shape)} {leaf.dtype}" for name, leaf in parts.fields.items()},
        leaves={name: leaf_sizes(getattr(state, name)) for name in TREES},
        step=step,
        evaluation=evaluation,
        flops_per_step=utilization.flops_of(parts),
        peak_flops_per_second=utilization.peak_of(mesh.devices.flat[0]),
        compile_seconds=time.perf_counter() - begin,
    )


def _compiled(parts: components.Parts) -> tuple[ProgramSize, ProgramSize | None]:
    step = estimate.trace_step(parts).lower().compile()
    if parts.eval_step is None:
        return program_size(step), None
    evaluation: Any = parts.eval_step
    state = parts.abstract_state
    lowered = evaluation.lower(state.params, state.model_state, utilization.batch_of(parts))
    return program_size(step), program_size(lowered.compile())


def _called(parts: components.Parts) -> tuple[None, None]:
    batch, _ = next(parts.batches())
    state, _ = parts.step(parts.create_state(), batch)
    if parts.eval_step is not None:
        jax.block_until_ready(parts.eval_step(state.params, state.model_state, batch))
    return None, None


def program_size(compiled: jax.stages.Compiled) -> ProgramSize:
    """Return what the compiler says of a program's memory."""
    memory: Any = compiled.memory_analysis()
    names = ("argument", "output", "alias", "temp", "generated_code")
    return ProgramSize(*(getattr(memory, f"{name}_size_in_bytes") for name in names))


def leaf_sizes(tree: Any) -> list[LeafSize]:
    """Return the leaves of a tree of ShapeDtypeStructs with shardings, the largest first."""
    found = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        size = leaf.dtype.itemsize
        shard = leaf.sharding.shard_shape(leaf.shape)
        count = math.prod(leaf.shape)
        found.append(
            LeafSize(path_name(path), tuple(leaf.shape), str(leaf.dtype), count * size, math.prod(shard) * size)
        )
    return sorted(found, key=lambda each: (-each.bytes, each.path))


def render(made: DryRun) -> str:
    """Return the sizes as text of 80 columns."""
    lines = [made.title, "", "A batch over all devices"]
    lines += [f"  {name:<24} {form}" for name, form in made.batch.items()]
    for name, leaves in made.leaves.items():
        lines += _tree(name, leaves) if leaves else []
    lines += ["", "Memory of one device while it runs"]
    if made.step is None:
        lines.append("  not known: a canonical step is several programs; one was called, and works")
    else:
        lines.append(f"  {'':<12}{''.join(f'{head:>12}' for head in ('arguments', 'outputs', 'temporary', 'total'))}")
        lines.append(_program("a step", made.step))
        lines += [_program("evaluation", made.evaluation)] if made.evaluation else []
    lines += ["", f"Compiled in {made.compile_seconds:.1f} s.", *_arithmetic(made)]
    return "\n".join(line.rstrip()[:_WIDTH] for line in lines)


def _tree(name: str, leaves: Sequence[LeafSize]) -> list[str]:
    total, held = sum(leaf.bytes for leaf in leaves), sum(leaf.device_bytes for leaf in leaves)
    count = sum(math.prod(leaf.shape) for leaf in leaves)
    lines = ["", f"{name}: {count:,} numbers, {size_text(total)}; {size_text(held)} on each device"]
    for leaf in leaves[:_MOST_LEAVES]:
        path = leaf.path if len(leaf.path) <= 34 else f"…{leaf.path[-33:]}"
        shape = f"{leaf.dtype}{list(leaf.shape)}"
        lines.append(f"  {path:<34} {shape:<20.20} {size_text(leaf.bytes):>10} {size_text(leaf.device_bytes):>10}")
    rest = leaves[_MOST_LEAVES:]
    if rest:
        others = sum(leaf.bytes for leaf in rest), sum(leaf.device_bytes for leaf in rest)
        lines.append(
            f"  {f'and {len(rest)} smaller':<34} {'':<20} {size_text(others[0]):>10} {size_text(others[1]):>10}"
        )
    return lines


def _program(name: str, size: ProgramSize) -> str:
    figures = (size.arguments, size.outputs - size.reused, size.temporary + size.code, size.total)
    return f"  {name:<12}{''.join(f'{size_text(each):>12}' for each in figures)}"


def _arithmetic(made: DryRun) -> list[str]:
    if made.flops_per_step is None:
        return ["The FLOPs of several programs are not counted."]
    peak = made.peak_flops_per_second
    known = "that of this kind is not known" if peak is None else f"{peak:.3g} a second on each device"
    return [f"A step is {made.flops_per_step:.3g} FLOPs over all devices. Peak: {known}."]
