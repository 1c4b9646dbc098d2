"""Losses that give one value per example or per token, so that whoever averages them can weigh every example exactly.

Each is `loss(outputs, batch) -> (values, metrics)`, the form that `jaxdist.adapters` takes: `values` is what training
minimises, `metrics` maps a name to values of the same shape. Nothing is averaged here. Logits may have any float dtype;
the softmax is computed in float32, because a sum over many classes in bfloat16 loses the small ones.
"""

import math

import jax
import jax.numpy as jnp
import optax

from jaxdist.spmd.metrics import Batch


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


def next_token(outputs: jax.Array, batch: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Return the cross entropy in nats of each next token and the metric `bits_per_byte`, both float32 (B, T - 1).

    The logits at position t are scored against token t + 1, so the logits at the last position are not used. Where the
    tokens are not bytes, `bits_per_byte` is bits per token.

    Args:
      outputs: logits, shape (B, T, vocabulary).
      batch: holds `tokens`, integers of shape (B, T), the model's own input; T is at least 2.
    """
    tokens = _integers(batch, "tokens", needed_by="next_token")
    if outputs.ndim != 3 or tokens.shape != outputs.shape[:2] or tokens.shape[1] < 2:
        raise ValueError(
            f"next_token needs logits (B, T, vocabulary) and tokens (B, T) with T >= 2, but got {outputs.shape} and "
            f"{tokens.shape}; pass the model all T tokens, the shift by one is done here."
        )
    values = _cross_entropy(outputs[:, :-1], tokens[:, 1:])
    return values, {"bits_per_byte": values / math.log(2.0)}


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
