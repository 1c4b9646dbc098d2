"""Language models: the next token of each position."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from jaxdist.losses.classes import cross_entropy
from jaxdist.losses.targets import Values, check_real, integers
from jaxdist.spmd.metrics import MASK, SEGMENT_IDS, Batch, Weighted


@dataclasses.dataclass(frozen=True, kw_only=True)
class NextToken:
    """`next_token` for tokens that are no bytes; used as `loss=losses.NextToken(bytes_per_token=3.4)`.

    Metrics: `bits_per_token`, and `bits_per_byte` where the bytes are known: it compares models of other tokens.
    """

    bytes_per_token: float | None = None
    """How many bytes of text a token stands for on average; `prepared.json` beside prepared tokens has it."""

    def __post_init__(self) -> None:
        if self.bytes_per_token is not None and not 0 < self.bytes_per_token < math.inf:
            raise ValueError(f"bytes_per_token must be above 0; got {self.bytes_per_token}.")

    def __call__(self, outputs: jax.Array, batch: Batch) -> tuple[Values, dict[str, Values]]:
        """Return the values of the loss and of the metrics, as `next_token` does."""
        values = _values(outputs, batch)
        metrics: dict[str, Values] = {"bits_per_token": _divided(values, math.log(2.0))}
        if self.bytes_per_token is not None:
            metrics["bits_per_byte"] = _divided(values, math.log(2.0) * self.bytes_per_token)
        return values, metrics


def next_token(outputs: jax.Array, batch: Batch) -> tuple[Values, dict[str, Values]]:
    """Return the cross entropy in nats of each next token and the metric `bits_per_byte`, both float32 (B, T - 1).

    The logits at position t are scored against token t + 1, so the logits at the last position are not used. The tokens
    are bytes; for others, see `NextToken`. In rows of several packed examples (`segment_ids`), only
    targets in the same example count; the first token of the next example and padding (segment 0) do not. A mask of
    tokens (B, T) says which targets count.

    Args:
      outputs: logits, shape (B, T, vocabulary).
      batch: holds `tokens`, integers of shape (B, T), the model's own input; T is at least 2. And `segment_ids` (B, T)
        if rows are packed.
    """
    values = _values(outputs, batch)
    return values, {"bits_per_byte": _divided(values, math.log(2.0))}


def _values(outputs: jax.Array, batch: Batch) -> jax.Array | Weighted:
    """Return the cross entropy of each next token, with weights where not all targets count."""
    tokens = integers(batch, "tokens", needed_by="next_token")
    if outputs.ndim != 3 or tokens.shape != outputs.shape[:2] or tokens.shape[1] < 2:
        raise ValueError(
            f"next_token needs logits (B, T, vocabulary) and tokens (B, T) with T >= 2; got {outputs.shape} and "
            f"{tokens.shape}. Pass all T tokens to the model; the shift by one is done here."
        )
    check_real("the model's output", outputs, needed_by="next_token")
    values = cross_entropy(outputs[:, :-1], tokens[:, 1:])
    by_token = batch[MASK][:, 1:] if MASK in batch and batch[MASK].ndim == 2 else None
    if SEGMENT_IDS not in batch and by_token is None:
        return values
    counts = jnp.ones_like(values) if by_token is None else by_token.astype(jnp.float32)
    if SEGMENT_IDS in batch:
        segments = integers(batch, SEGMENT_IDS, needed_by="next_token on packed rows")
        counts = jnp.where((segments[:, :-1] == segments[:, 1:]) & (segments[:, 1:] > 0), counts, 0.0)
    return Weighted(values, counts)


def _divided(values: jax.Array | Weighted, by: float) -> jax.Array | Weighted:
    return Weighted(values.values / by, values.weights) if isinstance(values, Weighted) else values / by
