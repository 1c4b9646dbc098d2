"""Evaluation on the mesh that trains, exact on a ragged last batch: totals and counts, divided once at the end."""

import collections
import math
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import jax
from jax.sharding import Mesh

from jaxdist.spmd import canonical
from jaxdist.spmd import metrics as metrics_lib
from jaxdist.spmd.mesh import DATA_AXIS
from jaxdist.spmd.metrics import Batch, Mean

PyTree: TypeAlias = Any
EvalFn: TypeAlias = Callable[..., Any]
"""`eval_fn(params, batch, key[, model_state]) -> (loss, metrics)`; nothing random, model_state only read."""
EvalStep: TypeAlias = Callable[[PyTree, PyTree, Batch], dict[str, Mean]]
"""`eval_step(params, model_state, batch) -> {name: Mean over the true examples of the global batch}`."""

_AHEAD = 2
"""Batches being evaluated while the host goes on."""


def eval_step(eval_fn: EvalFn) -> EvalStep:
    """Return the jitted evaluation of one global batch; works with every layout of the params."""

    def step(params: PyTree, model_state: PyTree, batch: Batch) -> dict[str, Mean]:
        return _means(eval_fn, params, model_state, batch)

    return jax.jit(step)


def canonical_eval_step(eval_fn: EvalFn, mesh: Mesh, *, logical_shards: int, axis: str = DATA_AXIS) -> EvalStep:
    """Return an `eval_step` whose losses and metrics are bit-identical on every layout (see `canonical`)."""

    def shard_fn(shared: tuple[PyTree, PyTree], shard: Batch, index: jax.Array) -> dict[str, Mean]:
        del index
        return _means(eval_fn, *shared, shard)

    shard_sums = canonical.LogicalShardSums(shard_fn, mesh, logical_shards=logical_shards, axis=axis)

    finish = jax.jit(shard_sums.unravel)

    def step(params: PyTree, model_state: PyTree, batch: Batch) -> dict[str, Mean]:
        return finish(shard_sums((params, model_state), batch))

    return step


def evaluate(step: EvalStep, params: PyTree, model_state: PyTree, batches: Iterable[Batch]) -> dict[str, float]:
    """Return the mean of the loss and of each metric over all true examples of `batches`.

    Totals are added on the host in double precision and rounded once, so counts are exact integers and the result does
    not depend on how the examples were dealt to batches (up to the rounding inside each batch). A metric without any
    true example, or token, is NaN.

    Raises:
      ValueError: there was nothing to evaluate.
    """
    pending: collections.deque[dict[str, Mean]] = collections.deque()
    fetched: list[dict[str, Mean]] = []
    for batch in batches:
        pending.append(step(params, model_state, batch))
        # A few batches are on their way while the host places the next ones; without a bound all would be, at once.
        if len(pending) > _AHEAD:
            fetched.append(_fetch(pending.popleft()))
    fetched += [_fetch(part) for part in pending]
    if not fetched:
        raise ValueError("Evaluation needs at least one example; the evaluation source is empty.")
    return {name: _quotient([part[name] for part in fetched]) for name in fetched[0]}


def _fetch(part: dict[str, Mean]) -> dict[str, Mean]:
    # The result is replicated: this process's first replica is the whole of it, also where others hold more.
    return jax.device_get(jax.tree.map(lambda leaf: leaf.addressable_data(0), part))


def _quotient(means: list[Mean]) -> float:
    count = math.fsum(float(mean.count) for mean in means)
    return math.fsum(float(mean.total) for mean in means) / count if count else math.nan


def _means(eval_fn: EvalFn, params: PyTree, model_state: PyTree, batch: Batch) -> dict[str, Mean]:
    batch = metrics_lib.without_masked_rows(batch)
    # Evaluation is deterministic; loss functions that want a key all the same get a constant one.
    args = (params, batch, jax.random.key(0), *(() if model_state is None else (model_state,)))
    loss, metrics = eval_fn(*args)
    metrics_lib.check_names(metrics)
    results = {"loss": loss, **metrics}
    metrics_lib.check_averages(results, eval_fn, args)
    return {name: metrics_lib.as_mean(value, batch) for name, value in results.items()}
