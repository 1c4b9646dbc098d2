"""Evaluation on the mesh that trains, exact on a ragged last batch.

Means are totals and counts, divided once at the end. Metrics that are not means are computed on the host from a row
for each example: the rows are gathered from all devices and processes, in the order of the examples.
"""

import collections
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxdist.spmd import group_program, reduce
from jaxdist.spmd import metrics as metrics_lib
from jaxdist.spmd.canonical import group_sums, shard_sums, state_update
from jaxdist.spmd.mesh import DATA_AXIS
from jaxdist.spmd.metrics import Batch, Mean

PyTree: TypeAlias = Any
EvalFn: TypeAlias = Callable[..., Any]
"""`eval_fn(params, batch, key[, model_state]) -> (loss, metrics)`; nothing random, model_state only read."""
EvalStep: TypeAlias = Callable[[PyTree, PyTree, Batch], dict[str, Mean]]
"""`eval_step(params, model_state, batch) -> {name: Mean over the true examples of the global batch}`."""
CollectFn: TypeAlias = Callable[[PyTree, PyTree, Batch], PyTree]
"""`collect_fn(params, model_state, batch) -> rows`: a tree of arrays, each with a row for each example."""
CollectStep: TypeAlias = Callable[[PyTree, PyTree, Batch], tuple[PyTree, jax.Array]]
"""`collect_step(params, model_state, batch) -> (rows, counts)`, replicated; `counts` says which rows are examples."""

StepWithRows: TypeAlias = Callable[[PyTree, PyTree, Batch], tuple[dict[str, Mean], tuple[PyTree, jax.Array]]]
"""An EvalStep and a CollectStep in one."""

_AHEAD = 2
"""Batches being evaluated while the host continues."""


def eval_step(eval_fn: EvalFn) -> EvalStep:
    """Return the jitted evaluation of one global batch; works with every layout of the params."""

    def step(params: PyTree, model_state: PyTree, batch: Batch) -> dict[str, Mean]:
        return _means(eval_fn, params, model_state, batch)

    return jax.jit(step)


def canonical_eval_step(
    eval_fn: EvalFn, mesh: Mesh, *, logical_shards: int, axes: Sequence[str] = (DATA_AXIS,)
) -> EvalStep:
    """Return an `eval_step` whose losses and metrics are bit-identical on every layout (see `canonical`)."""

    def shard_fn(shared: tuple[PyTree, PyTree], shard: Batch, index: jax.Array) -> dict[str, Mean]:
        del index
        return _means(eval_fn, *shared, shard)

    sums = _summing(shard_fn, mesh, logical_shards, axes)
    return lambda params, model_state, batch: sums((params, model_state), batch)


def collect_step(collect_fn: CollectFn, mesh: Mesh | None = None) -> CollectStep:
    """Return the jitted collection of a global batch's rows; a mesh has them gathered from all its devices."""

    def step(params: PyTree, model_state: PyTree, batch: Batch) -> tuple[PyTree, jax.Array]:
        found = collect_fn(params, model_state, metrics_lib.without_masked_rows(batch)), metrics_lib.counted_rows(batch)
        return found if mesh is None else jax.lax.with_sharding_constraint(found, NamedSharding(mesh, PartitionSpec()))

    return jax.jit(step)


def canonical_collect_step(
    collect_fn: CollectFn, mesh: Mesh, *, logical_shards: int, axes: Sequence[str] = (DATA_AXIS,)
) -> CollectStep:
    """Return a `collect_step` whose rows are bit-identical on every layout (see `canonical`).

    Each logical shard gives its own rows and zeros in place of all others, so the sum over the shards is all rows.
    """
    dtypes: list[PyTree] = []  # known after the first call, as `unravel` is

    def shard_fn(shared: tuple[PyTree, PyTree], shard: Batch, index: jax.Array) -> PyTree:
        found = collect_fn(*shared, metrics_lib.without_masked_rows(shard)), metrics_lib.counted_rows(shard)
        dtypes[:] = [jax.tree.map(lambda leaf: leaf.dtype, found)]
        apart = jax.tree.map(reduce.addable, found)
        return jax.tree.map(
            lambda leaf: jnp.zeros((logical_shards, *leaf.shape), leaf.dtype).at[index].set(leaf), apart
        )

    sums = _summing(shard_fn, mesh, logical_shards, axes)

    def rows_of(leaf: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
        rows = jax.vmap(lambda shard: reduce.from_addable(shard, dtype))(leaf)
        return rows.reshape(-1, *rows.shape[2:])

    finish = jax.jit(lambda found: jax.tree.map(rows_of, found, dtypes[0]))

    def step(params: PyTree, model_state: PyTree, batch: Batch) -> tuple[PyTree, jax.Array]:
        found: tuple[PyTree, jax.Array] = finish(sums((params, model_state), batch))
        return found

    return step


def _summing(
    shard_fn: shard_sums.ShardFn, mesh: Mesh, logical_shards: int, axes: Sequence[str]
) -> Callable[[PyTree, Batch], PyTree]:
    """Return the canonical sums of `shard_fn` over a global batch, given params and model_state in any layout."""
    if group_program.group_axes(mesh, axes):
        of_groups = group_sums.GroupSums(shard_fn, mesh, logical_shards=logical_shards, axes=axes)
        return lambda shared, batch: of_groups(shared, batch)[0]
    sums = shard_sums.LogicalShardSums(shard_fn, mesh, logical_shards=logical_shards, axes=axes)
    finish, whole = jax.jit(sums.unravel), state_update.gathering(mesh)
    return lambda shared, batch: finish(sums(whole(shared), batch))


def step_with_rows(eval_step: EvalStep, collect_step: CollectStep) -> StepWithRows:
    """Return one program of two jitted steps, in which the compiler computes the model once and not twice."""

    def step(params: PyTree, model_state: PyTree, batch: Batch) -> Any:
        return eval_step(params, model_state, batch), collect_step(params, model_state, batch)

    return jax.jit(step)


class Collecting(NamedTuple):
    """Metrics of an evaluation that are not means: `compute(rows) -> {name: value}`, given NumPy arrays.

    `step` takes the place of the evaluation's own.
    """

    step: StepWithRows
    compute: Callable[[PyTree], dict[str, float]]


def evaluate(
    step: EvalStep,
    params: PyTree,
    model_state: PyTree,
    batches: Iterable[Batch],
    collecting: Collecting | None = None,
) -> dict[str, float]:
    """Return the mean of the loss and of each metric over all true examples of `batches`, and the collected metrics.

    Totals are added on the host in double precision and rounded once, so counts are exact integers and the result does
    not depend on how the examples are divided into batches (up to the rounding inside each batch). A metric without any
    true example, or token, is NaN.

    Raises:
      ValueError: there was nothing to evaluate.
    """
    pending: collections.deque[Any] = collections.deque()
    fetched: list[Any] = []
    for batch in batches:
        args = params, model_state, batch
        pending.append((step(*args), None) if collecting is None else collecting.step(*args))
        # A few batches are computed while the host places the next ones; without this bound, all would be at once.
        if len(pending) > _AHEAD:
            fetched.append(_fetch(pending.popleft()))
    fetched += [_fetch(part) for part in pending]
    if not fetched:
        raise ValueError("Evaluation needs at least one example; the evaluation source is empty.")
    means = [part for part, _ in fetched]
    found = {name: _quotient([part[name] for part in means]) for name in means[0]}
    return found if collecting is None else found | collecting.compute(_true_rows([rows for _, rows in fetched]))


def _true_rows(parts: list[tuple[PyTree, np.ndarray]]) -> PyTree:
    """Return the rows of all true examples, in order."""
    chosen = [jax.tree.map(lambda leaf, counts=counts: leaf[counts], rows) for rows, counts in parts]
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *chosen)


def _fetch(part: Any) -> Any:
    # The result is replicated, so this process's first replica is all of it.
    return jax.device_get(jax.tree.map(lambda leaf: leaf.addressable_data(0), part))


def _quotient(means: list[Mean]) -> float:
    count = math.fsum(float(mean.count) for mean in means)
    return math.fsum(float(mean.total) for mean in means) / count if count else math.nan


def _means(eval_fn: EvalFn, params: PyTree, model_state: PyTree, batch: Batch) -> dict[str, Mean]:
    batch = metrics_lib.without_masked_rows(batch)
    # Evaluation is deterministic; loss functions that take a key nevertheless get a constant one.
    args = (params, batch, jax.random.key(0), *(() if model_state is None else (model_state,)))
    found = eval_fn(*metrics_lib.unshared(args))
    if not isinstance(found, tuple) or isinstance(found, Mean) or len(found) != 2:
        raise ValueError(f"eval_fn must return (loss, metrics); it returned {type(found).__name__}.")
    loss, metrics = found
    metrics_lib.check_mapping(metrics, "eval_fn")
    metrics_lib.check_names(metrics)
    results = {"loss": loss, **metrics}
    metrics_lib.check_averages(results, eval_fn, args)
    return {name: metrics_lib.as_mean(value, batch) for name, value in results.items()}
