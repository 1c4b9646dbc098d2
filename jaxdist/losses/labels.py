"""Binary classification, for one label or for several that do not exclude each other."""

import dataclasses

import jax
import jax.numpy as jnp
import optax

from jaxdist.losses.targets import Values, counted, like_outputs, weights_of
from jaxdist.spmd.metrics import Batch


@dataclasses.dataclass(frozen=True, kw_only=True)
class BinaryClassification:
    """Sigmoid cross entropy in nats, for one label, logits (B,), or for several per example, logits (B, labels).

    The mean is over all labels of all examples. Metric: `accuracy`, of the decision at probability 0.5. Both are NaN
    where a target is not between 0 and 1.
    """

    label: str = "label"
    """The batch field with the targets, 0 and 1 or probabilities, of the shape of the logits."""
    positive_weight: float = 1.0
    """Weight of a positive label in the loss; a negative one has weight 1, and the loss is divided by the sum."""
    weight: str | None = None
    """The batch field that says how much each example counts, in the loss and in the metric."""

    def __post_init__(self) -> None:
        if not self.positive_weight > 0:
            raise ValueError(f"positive_weight must be above 0; got {self.positive_weight}.")

    def __call__(self, outputs: jax.Array, batch: Batch) -> tuple[Values, dict[str, Values]]:
        """Return the values of the loss and of the metric, float32 of the shape of `outputs`."""
        logits, targets = like_outputs(outputs, batch, self.label, needed_by="BinaryClassification")
        targets = jnp.where((targets >= 0) & (targets <= 1), targets, jnp.nan)
        values = optax.sigmoid_binary_cross_entropy(logits, targets)
        right = jnp.where(jnp.isnan(targets), jnp.nan, (logits > 0) == (targets > 0.5))
        weights = weights_of(batch, self.weight, needed_by="BinaryClassification")
        positive = None if self.positive_weight == 1 else 1 + (self.positive_weight - 1) * targets
        return counted(values, weights, positive), {"accuracy": counted(right, weights)}
