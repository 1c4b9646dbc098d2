"""Precision: compute in a narrow dtype, keep params, optimizer and statistics in float32 (Micikevicius et al., 2018).

The one idea: a precision is two wrappers and no more. One casts the model's inputs and params;
differentiating through the cast gives float32 gradients of float32 params. The other, around the optimizer and for
float16 alone, holds the loss scale in opt_state, where the step finds it (`loss_scale`) and a checkpoint keeps it.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from jaxdist.spmd.metrics import Batch
from jaxdist.spmd.state import WithInputs

PyTree: TypeAlias = Any
LossFn: TypeAlias = Callable[..., Any]

Precision: TypeAlias = Literal["float32", "bfloat16", "float16"]

MIN_LOSS_SCALE = 1.0
"""Where the scale stops falling: gradients that are not finite even there are not caused by the scale."""

MAX_LOSS_SCALE = 2.0**24


def apply_precision(loss_fn: LossFn, precision: Precision, *, inputs: Sequence[str] = ()) -> LossFn:
    """Return `loss_fn`, computed in `precision`; it may be a loss_fn or an eval_fn, stateless or stateful.

    Floating params and the batch fields that the model computes with arrive in the compute dtype; targets and all other
    fields arrive as they are, because rounding a target changes the loss that is reported. model_state arrives as it is
    and keeps its dtypes. loss and metrics come back in float32, and so do gradients of float32 params.

    `inputs` are the batch fields that the model computes with.
    """
    _check_precision(precision)
    if precision == "float32":
        return loss_fn
    dtype = jnp.dtype(precision)

    @functools.wraps(loss_fn)
    def cast_loss_fn(params: PyTree, batch: Batch, key: jax.Array, *model_state: PyTree) -> tuple[Any, ...]:
        narrow = {name: cast_floating(field, dtype) if name in inputs else field for name, field in batch.items()}
        loss, metrics, *new_state = loss_fn(cast_floating(params, dtype), narrow, key, *model_state)
        if new_state:
            new_state = [with_dtypes_of(model_state[0], new_state[0])]
        return cast_floating(loss, jnp.float32), cast_floating(metrics, jnp.float32), *new_state

    return cast_loss_fn


def with_dtypes_of(old: PyTree, new: PyTree) -> PyTree:
    """Return `new` with the dtypes of `old`; return `new` unchanged where their structures differ."""
    structures: list[Any] = [jax.tree.structure(tree) for tree in (old, new)]
    if structures[0] != structures[1]:
        return new
    return jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), new, old)


def with_loss_scale(optimizer: optax.GradientTransformation, precision: Precision) -> optax.GradientTransformation:
    """Return the optimizer that `precision` needs: with dynamic loss scaling for float16, unchanged for the others.

    bfloat16 needs none, because it has the range of float32.
    """
    _check_precision(precision)
    return dynamic_loss_scale(optimizer) if precision == "float16" else optimizer


def cast_floating(tree: PyTree, dtype: jax.typing.DTypeLike) -> PyTree:
    """Return the tree with its floating leaves in `dtype`, the others (labels, tokens, keys) as they are."""

    def cast(leaf: Any) -> Any:
        return leaf.astype(dtype) if jnp.issubdtype(jnp.result_type(leaf), jnp.floating) else leaf

    return jax.tree.map(cast, tree)


class LossScaleState(NamedTuple):
    """The loss scale (float32), finite updates since it last changed and updates skipped so far (int32); scalars."""

    scale: jax.Array
    good_updates: jax.Array
    num_skipped: jax.Array
    inner: PyTree


def dynamic_loss_scale(
    inner: optax.GradientTransformation,
    *,
    initial_scale: float = 2.0**15,
    growth_interval: int = 2000,
    factor: float = 2.0,
) -> optax.GradientTransformation:
    """Return `inner` under dynamic loss scaling (Micikevicius et al., 2018).

    It takes gradients that are already divided by the scale and averaged over all devices, so that every replica
    decides the same. Where one is not finite the update is zero, `inner`'s state is unchanged and the scale is divided
    by `factor`; after `growth_interval` finite updates in a row it is multiplied. It stays within [MIN_LOSS_SCALE,
    MAX_LOSS_SCALE].

    Args:
      inner: the optimizer itself.
      initial_scale: a power of two, so that scaling rounds nothing. Too large costs a few skipped updates at the start.
      growth_interval: updates.
      factor: a power of two.

    Raises:
      ValueError: a setting out of its range.
    """
    if not MIN_LOSS_SCALE <= initial_scale <= MAX_LOSS_SCALE:
        raise ValueError(f"initial_scale must be in [{MIN_LOSS_SCALE}, {MAX_LOSS_SCALE}]; got {initial_scale}.")
    if growth_interval < 1 or not factor > 1:
        raise ValueError(f"growth_interval must be at least 1 and factor above 1; got {growth_interval} and {factor}.")

    def init(params: PyTree) -> LossScaleState:
        zero = jnp.zeros((), jnp.int32)
        return LossScaleState(jnp.asarray(initial_scale, jnp.float32), zero, jnp.zeros_like(zero), inner.init(params))

    inner_update = optax.with_extra_args_support(inner).update

    def update(
        grads: PyTree, state: LossScaleState, params: PyTree = None, **extra: Any
    ) -> tuple[PyTree, LossScaleState]:
        finite = jnp.stack([jnp.isfinite(grad).all() for grad in jax.tree.leaves(grads)]).all()
        updates, new_inner = inner_update(grads, state.inner, params, **extra)
        good_updates = jnp.where(finite, state.good_updates + 1, 0)
        grows = good_updates >= growth_interval
        raised = jnp.where(grows, jnp.minimum(state.scale * factor, MAX_LOSS_SCALE), state.scale)
        lowered = jnp.maximum(state.scale / factor, MIN_LOSS_SCALE)
        new_state = LossScaleState(
            scale=jnp.where(finite, raised, lowered),
            good_updates=jnp.where(grows, 0, good_updates),
            num_skipped=state.num_skipped + jnp.where(finite, 0, 1),
            inner=_choose(finite, new_inner, state.inner),
        )
        return _choose(finite, updates, jax.tree.map(jnp.zeros_like, updates)), new_state

    scaled = optax.GradientTransformationExtraArgs(init, update)
    return WithInputs.make(scaled, inner.inputs) if isinstance(inner, WithInputs) else scaled


def loss_scale(opt_state: PyTree) -> jax.Array | None:
    """Return the scale to multiply the next loss by, found anywhere in opt_state; None without loss scaling."""
    state = _find(opt_state)
    return None if state is None else state.scale


def num_skipped(opt_state: PyTree) -> jax.Array | None:
    """Return how many updates were skipped for gradients that were not finite; None without loss scaling."""
    state = _find(opt_state)
    return None if state is None else state.num_skipped


def _find(opt_state: PyTree) -> LossScaleState | None:
    nodes = jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, LossScaleState))
    return next((node for node in nodes if isinstance(node, LossScaleState)), None)


def _choose(condition: jax.Array, chosen: PyTree, otherwise: PyTree) -> PyTree:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), chosen, otherwise)


def _check_precision(precision: str) -> None:
    if precision not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"precision must be one of float32, bfloat16, float16; got {precision!r}.")
