"""Builders of the training step: `step(state, batch) -> (state, metrics)`, the state donated.

Each builder takes everything static (loss, optimizer, mesh) and differs from the others only in how the devices' sums
become the global mean. What a step does with the mean is in one place, `apply_averages`.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, PartitionSpec

from jaxdist.spmd import dependence, keys, precision, reduce
from jaxdist.spmd import metrics as metrics_lib
from jaxdist.spmd.mesh import DATA_AXIS
from jaxdist.spmd.metrics import Batch
from jaxdist.spmd.state import PlacedInputs, TrainState, WithInputs

Metrics: TypeAlias = dict[str, jax.Array]
Step: TypeAlias = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]

GRAD_NORM = "grad_norm"
"""The metric with the global norm of the mean gradient, before clipping."""
NONFINITE_LEAF = "nonfinite_leaf"
EMPTY_BATCH = -2
"""The value of `nonfinite_leaf` for a batch in which nothing counted."""
STEP_HASHES = "step_hashes"
"""The metric with the hashes of a canonical step, uint32 of one dim: those of the logical shards, then the step's."""

_MOST_IN_FLIGHT = 16
ABREAST = 4
"""Small leaves whose updates may be ready together: with all else, too few to wake a thread (see `keep_in_turn`)."""


class InFlight:
    """The newest steps that were dispatched, so that a loop which never looks at a result has few of them open.

    XLA's client for CPU devices admits 32 programs for a device and then may need, for the next one, the thread of one
    that waits for its neighbours: two fake devices on two cores stopped forever within 3,000 steps of a plain loop
    (jaxlib 0.10).
    """

    def __init__(self) -> None:
        self._results: list[jax.Array] = []

    def add(self, result: jax.Array) -> None:
        """Take a result of the step that was just dispatched, one that is not donated; wait for the older of many."""
        if isinstance(result, jax.core.Tracer):
            return
        self._results.append(result)
        if len(self._results) == _MOST_IN_FLIGHT:  # seldom: to ask takes 2 us even where there is nothing to wait for
            self._results[_MOST_IN_FLIGHT // 2 - 1].block_until_ready()
            del self._results[: _MOST_IN_FLIGHT // 2]


def data_parallel_step(
    loss_fn: reduce.LossFn,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    *,
    axis: str = DATA_AXIS,
    num_microbatches: int = 1,
) -> Step:
    """Return the jitted step of ordinary data parallelism: a replica on every device, gradients averaged by all-reduce.

    Equal to the one-device step on the whole batch up to the order of additions, also for batches with padding and
    with `num_microbatches` > 1. `batch` must be sharded over `axis` in its leading dim; the state is replicated and
    donated.

    Args:
      loss_fn: see `reduce.LossFn`.
      optimizer: applied to the mean gradients, the same on every replica.
      mesh: a mesh with the axis `axis`.
      axis: the mesh axis the batch is sharded over.
      num_microbatches: parts of each device's batch, computed one after the other.

    Returns:
      `step(state, batch) -> (state, metrics)`. The metrics are scalars on the devices, replicated: `loss`, those of
      `loss_fn` and `grad_norm`, the norm of the mean gradient before clipping, float32; and `nonfinite_leaf`, int32,
      negative unless the loss or a gradient was not finite, where the state stays as it was (see `apply_averages`).

    Raises:
      ValueError: at the first call, of a `loss_fn` that does not return what `reduce.LossFn` says.
    """
    local_step = _make_local_step(loss_fn, optimizer, axis, num_microbatches)
    # check_vma=False: gradients taken inside stay local, as `reduce` expects, and a loss_fn written for one device
    # runs unchanged (the check refuses every scan whose carry starts from a constant). Under the default, grad with
    # respect to replicated params would already sum over the axis and the mean would be num_devices times too large.
    mapped = jax.shard_map(
        local_step,
        mesh=mesh,
        in_specs=(PartitionSpec(), PartitionSpec(), PartitionSpec(axis)),
        out_specs=PartitionSpec(),
        check_vma=False,
    )

    def keyless_step(
        state: TrainState, key: keys.PlainKey, inputs: jax.Array | None, batch: Batch
    ) -> tuple[TrainState, Metrics]:
        new_state, metrics = mapped(with_key(state, key.typed()), inputs, batch)
        return with_key(new_state, None), metrics

    return KeepsKey(jax.jit(keyless_step, donate_argnums=0), PlacedInputs(optimizer, mesh))


class KeepsKey:
    """A step out of `program(state without key, plain key, optimizer's inputs, batch)`, which leaves the key in place.

    The key is the same in every step, so it need not pass through the program; and JAX calls a program that takes or
    returns typed keys by its slow path, which would be most of the time of a small step.
    """

    def __init__(
        self,
        program: Callable[[TrainState, keys.PlainKey, jax.Array | None, Batch], tuple[TrainState, Metrics]],
        inputs: PlacedInputs,
        cache_size: Callable[[], int] | None = None,
    ):
        self._program, self._inputs = program, inputs
        self._key: jax.Array | None = None
        self._in_flight = InFlight()
        cache_size = cache_size or getattr(program, "_cache_size", None)
        if cache_size is not None:
            self._cache_size = cache_size  # for the recompile sentinel

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        """Make a step."""
        if state.key is not self._key:
            self._key, self._plain_key = state.key, keys.PlainKey.of(state.key)
        new_state, metrics = self._program(with_key(state, None), self._plain_key, self._inputs.placed(), batch)
        self._in_flight.add(metrics["loss"])
        return with_key(new_state, state.key), metrics

    def with_inputs(self, inputs: PlacedInputs) -> "KeepsKey":
        """Return a step of the same program with other inputs of the optimizer."""
        return KeepsKey(self._program, inputs, getattr(self, "_cache_size", None))

    def trace(self, state: TrainState, batch: Batch) -> jax.stages.Traced:
        """Return the step traced for a state and a batch given as shapes, as the `trace` of a jitted step does."""
        key = jax.eval_shape(lambda: keys.PlainKey.of(jax.random.key(0)))
        data: Any = jax.ShapeDtypeStruct(key.data.shape, key.data.dtype, sharding=state.step.sharding)
        program: Any = self._program
        plain_key = keys.PlainKey(data, key.impl)
        traced: jax.stages.Traced = program.trace(with_key(state, None), plain_key, self._inputs.described(), batch)
        return traced


def with_inputs_of(step: Any, optimizer: optax.GradientTransformation, mesh: Mesh) -> Step | None:
    """Return a step of the same compiled program with the inputs of another optimizer; None if `step` has none.

    The two optimizers must differ in their inputs alone; see `state.WithInputs`.
    """
    if not isinstance(optimizer, WithInputs) or not hasattr(step, "with_inputs"):
        return None
    made: Step = step.with_inputs(PlacedInputs(optimizer, mesh))
    return made


def with_key(state: TrainState, key: Any) -> TrainState:
    """Return the state with another key, or with None."""
    return TrainState(state.step, state.params, state.model_state, state.opt_state, key)


def pmap_step(
    loss_fn: reduce.LossFn,
    optimizer: optax.GradientTransformation,
    *,
    devices: list[jax.Device] | None = None,
    num_microbatches: int = 1,
) -> Step:
    """Return `data_parallel_step` written with `jax.pmap`, for readers who know pmap: the same numbers.

    The batch is given whole, with the global leading dim; it is reshaped to (devices, examples per device) here. The
    state is not donated: pmap cannot donate an argument that it broadcasts.
    """
    devices = jax.local_devices() if devices is None else devices
    local_step = _make_local_step(loss_fn, optimizer, DATA_AXIS, num_microbatches)
    mapped = jax.pmap(local_step, axis_name=DATA_AXIS, in_axes=(None, None, 0), out_axes=None, devices=devices)
    inputs = optimizer.inputs if isinstance(optimizer, WithInputs) else None
    in_flight = InFlight()

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        folded = jax.tree.map(lambda leaf: leaf.reshape(len(devices), -1, *leaf.shape[1:]), batch)
        new_state, metrics = mapped(state, inputs, folded)
        in_flight.add(metrics["loss"])
        return new_state, metrics

    return step


def _make_local_step(
    loss_fn: reduce.LossFn,
    optimizer: optax.GradientTransformation,
    axis: str,
    num_microbatches: int,
) -> Callable[[TrainState, jax.Array | None, Batch], tuple[TrainState, Metrics]]:
    """Return what one device does of the step, inside shard_map or pmap."""

    def local_step(state: TrainState, inputs: jax.Array | None, batch: Batch) -> tuple[TrainState, Metrics]:
        sums = reduce.accumulate_sums(
            loss_fn,
            state.params,
            state.model_state,
            batch,
            jax.random.fold_in(state.key, state.step),
            num_microbatches=num_microbatches,
            first_index=jax.lax.axis_index(axis) * num_microbatches,
            loss_scale=precision.loss_scale(state.opt_state),
            flatten=reduce.packed,
        )
        averages = reduce.average(reduce.mean_over_axis(sums, axis), state.model_state, reduce.packed)
        first = first_nonfinite_of_whole(averages)
        return apply_averages(state, averages, optimizer, inputs, first=first, keep_where=keep_in_turn)

    return local_step


Keep: TypeAlias = Callable[[jax.Array, jax.Array], jax.Array]
"""`keep(old, new) -> leaf`: the old leaf where the state stays as it is."""


def keep_at_once(stays: jax.Array) -> Keep:
    """Return the choice between old and new leaves, for leaves that may be sharded."""
    return lambda old, new: jnp.where(stays, old, new)


def keep_in_turn(stays: jax.Array) -> Keep:
    """Return the choice between old and new leaves that a device has whole; on CPU devices small ones follow in turn.

    All updates are ready at the moment the check of all gradients is. Once more than eight operations are ready, XLA's
    executor wakes another thread for half of them, which takes longer than the update of small leaves.
    """
    chosen: list[jax.Array] = []

    def keep(old: jax.Array, new: jax.Array) -> jax.Array:
        new = jnp.asarray(new)  # a constant of the optimizer may be a number of Python's
        is_small = 0 < new.size <= reduce.PACKED_MAX_SIZE and jnp.issubdtype(new.dtype, jnp.floating)
        waits = is_small and len(chosen) >= ABREAST
        leaf = jnp.where(stays | dependence.false_after(chosen[-ABREAST]) if waits else stays, old, new)
        chosen.extend([leaf] if is_small else [])
        return leaf

    return keep


def chosen_early(keep: Keep, update: Callable[..., Any], grads: Any, opt_state: Any, params: Any) -> Any:
    """Return the updates and the new state of an optimizer; its old state, and updates of no meaning, where that stays.

    Each leaf is chosen where the new one appears, and the updates are computed from what was chosen. Chosen afterwards,
    XLA computes the new leaf twice, once for the updates, and copies the old one for that: all moments in each step.
    """
    choices = [functools.partial(keep, leaf) for leaf in jax.tree.leaves(opt_state)]
    unchanged = [lambda update: update] * len(jax.tree.leaves(params))
    return dependence.with_results(update, (grads, opt_state, params), [*unchanged, *choices])


def chosen_afterwards(keep: Keep, update: Callable[..., Any], grads: Any, opt_state: Any, params: Any) -> Any:
    """Return what `chosen_early` does, in the order to which the bits of canonical steps belong."""
    updates, new_opt_state = update(grads, opt_state, params)
    return updates, jax.tree.map(keep, opt_state, new_opt_state)


def apply_averages(
    state: TrainState,
    averages: reduce.Averages,
    optimizer: optax.GradientTransformation,
    inputs: jax.Array | None = None,
    *,
    first: jax.Array | None = None,
    choose: Callable[..., Any] = chosen_early,
    keep_where: Callable[[jax.Array], Keep] = keep_at_once,
) -> tuple[TrainState, Metrics]:
    """Return the state after the update, and the step's metrics.

    Where the loss or a gradient is not finite the state stays as it was, so that the failure can be examined with
    the same params. `nonfinite_leaf` (int32) is then the first such leaf in tree order, or the number of
    leaves when the gradients are fine and the loss is not; otherwise it is negative. The state also stays where a
    number that the optimizer multiplies updates by is not finite, such as a learning rate (see `dependence.factors`):
    `nonfinite_leaf` is then the number of leaves and one. The state is marked by `~step` in place of its step. A step
    from a marked state leaves it alone, with a loss of NaN and a `nonfinite_leaf` of at least 0: a loop that looks only
    after several steps has lost nothing. `unmarked` gives the state to continue from.

    A batch in which nothing counts makes no update. The step is counted, the loss is NaN and `nonfinite_leaf` is
    EMPTY_BATCH.

    Under dynamic loss scaling (float16) an overflow is not an error while the scale can still fall: the optimizer
    skips that update and lowers the scale, and `nonfinite_leaf` is -1.

    `first` is what `first_nonfinite` returns, where it is known already. `choose` says when the optimizer's old state
    is kept, `chosen_early` or `chosen_afterwards`, and `keep_where` makes the choice of each leaf, `keep_at_once` or
    `keep_in_turn`. For `inputs` see `state.WithInputs`.
    """
    metrics_lib.check_names(averages.metrics)
    grads = jax.tree.map(lambda grad, param: grad.astype(param.dtype), averages.grads, state.params)
    first = first_nonfinite(averages) if first is None else first
    model_state, loss_scale = averages.model_state, precision.loss_scale(state.opt_state)
    if loss_scale is not None:
        # The optimizer skips the update, but statistics of activations that overflowed are kept out here.
        model_state = jax.tree.map(keep_at_once(first >= 0), state.model_state, model_state)
        excused = jnp.isfinite(averages.loss) & (loss_scale > precision.MIN_LOSS_SCALE)
        first = jnp.where(excused, -1, first)
    update = update_of(optimizer, state.step, inputs, averages.loss)
    if not (isinstance(optimizer, WithInputs) and optimizer.has_finite_rates):
        found = dependence.factors(update, grads, state.opt_state, state.params)
        for each in found:
            first = jnp.where((first == -1) & ~jnp.isfinite(each), len(jax.tree.leaves(grads)) + 1, first)
    marked = state.step < 0
    empty = averages.count == 0
    first = jnp.where(empty, EMPTY_BATCH, first)
    first = jnp.where(marked, jnp.maximum(first, 0), first)
    keep = keep_where((first >= 0) | empty)
    updates, opt_state = choose(keep, update, grads, state.opt_state, state.params)
    updated = (optax.apply_updates(state.params, updates), model_state)
    params, model_state = jax.tree.map(keep, (state.params, state.model_state), updated)
    next_step = jnp.where(first >= 0, jnp.where(marked, state.step, ~state.step), state.step + 1)
    loss = jnp.where(marked, jnp.nan, averages.loss)
    metrics = {"loss": loss, **averages.metrics, GRAD_NORM: averages.grad_norm, NONFINITE_LEAF: first}
    return TrainState(next_step, params, model_state, opt_state, state.key), metrics


def update_of(
    optimizer: optax.GradientTransformation, step: jax.Array, inputs: jax.Array | None, loss: jax.Array | None
) -> Callable[[Any, Any, Any], tuple[Any, Any]]:
    """Return `update(grads, opt_state, params)` of an optimizer after so many steps.

    For `step` and `inputs` see `state.WithInputs`. Any other optimizer that takes more than gradients is given `loss`,
    the mean over the whole batch, as `value`; that is optax's name. None: there is none to be given.
    """
    with_value = {} if loss is None else {"value": loss}
    extra = {"step": step, "inputs": inputs} if isinstance(optimizer, WithInputs) else with_value
    return functools.partial(optax.with_extra_args_support(optimizer).update, **extra)


def unmarked(state: TrainState) -> TrainState:
    """Return the state without the mark that a step which was not finite left on it (see `apply_averages`)."""
    return dataclasses.replace(state, step=jnp.where(state.step < 0, ~state.step, state.step))


def first_nonfinite(averages: reduce.Averages) -> jax.Array:
    """Return the index of the first gradient leaf with a non-finite value, num leaves for the loss alone, or -1."""
    values = [*jax.tree.leaves(averages.grads), averages.loss]
    bad = jnp.stack([_has_nonfinite(value) for value in values])
    return jnp.where(bad.any(), jnp.argmax(bad), -1).astype(jnp.int32)


def first_nonfinite_of_whole(averages: reduce.Averages) -> jax.Array:
    """Return `first_nonfinite` of gradients that each device has whole: small leaves are looked at as one vector.

    A small model's step consists of operations too short to be worth their own start: two for each leaf here.
    """
    leaves = jax.tree.leaves(averages.grads)
    small = [
        place for place, leaf in enumerate(leaves) if leaf.dtype == jnp.float32 and leaf.size <= reduce.PACKED_MAX_SIZE
    ]
    if not small:
        return first_nonfinite(averages)
    vector = jnp.concatenate([leaves[place].reshape(-1) for place in small])
    bits, full_exponent = _exponent_bits(vector)
    position = jnp.min(jnp.where(bits == full_exponent, jnp.arange(vector.size), vector.size))
    ends = np.cumsum([leaves[place].size for place in small])
    none = len(leaves) + 1
    found = [jnp.asarray([*small, none])[jnp.sum(position >= ends)]]
    others = [(place, leaf) for place, leaf in enumerate([*leaves, averages.loss]) if place not in set(small)]
    found += [jnp.where(_has_nonfinite(value), place, none) for place, value in others]
    first = jnp.min(jnp.stack(found))
    return jnp.where(first == none, -1, first).astype(jnp.int32)


def _has_nonfinite(value: jax.Array) -> jax.Array:
    """Return whether a value is infinite or NaN, the floats whose exponent bits are all ones.

    The largest of integers is the same in any order, so XLA vectorises it, where a sum of floats is one long chain of
    additions: a hundredth of a small step.
    """
    if jnp.iscomplexobj(value):
        return _has_nonfinite(value.real) | _has_nonfinite(value.imag)
    bits, full_exponent = _exponent_bits(value)
    return jnp.max(bits, initial=0) == full_exponent


def _exponent_bits(value: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the bits of the exponents, as unsigned integers, and those of an infinite one."""
    unsigned = jnp.dtype(f"uint{jnp.finfo(value.dtype).bits}")
    full_exponent = jax.lax.bitcast_convert_type(jnp.asarray(jnp.inf, value.dtype), unsigned)
    return jax.lax.bitcast_convert_type(value, unsigned) & full_exponent, full_exponent
