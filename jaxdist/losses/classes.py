"""Classification: one class of several for each example."""

import dataclasses

import jax
import jax.numpy as jnp
import optax

from jaxdist.losses.targets import Values, check_real, counted, field_of, integers, weights_of
from jaxdist.spmd.metrics import Batch

_PROBABILITY_TOLERANCE = 1e-3
"""How far the probabilities of a label may be from 1 in all: they may have come through bfloat16."""


def classification(outputs: jax.Array, batch: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Return softmax cross entropy in nats and the metric `accuracy` (1 or 0), both float32 of shape (B,).

    The cross entropy is NaN where a label is not one of the classes. The accuracy of probabilities is that of their
    most probable class.

    Args:
      outputs: logits, shape (B, classes).
      batch: holds `label`, integers of shape (B,); or probabilities of the classes, floats of shape (B, classes), as
        `data.MixUp` makes them.
    """
    labels = labels_of(outputs, batch, "label", needed_by="classification")
    return cross_entropy(outputs, labels), {"accuracy": accuracy(outputs, labels)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Classification:
    """`classification` with settings; used as `loss=losses.Classification(label_smoothing=0.1)`.

    Metrics: `accuracy`, and `top_5_accuracy` for `top_k=(5,)`.
    """

    label: str = "label"
    """The batch field with the class indices, integers (B,); or with their probabilities, floats (B, classes)."""
    label_smoothing: float = 0.0
    """The part of the target that is spread evenly over all classes (Szegedy et al., 2016)."""
    class_weights: tuple[float, ...] | None = None
    """How much an example of each class counts in the loss, which is divided by the sum of the weights."""
    weight: str | None = None
    """The batch field, of shape (B,), that says how much each example counts, in the loss and in the metrics."""
    top_k: tuple[int, ...] = ()
    """For each k a metric: whether the label is among the k largest logits."""

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing must be at least 0 and below 1; got {self.label_smoothing}.")
        if self.class_weights is not None and min(self.class_weights, default=-1) < 0:
            raise ValueError(f"class_weights needs a number of at least 0 for each class; got {self.class_weights}.")
        if any(k < 1 for k in self.top_k):
            raise ValueError(f"The numbers in top_k must be at least 1; got {self.top_k}.")

    def __call__(self, outputs: jax.Array, batch: Batch) -> tuple[Values, dict[str, Values]]:
        """Return the values of the loss and of the metrics, float32 of shape (B,)."""
        labels = labels_of(outputs, batch, self.label, needed_by="Classification")
        num_classes = outputs.shape[1]
        weights = weights_of(batch, self.weight, needed_by="Classification")
        if self.class_weights is not None and len(self.class_weights) != num_classes:
            raise ValueError(
                f"class_weights needs one number per class; got {len(self.class_weights)} for {num_classes} classes."
            )
        of_class = None if self.class_weights is None else self._weights_of_classes(labels)
        found = {"accuracy": accuracy(outputs, labels)}
        found |= {f"top_{k}_accuracy": is_in_top(outputs, labels, k) for k in self.top_k}
        loss = counted(self._cross_entropy(outputs, labels), weights, of_class)
        return loss, {name: counted(values, weights) for name, values in found.items()}

    def _weights_of_classes(self, labels: jax.Array) -> jax.Array:
        weights = jnp.asarray(self.class_weights, jnp.float32)
        return weights[labels] if labels.ndim == 1 else labels.astype(jnp.float32) @ weights

    def _cross_entropy(self, logits: jax.Array, labels: jax.Array) -> jax.Array:
        hard = cross_entropy(logits, labels)
        if not self.label_smoothing:
            return hard
        evenly = -jax.nn.log_softmax(logits.astype(jnp.float32)).mean(axis=-1)
        return (1 - self.label_smoothing) * hard + self.label_smoothing * evenly


def labels_of(outputs: jax.Array, batch: Batch, field: str, *, needed_by: str) -> jax.Array:
    """Return the labels that go with logits (B, classes): integers (B,), or probabilities (B, classes)."""
    labels = field_of(batch, field, needed_by=needed_by)
    is_soft = jnp.issubdtype(labels.dtype, jnp.floating) and labels.ndim == 2
    if not is_soft:
        labels = integers(batch, field, needed_by=needed_by)
    wanted = outputs.shape if is_soft else outputs.shape[:1]
    if outputs.ndim != 2 or labels.shape != wanted:
        raise ValueError(
            f"{needed_by} needs logits (B, classes) and labels (B,); got {outputs.shape} and {labels.shape}. "
            "Labels are class indices, not one-hot rows of integers; probabilities are floats of the logits' shape."
        )
    if outputs.shape[1] == 1:
        raise ValueError(
            f"{needed_by} needs a logit for each of two classes or more: of a single one the probability is 1 whatever "
            "it is. Give the model two outputs, or one, of shape (B,), and train with losses.BinaryClassification."
        )
    check_real("the model's output", outputs, needed_by=needed_by)
    return labels


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Return the cross entropy of labels, NaN where one is not a class or its probabilities are none."""
    if labels.ndim == logits.ndim:
        targets = labels.astype(jnp.float32)
        is_valid = (targets >= 0).all(axis=-1) & (jnp.abs(targets.sum(axis=-1) - 1) < _PROBABILITY_TOLERANCE)
        return jnp.where(is_valid, optax.softmax_cross_entropy(logits.astype(jnp.float32), targets), jnp.nan)
    values = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), labels)
    # A label beyond the last class gives NaN already; a negative one would index from the last class, silently.
    return jnp.where(labels < 0, jnp.nan, values)


def accuracy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Return 1 where the label, or the most probable class, has the largest logit, else 0."""
    return (logits.argmax(axis=-1) == _hard(logits, labels)).astype(jnp.float32)


def _hard(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return labels.argmax(axis=-1) if labels.ndim == logits.ndim else labels


def is_in_top(logits: jax.Array, labels: jax.Array, k: int) -> jax.Array:
    """Return 1 where the label is among the `k` largest logits, else 0; equal logits are ranked by class."""
    labels = _hard(logits, labels)
    classes = jnp.arange(logits.shape[-1])
    own = jnp.take_along_axis(logits, jnp.clip(labels, 0)[:, None], axis=-1, mode="clip")
    before = (logits > own) | ((logits == own) & (classes[None] < labels[:, None]))
    # Comparisons with NaN are false, so without this a model that has diverged would be counted as right everywhere.
    valid = (labels >= 0) & (labels < logits.shape[-1]) & ~jnp.isnan(logits).any(axis=-1)
    return ((before.sum(axis=-1) < k) & valid).astype(jnp.float32)
