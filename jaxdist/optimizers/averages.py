"""The params that a trained model is used with, where the optimizer's state holds an average of those it trained."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from optax import contrib

PyTree: TypeAlias = Any


class EmaState(NamedTuple):
    """The average, at least float32 and shaped like the params, and how many updates it has seen (int32 scalar)."""

    num_updates: jax.Array
    params: PyTree


def ema(decay: float) -> optax.GradientTransformation:
    """Return a transformation, the last of a chain, that leaves updates unchanged and averages the params that result
    from them.

    After n updates the decay is min(decay, (1 + n) / (10 + n)), so that a short run's average is not its first params
    (the rule of TensorFlow's ExponentialMovingAverage).
    """

    def init(params: PyTree) -> EmaState:
        return EmaState(jnp.zeros((), jnp.int32), jax.tree.map(lambda param: jnp.array(param, _wide(param)), params))

    def update(updates: PyTree, state: EmaState, params: PyTree = None) -> tuple[PyTree, EmaState]:
        if params is None:
            raise ValueError("The average of params needs them: call optimizer.update(grads, opt_state, params).")
        count = optax.safe_increment(state.num_updates)
        new_weight = 1 - jnp.minimum(decay, (1 + count) / (10 + count))
        average = jax.tree.map(
            lambda old, new: old + new_weight * (new.astype(old.dtype) - old),
            state.params,
            optax.apply_updates(params, updates),
        )
        return updates, EmaState(count, average)

    return optax.GradientTransformation(init, update)


def ema_params(opt_state: PyTree) -> PyTree | None:
    """Return the averaged params of `ema`, at least float32, wherever it is in the optimizer; None if it has none."""
    found = [node for node in _averages(opt_state) if isinstance(node, EmaState)]
    return found[0].params if found else None


def keeps_average(opt_state: PyTree) -> bool:
    """Return whether `params_in_use` are others than the params that are trained."""
    return bool(_averages(opt_state))


def params_in_use(params: PyTree, opt_state: PyTree) -> PyTree:
    """Return the params that a trained model is used with.

    These are the averages of `ema` or of optax.contrib.schedule_free, wherever that is in the optimizer. Params
    without an average, such as those that optax.masked leaves out, are used as they were trained.
    """
    for node in _averages(opt_state):
        if isinstance(node, EmaState):
            params = _where_averaged(lambda average, _: average, node.params, params)
        else:
            params = _where_averaged(functools.partial(_of_schedule_free, node.b1), node.z, params)
    return params


def schedule_free_average(y: Any, z: Any, b1: Any) -> Any:
    """Return the average x of optax.contrib.schedule_free, of which the params y that it trains are b1 x + (1 - b1) z.

    Written with one operation a time, outside jit it has the same bits for arrays and for their shards.
    """
    return (y - (1.0 - b1) * z) / b1


def _of_schedule_free(b1: Any, z: Any, y: Any) -> Any:
    return schedule_free_average(y, z, b1)


def _where_averaged(function: Callable[[Any, Any], Any], averages: PyTree, params: PyTree) -> PyTree:
    """Return `function(average, param)` for params that have an average, and the others as they are."""

    def choose(average: Any, param: Any) -> Any:
        return param if isinstance(average, optax.MaskedNode) else function(average, param)

    return jax.tree.map(choose, averages, params, is_leaf=lambda node: isinstance(node, optax.MaskedNode))


def _averages(opt_state: PyTree) -> list[Any]:
    def is_average(node: Any) -> bool:
        return isinstance(node, EmaState | contrib.ScheduleFreeState)

    return [node for node in jax.tree.leaves(opt_state, is_leaf=is_average) if is_average(node)]


def _wide(param: jax.Array) -> Any:
    return jnp.promote_types(jnp.result_type(param), jnp.float32)
