"""Averages as totals and counts: means of unequal parts are exact only when the counts travel with the totals."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from jaxdist.spmd.dependence import depends

Batch: TypeAlias = Mapping[str, jax.Array]
"""A flat dict of arrays that share their leading dim (examples); `"mask"`, where present, is 1 for a true example."""

MASK = "mask"
"""The package's own field: which rows count. A source's field of this name is refused."""

SEGMENT_IDS = "segment_ids"
"""The field of packed rows that numbers the examples of a row from 1; 0 is padding."""

OWN_NAMES = frozenset({"loss", "learning_rate", "grad_norm", "nonfinite_leaf", "empty_batches"})
"""Metrics that the package itself reports, in training or in evaluation."""


class Mean(NamedTuple):
    """A mean as a sum that can still be added to others: both fields are scalars, float32."""

    total: jax.Array
    count: jax.Array  # type: ignore[assignment]  # hides tuple.count, which has no use on a mean

    @property
    def value(self) -> jax.Array:
        """The mean, NaN where nothing was counted."""
        return self.total / self.count


class Weighted(NamedTuple):
    """Values and their weights: their mean is the sum of values x weights over the sum of weights.

    `weights` (at least 0) has the shape of `values`, or of a leading part of it.
    """

    values: jax.Array
    weights: jax.Array


class ShapeError(ValueError):
    """Values of a loss have a shape that does not go with the mask."""


def masked_mean(values: jax.Array | Weighted, mask: jax.Array | None = None) -> Mean:
    """Return the Mean over the true examples of `values`.

    Args:
      values: per-example (or per-token) values, shape (examples, ...), or the same with weights.
      mask: shape of a leading part of `values`' shape, for example (examples,); 1 (or True) for what counts. None
        counts everything.

    Raises:
      ShapeError: another dim of the values is the number of examples, too, which only shows when that is symbolic.
    """
    if isinstance(values, Weighted):
        values, weights = values
        mask = weights if mask is None else _like(weights, values) * _like(mask, values)
    values = values.astype(jnp.float32)
    if mask is None:
        return Mean(values.sum(), jnp.float32(values.size))
    mask = _like(mask, values)
    # where, not a product: a padding row may hold a NaN, and NaN * 0 is NaN.
    return Mean(jnp.where(mask > 0, values * mask, 0.0).sum(), mask.sum())


def _like(mask: jax.Array, values: jax.Array) -> jax.Array:
    """Return a mask of a leading part of the values' shape as float32 of the whole shape."""
    examples = mask.shape[0]
    if not isinstance(examples, int) and examples in values.shape[1:]:
        raise ShapeError(
            f"The values of a mean are per example (B,) or per token (B, T), but got the shape {values.shape}, where "
            f"{examples} is the number of examples. Two shapes such as (B, 1) and (B,) broadcast to (B, B): give "
            "outputs and target the same shape."
        )
    mask = mask.astype(jnp.float32).reshape(mask.shape + (1,) * (values.ndim - mask.ndim))
    return jnp.broadcast_to(mask, values.shape)


def without_masked_rows(batch: Batch) -> Batch:
    """Return the batch with every row that does not count replaced by a copy of the first row that does.

    The mask is unchanged. A mask over the values alone keeps a masked row out of the loss, but not out of its gradient:
    where the row produces an infinity or a NaN in between, its zero cotangent becomes NaN. So the model's inputs are
    replaced here. A batch in which no row counts is returned unchanged.
    """
    if MASK not in batch:
        return batch
    counts = counted_rows(batch)
    first = jnp.argmax(counts)

    def fill(field: jax.Array) -> jax.Array:
        row = jax.lax.dynamic_index_in_dim(field, first, keepdims=True)
        return jnp.where(counts.reshape(-1, *[1] * (field.ndim - 1)), field, row)

    return {name: field if name == MASK else fill(field) for name, field in batch.items()}


def unshared(tree: Any) -> Any:
    """Return the tree in dicts and lists of its own, for a function of the user.

    What that writes into them, or takes out of them, is then not seen by others that use the same batch or outputs.
    """
    if type(tree) is dict:
        return {name: unshared(each) for name, each in tree.items()}  # in its order, in which a function may add
    if type(tree) in (list, tuple):
        return type(tree)(map(unshared, tree))
    return tree


def counted_rows(batch: Batch) -> jax.Array:
    """Return which rows of the batch count, bools of shape (B,): of a row of tokens, whether any of them does."""
    if MASK not in batch:
        return jnp.ones(jax.tree.leaves(batch)[0].shape[0], bool)
    mask = batch[MASK]
    return (mask if mask.ndim == 1 else mask.reshape(mask.shape[0], -1).max(axis=1)) > 0


def num_examples(batch: Batch) -> jax.Array:
    """Return the number of true examples in `batch`, float32: the sum of its mask, or its leading dim."""
    if MASK in batch:
        return batch[MASK].astype(jnp.float32).sum()
    return jnp.float32(jax.tree.leaves(batch)[0].shape[0])


def check_mapping(metrics: Any, function: str) -> None:
    """Raise ValueError where what `function` returned as its metrics has no names."""
    if not isinstance(metrics, Mapping):
        raise ValueError(f"{function} returns its metrics as a dict by name; it returned {type(metrics).__name__}.")


def check_names(metrics: Mapping[str, Any]) -> None:
    """Raise ValueError where a loss_fn or an eval_fn gives a metric one of the package's own names."""
    clash = sorted(OWN_NAMES & set(metrics))
    if clash:
        raise ValueError(
            f"The names {', '.join(sorted(OWN_NAMES))} are the package's own and cannot be metrics of a loss or an "
            f"eval_fn; got {', '.join(clash)}. Rename it."
        )


def check_averages(results: Mapping[str, Any], loss_fn: Callable[..., Any], args: Sequence[Any]) -> None:
    """Check what a loss_fn or eval_fn returned: averages, none of which counts rows that the mask leaves out.

    A plain scalar is trusted to be a mean over the true examples. One that depends on the rows of the batch and not on
    its mask cannot be. To find out, the function is traced a second time; a Mean needs no such check.

    `args` are what the function was called with; the second is the batch.

    Raises:
      ValueError: a result is neither a scalar nor a Mean, is not floating, or counts rows of padding.
    """
    plain = {name: value for name, value in results.items() if not isinstance(value, Mean)}
    for name, value in plain.items():
        if jnp.ndim(value) != 0:
            raise ValueError(
                f"A loss_fn returns averages, but {name!r} has shape {jnp.shape(value)}; return "
                "jaxdist.masked_mean(values, batch['mask'])."
            )
    loss = results["loss"].total if isinstance(results["loss"], Mean) else results["loss"]
    if not jnp.issubdtype(jnp.result_type(loss), jnp.floating):
        raise ValueError(f"A loss must be a real floating number; got {jnp.result_type(loss)}. Return its real value.")
    check_rows_left_out(plain, loss_fn, args)


def check_rows_left_out(results: Mapping[str, Any], function: Callable[..., Any], args: Sequence[Any]) -> None:
    """Check that no average counts rows that the batch's mask leaves out; the function is traced once more.

    A scalar, or the total of a Mean, that depends on the rows of the batch and not on its mask counts all of them. So
    does a Mean whose count does not depend on the mask; where its total depends on the mask alone, it is a sum.

    `args` are arrays or descriptions of arrays; the second is a dict of fields with the mask.

    Raises:
      ValueError: an average counts rows of padding.
    """
    if not results or MASK not in args[1]:
        return
    on_rows, on_mask = (_dependence(function, args, is_mask=is_mask) for is_mask in (False, True))
    for name, value in results.items():
        rows, mask = on_rows[name], on_mask[name]
        if not (rows.total or mask.total if isinstance(value, Mean) else rows) or all(jax.tree.leaves(mask)):
            continue
        what = "total or count of the Mean" if isinstance(value, Mean) else "the scalar"
        raise ValueError(
            f"Rows of padding, which the batch's field {MASK!r} marks, must not count, but {what} {name!r} "
            f"does not depend on it. Return jaxdist.masked_mean(values, batch[{MASK!r}]), which counts true rows."
        )


def _dependence(function: Callable[..., Any], args: Sequence[Any], *, is_mask: bool) -> dict[str, Any]:
    """Return, by name, whether the loss and each metric depend on the mask, or on any other field of the batch."""
    marked: list[Any] = [jax.tree.map(lambda _: False, arg) for arg in args]
    marked[1] = {
        name: jax.tree.map(lambda _, found=(name == MASK) == is_mask: found, field) for name, field in args[1].items()
    }
    loss, found, *_ = depends(function, args, marked)
    return {"loss": loss, **found}


def as_mean(value: jax.Array | Mean, batch: Batch) -> Mean:
    """Return `value` as a Mean; a plain scalar is a mean over the true examples of `batch`."""
    if isinstance(value, Mean):
        return Mean(*map(jnp.asarray, value))
    value, count = jnp.asarray(value), num_examples(batch)
    return Mean(jnp.where(count > 0, value.astype(jnp.float32) * count, 0.0), count)
