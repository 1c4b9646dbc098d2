"""Strategies by name: how a model and its batch are distributed over the devices.

A strategy is a mesh, a layout and the step that goes with them. Models and losses do not depend on the choice.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import optax
from jax.sharding import Mesh, PartitionSpec

from jaxdist.spmd import evaluate, reduce, sharded
from jaxdist.spmd import layout as layouts
from jaxdist.spmd import step as steps
from jaxdist.spmd.canonical import canonical_step, shard_sums, tensor_step
from jaxdist.spmd.mesh import DATA_AXIS, make_mesh

REDUCTIONS = ("mean", "canonical")
MODEL_AXIS = "model"
SHARD_AXIS = "fsdp"

PURPOSES: Mapping[str, str] = {
    "data-parallel": "a whole replica on every device, gradients averaged; the simplest, and fastest where it fits",
    "zero1": "replicas with the optimizer state sharded over the devices; for optimizers larger than the params (Adam)",
    "fsdp": "params, gradients and optimizer state sharded over all devices; for models too large for one device",
    "hsdp": "fsdp inside each host, replicas across hosts; where the network between hosts is slow",
    "tensor": "matrices sharded over a model axis, the batch over data; for layers too large for fsdp or small batches",
}
ELSEWHERE: Mapping[str, str] = {
    "parameter-server": "islands of devices that meet at a server, synchronously or not",
}
"""Strategies that are not a layout of one mesh; the command line starts them."""


@dataclasses.dataclass(frozen=True)
class Strategy:
    """A way to distribute training over devices.

    Attributes:
      name: one of `PURPOSES`.
      mesh: the devices.
      layout: which part of each leaf of the state is on which device; for `state.create_state`.
      batch_axes: mesh axes the batch is sharded over; for the data feed and `mesh.batch_sizes`.
      logical_shards: number of fixed slices of the batch under canonical reduction, else None.
    """

    name: str
    mesh: Mesh
    layout: layouts.Layout
    batch_axes: tuple[str, ...]
    logical_shards: int | None

    def make_step(
        self,
        loss_fn: reduce.LossFn,
        optimizer: optax.GradientTransformation,
        *,
        num_microbatches: int = 1,
        hashing: canonical_step.Hashing = canonical_step.NO_HASHING,
    ) -> steps.Step:
        """Return `step(state, batch) -> (state, metrics)`; the state is donated. Only canonical steps are hashed."""
        settings: dict[str, Any] = {"num_microbatches": num_microbatches}
        if self.logical_shards is None and self.layout is layouts.replicated and len(self.batch_axes) == 1:
            return steps.data_parallel_step(loss_fn, optimizer, self.mesh, **settings)
        settings |= {"batch_axes": self.batch_axes}
        if self.logical_shards is None:
            return sharded.sharded_step(loss_fn, optimizer, self.mesh, layout=self.layout, **settings)
        settings |= {"logical_shards": self.logical_shards, "hashing": hashing}
        if self.name == "tensor":
            return tensor_step.tensor_step(loss_fn, optimizer, self.mesh, **settings)
        return canonical_step.canonical_step(loss_fn, optimizer, self.mesh, layout=self.layout, **settings)

    def make_eval_step(self, eval_fn: evaluate.EvalFn) -> evaluate.EvalStep:
        """Return the evaluation of one global batch, with the reduction of the step."""
        if self.logical_shards is None:
            return evaluate.eval_step(eval_fn)
        return evaluate.canonical_eval_step(
            eval_fn, self.mesh, logical_shards=self.logical_shards, axes=self.batch_axes
        )

    def make_step_with_rows(self, eval_fn: evaluate.EvalFn, collect_fn: evaluate.CollectFn) -> evaluate.StepWithRows:
        """Return the evaluation of one global batch that also collects its rows, with the reduction of the step."""
        eval_step = self.make_eval_step(eval_fn)
        if self.logical_shards is None:
            return evaluate.step_with_rows(eval_step, evaluate.collect_step(collect_fn, self.mesh))
        collect = evaluate.canonical_collect_step(
            collect_fn, self.mesh, logical_shards=self.logical_shards, axes=self.batch_axes
        )
        return lambda *args: (eval_step(*args), collect(*args))


def build(
    name: str,
    *,
    devices: Sequence[jax.Device] | None = None,
    mesh_axes: Mapping[str, int] | None = None,
    reduction: str = "mean",
    logical_shards: int = 8,
    rules: layouts.Rules | None = None,
    names: Mapping[str, str | None] | None = None,
    min_size: int = layouts.MIN_SIZE,
) -> Strategy:
    """Return the strategy called `name`.

    Args:
      name: one of `PURPOSES`.
      devices: the devices to use, all by default.
      mesh_axes: axis name -> size (one may be -1); None is the strategy's own default.
      reduction: how gradients are added, `mean` or `canonical`.
      logical_shards: for canonical reduction, the number of fixed slices of the global batch.
      rules: for `tensor`, see `layout.by_path`; None is the rules of our GPT and ViT.
      names: mesh axes for the names that Flax modules gave to the dims of their params. A name that is an axis of the
        mesh needs none. Named dims take precedence over the strategy's own choice.
      min_size: `zero1`, `fsdp` and `hsdp` do not shard leaves with fewer elements than this.

    Raises:
      ValueError: there is no such strategy or reduction, they cannot be combined, or the mesh lacks an axis.
    """
    check_name(name)
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}; got {reduction!r}.")
    if rules is not None and name != "tensor":
        raise ValueError(f"rules belong to strategy 'tensor'; {name!r} has no use for them. Remove them.")
    if names and name == "data-parallel":
        raise ValueError("Strategy 'data-parallel' shards no param, so names have no use. Remove them.")
    chosen = [axis for _, spec in rules or () for axis in layouts.spec_axes(PartitionSpec(*spec))]
    chosen += [axis for axis in (names or {}).values() if axis is not None]
    mesh = _make_mesh(name, mesh_axes, devices, chosen)
    batch_axes = (DATA_AXIS, SHARD_AXIS) if SHARD_AXIS in mesh.shape else (DATA_AXIS,)
    layout = _layout(name, mesh, rules, min_size)
    if name != "data-parallel":
        layout = layouts.by_names(mesh, names, otherwise=layout)
    logical = logical_shards if reduction == "canonical" else None
    if logical is not None:
        if name == "tensor":
            _check_canonical_tensor(mesh, mesh_axes, chosen)
        else:
            shard_sums.check_axes(mesh, axes=batch_axes)
        shard_sums.check_layout(mesh, logical_shards=logical_shards, axes=batch_axes)
    return Strategy(name, mesh, layout, batch_axes, logical)


def _make_mesh(
    name: str, axes: Mapping[str, int] | None, devices: Sequence[jax.Device] | None, chosen: Sequence[str]
) -> Mesh:
    """Return the mesh; `chosen` are the axes that rules and names are about."""
    defaults: dict[str, Mapping[str, int]] = {
        "hsdp": {DATA_AXIS: jax.process_count(), SHARD_AXIS: -1},
        "tensor": {DATA_AXIS: 1, MODEL_AXIS: -1},
    }
    mesh = make_mesh(axes or defaults.get(name), devices=devices)
    own = {"hsdp": (DATA_AXIS, SHARD_AXIS), "tensor": (DATA_AXIS, MODEL_AXIS)}.get(name, (DATA_AXIS,))
    needed = tuple(dict.fromkeys((DATA_AXIS, *chosen) if chosen and name == "tensor" else (*own, *chosen)))
    missing = [axis for axis in needed if axis not in mesh.shape]
    if missing:
        other = "rename them in layout.rules and layout.names" if chosen else "leave the mesh out for the default"
        raise ValueError(
            f"Strategy {name!r} needs the mesh axes {', '.join(needed)}; got {dict(mesh.shape)}. "
            f"Add {', '.join(missing)}, or {other}."
        )
    idle = [axis for axis in mesh.axis_names if axis not in (*own, *chosen, SHARD_AXIS) and mesh.shape[axis] > 1]
    if idle:
        raise ValueError(
            f"Strategy {name!r} has no use for the mesh axes {', '.join(idle)} of {dict(mesh.shape)}. Remove them."
        )
    return mesh


def _check_canonical_tensor(mesh: Mesh, axes: Mapping[str, int] | None, chosen: Sequence[str]) -> None:
    """Raise ValueError where other devices would give other bits without a word, or share the state otherwise.

    `axes` are those the user gave, `chosen` those that rules and names are about.
    """
    if next(iter(mesh.shape)) != DATA_AXIS or SHARD_AXIS in mesh.shape or DATA_AXIS in chosen:
        raise ValueError(
            f"Canonical reduction with strategy 'tensor' needs a mesh that begins with {DATA_AXIS!r}, over which no "
            f"param is sharded, and has no axis {SHARD_AXIS!r}; got {dict(mesh.shape)} and rules about "
            f"{', '.join(sorted(set(chosen))) or 'nothing'}. Change them, or use reduction='mean'."
        )
    if axes is None or any(size == -1 for axis, size in axes.items() if axis != DATA_AXIS):
        raise ValueError(
            "Canonical reduction with strategy 'tensor' has the same bits for any size of the data axis, but others "
            f"for each size of another axis, so that must be fixed; got the mesh {axes}. Set for example "
            f"mesh={{{DATA_AXIS!r}: -1, {MODEL_AXIS!r}: 2}}, or use reduction='mean'."
        )


def _layout(name: str, mesh: Mesh, rules: layouts.Rules | None, min_size: int) -> layouts.Layout:
    shard_axis = SHARD_AXIS if SHARD_AXIS in mesh.shape else DATA_AXIS
    if name == "zero1":
        return layouts.zero1(mesh, axis=shard_axis, min_size=min_size)
    if name in ("fsdp", "hsdp"):
        return layouts.fsdp(mesh, axis=shard_axis, min_size=min_size)
    if name == "tensor":
        return _tensor_layout(mesh, rules, min_size)
    return layouts.replicated


def _tensor_layout(mesh: Mesh, rules: layouts.Rules | None, min_size: int) -> layouts.Layout:
    shards = SHARD_AXIS in mesh.shape
    otherwise = layouts.fsdp(mesh, axis=SHARD_AXIS, min_size=min_size) if shards else layouts.replicated
    ready = layouts.transformer_rules(MODEL_AXIS, shard_axis=SHARD_AXIS if shards else None)
    return layouts.by_path(ready if rules is None else rules, otherwise=otherwise, for_any_model=rules is None)


def check_name(name: str) -> None:
    """Raise ValueError if `name` is not a strategy of one mesh; the message lists them, with their purposes."""
    if name in PURPOSES:
        return
    known = "\n".join(f"  {each}: {purpose}" for each, purpose in {**PURPOSES, **ELSEWHERE}.items())
    if name in ELSEWHERE:
        raise ValueError(
            f"Strategy {name!r} is not a layout of one mesh. Start it with `jaxdist train`; it cannot be built here."
        )
    raise ValueError(f"There is no strategy {name!r}. Choose one of\n{known}")
