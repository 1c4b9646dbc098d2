"""The step for every layout that shards the state: ZeRO, FSDP, tensor axes, and mixtures of them.

Two parts in one jitted program. Inside `shard_map`, manual over the axes that shard the batch, each device does what it
does in `data_parallel_step`, with the same keys: it gathers a param where it is needed, and sums up gradients so that
each device ends with the shard it keeps. Outside, on the global view, the optimizer runs under shardings, so that
what looks at all gradients at once (a global norm) is right whatever the layout. Axes that do not shard the batch,
such as a `model` axis, are left to XLA everywhere.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxdist.spmd import layout as layouts
from jaxdist.spmd import precision, reduce
from jaxdist.spmd import step as steps
from jaxdist.spmd.mesh import DATA_AXIS
from jaxdist.spmd.metrics import Batch
from jaxdist.spmd.state import PlacedInputs, TrainState

PyTree: TypeAlias = Any


def sharded_step(
    loss_fn: reduce.LossFn,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    *,
    layout: layouts.Layout,
    batch_axes: Sequence[str] = (DATA_AXIS,),
    num_microbatches: int = 1,
) -> steps.Step:
    """Return the jitted step for a state laid out by `layout`; its numbers are those of `data_parallel_step`.

    The state is donated and returned with the same shardings. Params sharded over a batch axis are
    gathered for each microbatch, in the forward pass and again in the backward pass, and held whole no longer than
    they are used.

    Args:
      loss_fn: see `reduce.LossFn`.
      optimizer: runs on the global view.
      mesh: the mesh of layout and batch.
      layout: the layout the state was created with.
      batch_axes: mesh axes that the batch's leading dim is sharded over.
      num_microbatches: parts of each device's batch, computed one after another.
    """
    # A manual axis of one device gains nothing, and XLA refuses sums over it together with an automatic axis.
    cut_axes = tuple(axis for axis in batch_axes if mesh.shape[axis] > 1)

    def step(state: TrainState, inputs: jax.Array | None, batch: Batch) -> tuple[TrainState, steps.Metrics]:
        param_specs = layouts.specs(state, mesh, layout).params
        grad_specs = _grad_specs(state.params, param_specs, mesh, layout)
        sums = _mapped_sums(loss_fn, mesh, cut_axes, num_microbatches, param_specs, grad_specs)(
            state.params,
            state.model_state,
            batch,
            jax.random.fold_in(state.key, state.step),
            precision.loss_scale(state.opt_state),
        )
        grad_shardings = layouts.map_specs(lambda spec: NamedSharding(mesh, spec), grad_specs)
        sums = sums._replace(grads=jax.lax.with_sharding_constraint(sums.grads, grad_shardings))
        averages = reduce.average(sums, state.model_state)
        new_state, metrics = steps.apply_averages(state, averages, optimizer, inputs)
        return layouts.constrain(new_state, mesh, layout), metrics

    return _GivesInputs(jax.jit(step, donate_argnums=0), PlacedInputs(optimizer, mesh))


class _GivesInputs:
    """A step out of `program(state, optimizer's inputs, batch)`, a jitted function."""

    def __init__(self, program: Any, inputs: PlacedInputs):
        self._program, self._inputs, self._in_flight = program, inputs, steps.InFlight()
        self._cache_size = program._cache_size  # for the recompile sentinel

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, steps.Metrics]:
        new_state, metrics = self._program(state, self._inputs.placed(), batch)
        self._in_flight.add(metrics["loss"])
        return new_state, metrics

    def with_inputs(self, inputs: PlacedInputs) -> "_GivesInputs":
        """Return a step of the same program with other inputs of the optimizer."""
        return _GivesInputs(self._program, inputs)

    def trace(self, state: Any, batch: Any) -> jax.stages.Traced:
        """Return the step traced for arguments of these shapes and shardings."""
        return self._program.trace(state, self._inputs.described(), batch)

    def lower(self, state: Any, batch: Any) -> jax.stages.Lowered:
        """Return the step lowered for such arguments."""
        return self.trace(state, batch).lower()


def _mapped_sums(
    loss_fn: reduce.LossFn,
    mesh: Mesh,
    batch_axes: tuple[str, ...],
    num_microbatches: int,
    param_specs: PyTree,
    grad_specs: PyTree,
) -> Callable[..., reduce.Sums]:
    """Return (params, model_state, batch, key, loss_scale) -> Sums of the global batch, sharded by `grad_specs`."""
    held = layouts.map_specs(lambda spec: layouts.keep_axes(spec, batch_axes), param_specs)
    wanted = layouts.map_specs(lambda spec: layouts.keep_axes(spec, batch_axes), grad_specs)
    gather = _make_gather(held)

    def sum_grad(grad: jax.Array, param_spec: PartitionSpec, grad_spec: PartitionSpec) -> jax.Array:
        return reduce.sum_over_axes(grad, batch_axes, param_spec=param_spec, grad_spec=grad_spec)

    def local_sums(
        params: PyTree, model_state: PyTree, batch: Batch, key: jax.Array, loss_scale: jax.Array | None
    ) -> reduce.Sums:
        sums = reduce.accumulate_sums(
            loss_fn,
            params,
            model_state,
            batch,
            key,
            num_microbatches=num_microbatches,
            first_index=jax.lax.axis_index(batch_axes) * num_microbatches if batch_axes else 0,
            loss_scale=loss_scale,
            gather_fn=gather,
        )
        grads = jax.tree.map(sum_grad, sums.grads, held, wanted)
        return jax.lax.psum(sums._replace(grads=None), batch_axes)._replace(grads=grads)

    if not batch_axes:
        return local_sums
    whole: Any = PartitionSpec()
    return jax.shard_map(
        local_sums,
        mesh=mesh,
        in_specs=(held, whole, PartitionSpec(batch_axes), whole, whole),
        out_specs=reduce.Sums(wanted, whole, whole, whole, whole),
        axis_names=set(batch_axes),
        # As in `data_parallel_step`: gradients stay local, and a loss_fn for one device runs unchanged.
        check_vma=False,
    )


def _make_gather(held: PyTree) -> reduce.GatherFn | None:
    """Return the function that gathers params sharded by `held`, or None where none is sharded."""
    if not any(jax.tree.leaves(layouts.map_specs(lambda spec: bool(layouts.spec_axes(spec)), held))):
        return None

    def gather(params: PyTree, has_examples: jax.Array) -> PyTree:
        return jax.tree.map(lambda leaf, spec: reduce.gather(leaf, spec, has_examples), params, held)

    return gather


def _grad_specs(params: PyTree, param_specs: PyTree, mesh: Mesh, layout: layouts.Layout) -> PyTree:
    """Return the specs of gradients: that of the param if it is sharded, otherwise that of its optimizer state."""

    def spec_of(path: tuple[Any, ...], leaf: jax.Array, param_spec: PartitionSpec) -> PartitionSpec:
        if layouts.spec_axes(param_spec):
            return param_spec
        name = f"opt_state/{layouts.path_name(path)}"
        spec = layout(name, leaf)
        layouts.check_spec(name, leaf, spec, mesh)
        return spec

    return jax.tree_util.tree_map_with_path(spec_of, params, param_specs)
