"""The step of canonical reduction: the same bits on any number of devices, for every layout that shards the state."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from jaxdist.spmd import device_program, keys, precision, reduce
from jaxdist.spmd import layout as layouts
from jaxdist.spmd import step as steps
from jaxdist.spmd.canonical import adding, shard_sums, state_update
from jaxdist.spmd.mesh import DATA_AXIS
from jaxdist.spmd.metrics import Batch
from jaxdist.spmd.state import PlacedInputs, TrainState
from jaxdist.spmd.step import KeepsKey, Metrics, Step

KeylessStep: TypeAlias = Callable[[TrainState, keys.PlainKey, jax.Array | None, Batch], tuple[TrainState, Metrics]]
"""A step given the state's key as plain numbers and the inputs of the optimizer, already placed."""


Applied: TypeAlias = Callable[[Callable[[jax.Array], jax.Array], jax.Array], jax.Array]
"""`applied(function, vector)` is `function(vector)`, perhaps computed by itself."""


def together(function: Callable[[jax.Array], jax.Array], vector: jax.Array) -> jax.Array:
    """Return `function(vector)`, compiled together with all else."""
    return function(vector)


class Hashing(Protocol):
    """What a canonical step computes of itself besides its result: whole numbers, which change no bit of it."""

    def of_shard(self, flat: jax.Array) -> jax.Array:
        """Return the hashes of the sums of one logical shard, a vector: uint32, one dim, always of the same length."""

    def of_step(self, sums: reduce.Sums, params: Any, model_state: Any, applied: Applied = together) -> jax.Array:
        """Return the hashes of the sums of the whole batch and of what the step made: uint32, one dim.

        `applied(function, vector)` computes the hash of one array.
        """


class NoHashing:
    """Hashes nothing."""

    def of_shard(self, flat: jax.Array) -> jax.Array:
        """Return no hash."""
        return jnp.zeros(0, jnp.uint32)

    def of_step(self, sums: reduce.Sums, params: Any, model_state: Any, applied: Applied = together) -> jax.Array:
        """Return no hash."""
        return jnp.zeros(0, jnp.uint32)


NO_HASHING = NoHashing()


def canonical_step(
    loss_fn: reduce.LossFn,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    *,
    logical_shards: int = 8,
    batch_axes: Sequence[str] = (DATA_AXIS,),
    num_microbatches: int = 1,
    layout: layouts.Layout = layouts.replicated,
    hashing: Hashing = NO_HASHING,
) -> Step:
    """Return a data-parallel step that gives the same bits on any number of devices, up to `logical_shards`.

    Two stages: the logical shards' sums (see `shard_sums`), then the division and the optimizer, on every device by the
    same machine code (`device_program`). A small model has one program for both. The bits belong to one jaxlib and one
    kind of device.

    A `layout` that shards the state changes no bit: params are gathered for the gradients, which are added in slices,
    and the state is updated some leaves at a time (see `state_update`).

    Args:
      loss_fn: see `reduce.LossFn`.
      optimizer: applied to the mean gradients.
      mesh: the devices; the batch is sharded over all of them.
      logical_shards: the fixed number of parts of the global batch, which it divides.
      batch_axes: mesh axes that the batch's leading dim is sharded over.
      num_microbatches: parts of each logical shard, computed one after another.
      layout: the layout the state was created with, by `create_state` or, for the same bits under every layout,
        `jaxdist.spmd.state.create_same_state`.
      hashing: its hashes are the metric STEP_HASHES, the only one that is no scalar.

    Raises:
      ValueError: the mesh has more devices than logical shards, or axes that do not shard the batch.
    """
    is_whole = _is_whole(mesh, layout)
    sums_of_shards = logical_shard_sums(
        loss_fn,
        mesh,
        logical_shards=logical_shards,
        batch_axes=batch_axes,
        num_microbatches=num_microbatches,
        hashing=hashing,
        choose=adding_for(mesh, layout),
    )

    update_state = _state_update(sums_of_shards, optimizer, mesh, hashing)
    made: list[KeylessStep] = []  # at the first call

    def keyless_step(
        state: TrainState, key: keys.PlainKey, inputs: jax.Array | None, batch: Batch
    ) -> tuple[TrainState, Metrics]:
        if made:
            return made[0](state, key, inputs, batch)
        with device_program.TOLD.kept():
            dealt = shard_sums.checked(batch, sums_of_shards.dealing)
            gather = None if is_whole else state_update.gathering(mesh)
            if is_whole and update_state.is_at_once(state) and sums_of_shards.is_small(_shared(state, key), dealt):
                made.append(_in_one_program(sums_of_shards, update_state))
            else:
                made.append(_in_stages(sums_of_shards, update_state, gather))
            return made[0](state, key, inputs, batch)

    # Programs compiled for one shape refuse any other, so the recompile check has nothing else to find.
    return KeepsKey(keyless_step, PlacedInputs(optimizer, mesh), cache_size=lambda: len(made))


def _state_update(
    sums_of_shards: shard_sums.LogicalShardSums, optimizer: optax.GradientTransformation, mesh: Mesh, hashing: Hashing
) -> state_update.StateUpdate:
    """Return what makes the new state, its metrics and its hashes from the sums of the batch."""

    def update(state: TrainState, inputs: jax.Array | None, total: jax.Array) -> tuple[TrainState, Metrics]:
        sums, _ = sums_of_shards.unravel(total)
        averages = reduce.average(sums, state.model_state)
        first = steps.first_nonfinite_of_whole(averages)
        return steps.apply_averages(
            state,
            averages,
            optimizer,
            inputs,
            first=first,
            choose=steps.chosen_afterwards,
            keep_where=steps.keep_in_turn,
        )

    def hash_step(total: jax.Array, params: Any, model_state: Any, applied: Applied = together) -> jax.Array:
        sums, rows = sums_of_shards.unravel(total)
        return jnp.concatenate([hashes_in(rows).reshape(-1), hashing.of_step(sums, params, model_state, applied)])

    return state_update.StateUpdate(update, mesh, None if hashing is NO_HASHING else hash_step)


def _in_stages(
    sums: shard_sums.LogicalShardSums, update_state: state_update.StateUpdate, gather: Callable[[Any], Any] | None
) -> KeylessStep:
    """Return the step as several programs: what `gather` does, where the state is sharded, the sums, the update."""
    is_scaled: bool | None = None

    def step(
        state: TrainState, key: keys.PlainKey, inputs: jax.Array | None, batch: Batch
    ) -> tuple[TrainState, Metrics]:
        nonlocal is_scaled
        if is_scaled is None:  # found once: looking takes as long as a small step's dispatch
            is_scaled = precision.loss_scale(state.opt_state) is not None
        loss_scale = precision.loss_scale(state.opt_state) if is_scaled else None
        held = (state.params, state.model_state)
        shared = (*(gather(held) if gather else held), key, state.step, loss_scale)
        total = sums(shared, batch)
        del shared  # the update needs the memory of gathered params
        return update_state(state, inputs, total)

    return step


def _in_one_program(sums: shard_sums.LogicalShardSums, update_state: state_update.StateUpdate) -> KeylessStep:
    """Return the step as one program: of a small step, dispatching several would take most of the time."""
    program = sums.followed_by(
        lambda total, state, kept: update_state.at_once(state, kept[1], total),
        shared_of=lambda state, kept: _shared(state, kept[0]),
    )

    def step(
        state: TrainState, key: keys.PlainKey, inputs: jax.Array | None, batch: Batch
    ) -> tuple[TrainState, Metrics]:
        return program(state, (key, inputs), shard_sums.checked(batch, sums.dealing))

    return step


def adding_for(mesh: Mesh, layout: layouts.Layout) -> Callable[[adding.Site, int], adding.Adding]:
    """Return what chooses how a step adds the vectors of the shards."""
    return adding.held_whole if _is_whole(mesh, layout) else adding.held_in_slices


def _is_whole(mesh: Mesh, layout: layouts.Layout) -> bool:
    return layout is layouts.replicated or mesh.size == 1


def logical_shard_sums(
    loss_fn: reduce.LossFn,
    mesh: Mesh,
    *,
    logical_shards: int,
    num_microbatches: int,
    batch_axes: Sequence[str] = (DATA_AXIS,),
    hashing: Hashing = NO_HASHING,
    choose: Callable[[adding.Site, int], adding.Adding] = adding.held_whole,
) -> shard_sums.LogicalShardSums:
    """Return the sums of a canonical step: of what all shards share (see `shared_by_shards`) and the batch.

    They unravel to (sums, rows); `hashes_in` reads the hashes of each logical shard from the rows.
    """
    sums_of = shard_function(loss_fn, num_microbatches)

    def shard_fn(shared: tuple[Any, ...], shard: Batch, index: jax.Array) -> tuple[reduce.Sums, jax.Array]:
        return sums_of(shared, shard, index), jnp.zeros((logical_shards, 2 * num_hashes), jnp.float32)

    def add_hashes(flat: jax.Array, index: jax.Array) -> jax.Array:
        """Write the shard's hashes into its own row: the sum over all shards then has those of each.

        So they travel with the sums, whatever the layout.
        """
        if not num_hashes:
            return flat
        halves = _halves(device_program.hashed(hashing.of_shard, index >= 0, flat)).astype(flat.dtype)
        begin = flat.size - (logical_shards - index) * halves.size
        return jax.lax.dynamic_update_slice(flat, halves, (begin,))

    num_hashes = jax.eval_shape(hashing.of_shard, jax.ShapeDtypeStruct((1,), jnp.float32)).size
    return shard_sums.LogicalShardSums(
        shard_fn, mesh, logical_shards=logical_shards, axes=batch_axes, finish_fn=add_hashes, adding=choose
    )


def shard_function(loss_fn: reduce.LossFn, num_microbatches: int) -> Callable[..., reduce.Sums]:
    """Return the function of (what all shards share, shard, its number) that gives the sums of a logical shard."""

    def sums_of_shard(shared: tuple[Any, ...], shard: Batch, index: jax.Array) -> reduce.Sums:
        params, model_state, key, step, loss_scale = shared
        return reduce.accumulate_sums(
            loss_fn,
            params,
            model_state,
            shard,
            jax.random.fold_in(key.typed(), step),
            num_microbatches=num_microbatches,
            first_index=index * num_microbatches,
            loss_scale=loss_scale,
        )

    return sums_of_shard


def shared_by_shards(state: TrainState) -> tuple[Any, ...]:
    """Return what the logical shards of a step from `state` have in common."""
    return _shared(state, keys.PlainKey.of(state.key))


def _shared(state: TrainState, key: keys.PlainKey) -> tuple[Any, ...]:
    return state.params, state.model_state, key, state.step, precision.loss_scale(state.opt_state)


def hash_rows(hashes: jax.Array, index: jax.Array, logical_shards: int) -> jax.Array:
    """Return the rows of all logical shards: zeros, but for the hashes of shard `index`. See `hashes_in`."""
    halves = _halves(hashes)
    return jnp.zeros((logical_shards, halves.size), jnp.float32).at[index].set(halves)


def _halves(hashes: jax.Array) -> jax.Array:
    # Half a hash is a float32 without rounding.
    return jnp.concatenate([hashes >> 16, hashes & 0xFFFF]).astype(jnp.float32)


def hashes_in(rows: jax.Array) -> jax.Array:
    """Return the hashes in the rows of `logical_shard_sums`, uint32 [logical shards, hashes of each]."""
    rows = rows.real if jnp.iscomplexobj(rows) else rows
    high, low = jnp.split(rows.astype(jnp.uint32), 2, axis=1)
    return (high << 16) | low
