"""Losses that give one value per example or per token, so that the mean over a batch can weigh every one exactly.

Each is `loss(outputs, batch) -> (values, metrics)`, the form that `jaxdist.adapters` takes: `values` is what training
minimises, `metrics` maps a name to values of the same shape. Nothing is averaged here. Logits may have any float dtype;
everything is computed in float32, because a sum over many classes in bfloat16 loses the small ones.
"""

import math
from typing import TypeAlias

import jax
import jax.numpy as jnp
import optax

from jaxdist.spmd.metrics import MASK, SEGMENT_IDS, Batch, Weighted

Values: TypeAlias = jax.Array | Weighted


def classification(outputs: jax.Array, batch: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Return softmax cross entropy in nats and the metric `accuracy` (1 or 0), both float32 of shape (B,).

    The cross entropy is NaN where a label is none of the classes.

    Args:
      outputs: logits, shape (B, classes).
      batch: holds `label`, integers of shape (B,).
    """
    labels = _integers(batch, "label", needed_by="classification")
    if outputs.ndim != 2 or labels.shape != outputs.shape[:1]:
        raise ValueError(
            f"classification needs logits (B, classes) and labels (B,), but got {outputs.shape} and {labels.shape}; "
            "labels are class indices, not one-hot rows."
        )
    values = _cross_entropy(outputs, labels)
    return values, {"accuracy": (outputs.argmax(axis=-1) == labels).astype(jnp.float32)}


def next_token(outputs: jax.Array, batch: Batch) -> tuple[Values, dict[str, Values]]:
    """Return the cross entropy in nats of each next token and the metric `bits_per_byte`, both float32 (B, T - 1).

    The logits at position t are scored against token t + 1, so the logits at the last position are not used. Where the
    tokens are not bytes, `bits_per_byte` is bits per token. In rows of several packed examples (`segment_ids`), only
    targets in the same example count: neither the first token of the next one nor filling (segment 0). A mask of
    tokens (B, T) says which targets count.

    Args:
      outputs: logits, shape (B, T, vocabulary).
      batch: holds `tokens`, integers of shape (B, T), the model's own input; T is at least 2. And `segment_ids` (B, T)
        if rows are packed.
    """
    tokens = _integers(batch, "tokens", needed_by="next_token")
    if outputs.ndim != 3 or tokens.shape != outputs.shape[:2] or tokens.shape[1] < 2:
        raise ValueError(
            f"next_token needs logits (B, T, vocabulary) and tokens (B, T) with T >= 2, but got {outputs.shape} and "
            f"{tokens.shape}; pass the model all T tokens, the shift by one is done here."
        )
    values = _cross_entropy(outputs[:, :-1], tokens[:, 1:])
    bits = values / math.log(2.0)
    by_token = batch[MASK][:, 1:] if MASK in batch and batch[MASK].ndim == 2 else None
    if SEGMENT_IDS not in batch and by_token is None:
        return values, {"bits_per_byte": bits}
    counts = jnp.ones_like(values) if by_token is None else by_token.astype(jnp.float32)
    if SEGMENT_IDS in batch:
        segments = _integers(batch, SEGMENT_IDS, needed_by="next_token on packed rows")
        counts = jnp.where((segments[:, :-1] == segments[:, 1:]) & (segments[:, 1:] > 0), counts, 0.0)
    return Weighted(values, counts), {"bits_per_byte": Weighted(bits, counts)}


def _cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    values = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), labels)
    # A label beyond the last class gives NaN already; a negative one would silently count from the last class back.
    return jnp.where(labels < 0, jnp.nan, values)


def _integers(batch: Batch, field: str, *, needed_by: str) -> jax.Array:
    if field not in batch:
        raise ValueError(f"{needed_by} needs the batch field {field!r}, but the batch has {sorted(batch)}.")
    values = batch[field]
    if not jnp.issubdtype(values.dtype, jnp.integer):
        raise ValueError(f"{needed_by} needs integers in batch[{field!r}], but got {values.dtype}.")
    return values
