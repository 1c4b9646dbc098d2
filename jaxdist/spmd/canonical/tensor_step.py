"""The step of canonical reduction where an axis of the mesh divides the model."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, PartitionSpec

from jaxdist.spmd import device_program, group_program, keys, precision, reduce
from jaxdist.spmd import layout as layouts
from jaxdist.spmd.canonical import canonical_step, group_sums
from jaxdist.spmd.mesh import DATA_AXIS
from jaxdist.spmd.metrics import Batch
from jaxdist.spmd.state import PlacedInputs, TrainState
from jaxdist.spmd.step import STEP_HASHES, KeepsKey, Metrics, Step, apply_averages, chosen_afterwards


def tensor_step(
    loss_fn: reduce.LossFn,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    *,
    logical_shards: int = 8,
    batch_axes: Sequence[str] = (DATA_AXIS,),
    num_microbatches: int = 1,
    hashing: canonical_step.Hashing = canonical_step.NO_HASHING,
) -> Step:
    """Return a step that gives the same bits for any size of the batch axes, up to `logical_shards`.

    The bits belong to the sizes of the other axes, along which the devices of a group compute together. Two stages, as
    in `canonical_step`: the logical shards' sums (see `group_sums`), then the division and the optimizer, in each group
    by the same program. The state keeps its layout, which must not shard it over the batch axes.

    Raises:
      ValueError: there are fewer logical shards than groups, or the batch axes are not the first of the mesh.
    """
    is_hashed = hashing is not canonical_step.NO_HASHING
    sums_of_shards = _sums_of_shards(
        canonical_step.shard_function(loss_fn, num_microbatches), mesh, logical_shards, batch_axes, hashing
    )

    def hash_step(sums: reduce.Sums, rows: jax.Array, params: Any, model_state: Any) -> jax.Array:
        of_shards = canonical_step.hashes_in(rows).reshape(-1)
        return jnp.concatenate([of_shards, hashing.of_step(sums, params, model_state)])

    def update(state: TrainState, inputs: jax.Array | None, sums: reduce.Sums) -> tuple[TrainState, Metrics]:
        averages = reduce.average(sums, state.model_state)
        return apply_averages(state, averages, optimizer, inputs, choose=chosen_afterwards)

    looking = group_program.GroupProgram(
        hash_step, mesh, batch_axes=batch_axes, out_specs=lambda shapes: PartitionSpec()
    )
    updating: list[group_program.GroupProgram] = []  # made at the first call

    def keyless_step(
        state: TrainState, key: keys.PlainKey, inputs: jax.Array | None, batch: Batch
    ) -> tuple[TrainState, Metrics]:
        if not updating:
            updating.append(_updating(update, state, mesh, batch_axes))
        shared = (state.params, state.model_state, key, state.step, precision.loss_scale(state.opt_state))
        sums, rows = device_program.settled(sums_of_shards(shared, batch), mesh)
        new, metrics = device_program.settled(updating[0](state, inputs, sums), mesh)
        if not is_hashed:
            return new, metrics
        hashes = device_program.settled(looking(sums, rows, new.params, new.model_state), mesh)
        return new, {**metrics, STEP_HASHES: hashes}

    inputs = PlacedInputs(optimizer, mesh)
    return KeepsKey(keyless_step, inputs, cache_size=lambda: sum(program.num_compiles for program in updating))


def _sums_of_shards(
    shard_fn: Callable[..., reduce.Sums],
    mesh: Mesh,
    logical_shards: int,
    batch_axes: Sequence[str],
    hashing: canonical_step.Hashing,
) -> group_sums.GroupSums:
    """Return the sums of the logical shards, their gradients sharded as the params, with the hashes of each shard."""

    def hash_shard(sums: reduce.Sums, index: jax.Array) -> jax.Array:
        each = [hashing.of_shard(leaf.reshape(-1)) for leaf in jax.tree.leaves(sums)]
        return canonical_step.hash_rows(hashing.of_shard(jnp.concatenate(each)), index, logical_shards)

    def sum_specs(shared: Any, shapes: Any) -> Any:
        return group_sums.whole(shared, shapes)._replace(grads=jax.tree.map(group_program.spec_of, shared[0]))

    return group_sums.GroupSums(
        shard_fn,
        mesh,
        logical_shards=logical_shards,
        axes=batch_axes,
        sum_specs=sum_specs,
        look_fn=None if hashing is canonical_step.NO_HASHING else hash_shard,
    )


def _updating(
    update: Callable[..., Any], state: TrainState, mesh: Mesh, batch_axes: Sequence[str]
) -> group_program.GroupProgram:
    """Return the program of `update`, which donates a state laid out like `state` and keeps its layout."""
    specs = jax.tree.map(group_program.spec_of, state)
    for path, spec in jax.tree.leaves_with_path(specs, is_leaf=lambda node: isinstance(node, PartitionSpec)):
        if set(layouts.spec_axes(spec)) & set(batch_axes):
            raise ValueError(
                f"Canonical reduction with a tensor axis keeps the state whole along {', '.join(batch_axes)}; "
                f"{layouts.path_name(path)} is sharded by {spec}. Change the layout, or use reduction='mean'."
            )

    def out_specs(shapes: Any) -> Any:
        return specs, jax.tree.map(lambda _: PartitionSpec(), shapes[1])

    return group_program.GroupProgram(update, mesh, batch_axes=batch_axes, out_specs=out_specs, donate_argnums=(0,))
