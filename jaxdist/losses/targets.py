"""What losses read from a batch, with checks: targets, and how much each example counts."""

from collections.abc import Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from jaxdist.spmd.metrics import Batch, Weighted

Values: TypeAlias = jax.Array | Weighted
"""Per example (B,) or per token (B, T), not averaged; or the same with weights."""


def integers(batch: Batch, field: str, *, needed_by: str) -> jax.Array:
    """Return the integers of a field."""
    values = field_of(batch, field, needed_by=needed_by)
    if not jnp.issubdtype(values.dtype, jnp.integer):
        raise ValueError(f"{needed_by} needs integers in batch[{field!r}]; got {values.dtype}.")
    return values


def like_outputs(outputs: jax.Array, batch: Batch, field: str, *, needed_by: str) -> tuple[jax.Array, jax.Array]:
    """Return outputs and the field's values as float32; raise ValueError unless both have the same shape."""
    values = field_of(batch, field, needed_by=needed_by)
    if values.shape != outputs.shape:
        raise ValueError(
            f"{needed_by} needs outputs and batch[{field!r}] of the same shape, because (B, 1) and (B,) would "
            f"broadcast to (B, B); got {outputs.shape} and {values.shape}. Reshape one of them."
        )
    check_real("the model's output", outputs, needed_by=needed_by)
    check_real(f"batch[{field!r}]", values, needed_by=needed_by)
    return outputs.astype(jnp.float32), values.astype(jnp.float32)


def check_real(name: str, values: jax.Array, *, needed_by: str) -> None:
    """Raise ValueError for complex numbers, whose imaginary part would be dropped."""
    if jnp.iscomplexobj(values):
        raise ValueError(
            f"{needed_by} needs real numbers, but {name} has the dtype {values.dtype}. Give it real ones, for example "
            "the absolute value, or real and imaginary part side by side."
        )


def field_of(batch: Mapping[str, Any], field: str, *, needed_by: str) -> jax.Array:
    """Return a field of the batch."""
    if field not in batch:
        raise ValueError(f"{needed_by} needs the batch field {field!r}, but the batch has {sorted(batch)}.")
    values: jax.Array = batch[field]
    return values


def counted(values: jax.Array, *weights: jax.Array | None) -> Values:
    """Return `values` weighted by the product of `weights`, whose shapes are leading parts of the shape of `values`.

    A mean of them is divided by the sum of the weights. A negative weight gives NaN.
    """
    given = [each.astype(jnp.float32) for each in weights if each is not None]
    if not given:
        return values
    product = jnp.ones(values.shape, jnp.float32)
    for each in given:
        product = product * each.reshape(each.shape + (1,) * (values.ndim - each.ndim))
    return Weighted(values, jnp.where(product < 0, jnp.nan, product))


def weights_of(batch: Batch, field: str | None, *, needed_by: str) -> jax.Array | None:
    """Return the field with the weights of the examples; None if `field` is None."""
    return None if field is None else field_of(batch, field, needed_by=needed_by)
