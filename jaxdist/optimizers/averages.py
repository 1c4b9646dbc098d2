"""The moving average of the params, kept in the optimizer's state."""

from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

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
    found = [node for node in jax.tree.leaves(opt_state, is_leaf=_is_ema) if _is_ema(node)]
    return found[0].params if found else None


def _wide(param: jax.Array) -> Any:
    return jnp.promote_types(jnp.result_type(param), jnp.float32)


def _is_ema(node: Any) -> bool:
    return isinstance(node, EmaState)
