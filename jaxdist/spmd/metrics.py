"""Averages as totals and counts: means of unequal parts are exact only when the counts travel with the totals."""

from collections.abc import Mapping
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

Batch: TypeAlias = Mapping[str, jax.Array]
"""A flat dict of arrays that share their leading dim (examples); `"mask"`, where present, is 1 for a true example."""

MASK = "mask"


class Mean(NamedTuple):
    """A mean that can still be added up: both fields are scalars, float32."""

    total: jax.Array
    count: jax.Array  # type: ignore[assignment]  # hides tuple.count, which nobody asks of a mean

    @property
    def value(self) -> jax.Array:
        """The mean, NaN where nothing was counted."""
        return self.total / self.count


def masked_mean(values: jax.Array, mask: jax.Array | None = None) -> Mean:
    """Return the Mean over the true examples of `values`.

    Args:
      values: per-example (or per-token) values, shape (examples, ...).
      mask: shape of a leading part of `values`' shape, (examples,) say; 1 (or True) for what counts. None counts all.
    """
    values = values.astype(jnp.float32)
    if mask is None:
        return Mean(values.sum(), jnp.float32(values.size))
    mask = mask.astype(jnp.float32).reshape(mask.shape + (1,) * (values.ndim - mask.ndim))
    mask = jnp.broadcast_to(mask, values.shape)
    # where, not a product: a padding row may hold a NaN, and NaN * 0 is NaN.
    return Mean(jnp.where(mask > 0, values * mask, 0.0).sum(), mask.sum())


def num_examples(batch: Batch) -> jax.Array:
    """Return the number of true examples in `batch`, float32: the sum of its mask, or its leading dim."""
    if MASK in batch:
        return batch[MASK].astype(jnp.float32).sum()
    return jnp.float32(jax.tree.leaves(batch)[0].shape[0])


def as_mean(value: jax.Array | Mean, batch: Batch) -> Mean:
    """Return `value` as a Mean; a plain scalar is a mean over the true examples of `batch`."""
    if isinstance(value, Mean):
        return value
    count = num_examples(batch)
    return Mean(jnp.where(count > 0, value.astype(jnp.float32) * count, 0.0), count)
