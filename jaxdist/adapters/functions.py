"""What a training run needs of a model, as functions of arrays alone.

A module's `forward`, which one of the adapters makes, and a loss become loss_fn, eval_fn and predict_fn here, for
models with a state beside their params and for those without.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from jaxdist.spmd import precision as precisions
from jaxdist.spmd.metrics import MASK, SEGMENT_IDS, Batch, Mean, Weighted, masked_mean, unshared
from jaxdist.spmd.precision import Precision

PyTree: TypeAlias = Any


Values: TypeAlias = jax.Array | Weighted | Mean
"""Per example (B,) or per token (B, T), not averaged; with weights; or a mean whose count the loss knows itself."""


Loss: TypeAlias = Callable[[Any, Batch], tuple[Values, dict[str, Values]]]
"""`loss(outputs, batch) -> (values, {name: values})`."""


Forward: TypeAlias = Callable[..., tuple[Any, PyTree]]
"""`forward(params, model_state, batch, key, train=bool) -> (outputs, new model_state)`; no state is None."""


class Functions(NamedTuple):
    """What a training run needs of a model.

    For a stateless model (no batch statistics or the like):
      init_fn(key) -> params; loss_fn and eval_fn: (params, batch, key) -> (loss, metrics).
    For a stateful one:
      init_fn(key) -> (params, model_state);
      loss_fn(params, batch, key, model_state) -> (loss, metrics, new model_state);
      eval_fn(params, batch, key, model_state) -> (loss, metrics).
    predict_fn(params, batch[, model_state]) -> outputs, a row for each example; None where it is not given.
    loss is a Mean over the true examples (or tokens) of the batch, metrics a flat dict of such.
    """

    init_fn: Callable[..., Any]
    loss_fn: Callable[..., Any]
    eval_fn: Callable[..., Any]
    predict_fn: Callable[..., Any] | None = None


def make_functions(
    init: Callable[[jax.Array], tuple[PyTree, PyTree]], forward: Forward, loss: Loss, *, stateful: bool
) -> Functions:
    """Return the functions of a module from what creates its variables, what calls it, and its loss."""

    def loss_stateless(params: PyTree, batch: Batch, key: jax.Array) -> tuple[Mean, dict[str, Mean]]:
        outputs, _ = forward(params, None, batch, key, train=True)
        return _average(loss, outputs, batch)

    def eval_stateless(params: PyTree, batch: Batch, key: jax.Array) -> tuple[Mean, dict[str, Mean]]:
        outputs, _ = forward(params, None, batch, key, train=False)
        return _average(loss, outputs, batch)

    def loss_stateful(
        params: PyTree, batch: Batch, key: jax.Array, model_state: PyTree
    ) -> tuple[Mean, dict[str, Mean], PyTree]:
        outputs, new_state = forward(params, model_state, batch, key, train=True)
        return *_average(loss, outputs, batch), _keep_if_empty(batch, new_state, model_state)

    def eval_stateful(
        params: PyTree, batch: Batch, key: jax.Array, model_state: PyTree
    ) -> tuple[Mean, dict[str, Mean]]:
        outputs, _ = forward(params, model_state, batch, key, train=False)
        return _average(loss, outputs, batch)

    def predict(params: PyTree, batch: Batch, model_state: PyTree = None) -> Any:
        return forward(params, model_state, batch, jax.random.key(0), train=False)[0]

    if stateful:
        return Functions(init, loss_stateful, eval_stateful, predict)
    return Functions(lambda key: init(key)[0], loss_stateless, eval_stateless, predict)


def in_precision(forward: Forward, precision: Precision) -> Forward:
    """Return `forward` computed in `precision`; outputs come back in float32, and statistics keep their dtypes."""
    if precision == "float32":
        return forward
    dtype = jnp.dtype(precision)

    def narrow(params: PyTree, model_state: PyTree, batch: Batch, key: jax.Array, *, train: bool) -> tuple[Any, PyTree]:
        fields = {
            name: field if name == MASK else precisions.cast_floating(field, dtype) for name, field in batch.items()
        }
        params = precisions.cast_floating(params, dtype)
        outputs, new_state = forward(params, model_state, fields, key, train=train)
        outputs = precisions.cast_floating(outputs, jnp.float32)
        return outputs, precisions.with_dtypes_of(model_state or {}, new_state)

    return narrow


def switches(accepted: Mapping[str, Any], batch: Batch, train: bool) -> dict[str, Any]:
    """Return `train`, `mask` (B,) and `segment_ids` for a module that takes them.

    Every row counts where the batch has no mask, and in one of padding: statistics over no rows would be NaN, and a
    NaN activation makes NaN gradients even where the loss is masked out.
    """
    switches: dict[str, Any] = {"train": train} if "train" in accepted else {}
    if "mask" in accepted:
        rows = next(iter(batch.values())).shape[:1]
        given = _mask_of(rows, batch.get(MASK))
        mask = jnp.ones(rows, bool) if given is None else given > 0
        switches["mask"] = mask | ~mask.any()
    if SEGMENT_IDS in accepted and SEGMENT_IDS in batch:
        switches[SEGMENT_IDS] = batch[SEGMENT_IDS]
    return switches


def _average(loss: Loss, outputs: Any, batch: Batch) -> tuple[Mean, dict[str, Mean]]:
    values, metrics = loss(*unshared((outputs, batch)))
    mask = batch.get(MASK)

    def average(name: str, each: Values) -> Mean:
        refuse_scalar(name, each)
        return each if isinstance(each, Mean) else masked_mean(each, _mask_of(shape_of(each), mask))

    return average("loss", values), {name: average(name, each) for name, each in metrics.items()}


def refuse_scalar(name: str, values: Values) -> None:
    """Raise ValueError where the loss or the metric `name` is one number for the whole batch."""
    if not isinstance(values, Mean) and not shape_of(values):
        raise ValueError(
            f"The loss passed to an adapter gives one value per example or token, but {name!r} is a scalar; "
            "return the values before averaging, so that padding rows can be left out."
        )


def _mask_of(shape: tuple[int, ...], mask: jax.Array | None) -> jax.Array | None:
    """Return the batch's mask for values of this shape: that of its rows, where its elements are of another shape."""
    if mask is None or mask.shape == shape[: mask.ndim]:
        return mask
    return mask.reshape(mask.shape[0], -1).max(axis=1)


def shape_of(values: Any) -> tuple[int, ...]:
    """Return the shape of a loss's values, weighted or not."""
    return (values.values if isinstance(values, Weighted) else values).shape


def _keep_if_empty(batch: Batch, new_state: PyTree, old_state: PyTree) -> PyTree:
    """Return `new_state`, or `old_state` where the batch holds padding only: there is nothing to learn from."""
    if MASK not in batch:
        return new_state
    any_true = (batch[MASK] > 0).any()

    def keep(new: jax.Array, old: jax.Array) -> jax.Array:
        return old if new is old else jnp.where(any_true, new, old)  # `reduce.changed` looks for the very object

    return jax.tree.map(keep, new_state, old_state)
