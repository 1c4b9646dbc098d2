"""Metrics that are not means over examples: they are computed from rows collected from all devices.

A metric is any object with three attributes. `names` are the names of its values. `collect(outputs, batch)` is traced
with the evaluation and returns a dict of arrays with a row for each example. `compute(rows)` gets the rows of all
held-out examples as NumPy arrays, each example once and in order, and returns a number for each name. So a function of
scikit-learn is exact on any number of devices and processes. Usage:
`eval=jaxdist.Evaluation(metrics=(losses.F1(),))`.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal, Protocol, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jaxdist.losses.classes import labels_of
from jaxdist.losses.targets import like_outputs
from jaxdist.losses.tokens import next_token
from jaxdist.spmd.metrics import Batch, masked_mean

Rows: TypeAlias = Mapping[str, np.ndarray]


class Collected(Protocol):
    """What `Evaluation.metrics` holds."""

    @property
    def names(self) -> tuple[str, ...]:
        """What `compute` reports."""

    def collect(self, outputs: Any, batch: Batch) -> dict[str, jax.Array]:
        """Return the rows: what is kept of each example."""

    def compute(self, rows: Rows) -> Mapping[str, float]:
        """Return the metrics, given the rows of all examples."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConfusionMatrix:
    """How many examples of each label were predicted as each class: `confusion_2_1` counts labels 2 predicted as 1.

    Outputs are logits, (B, classes), or (B,) for two classes.
    """

    num_classes: int
    label: str = "label"

    @property
    def names(self) -> tuple[str, ...]:
        """What `compute` reports."""
        classes = range(self.num_classes)
        return tuple(f"confusion_{label}_{predicted}" for label in classes for predicted in classes)

    def collect(self, outputs: jax.Array, batch: Batch) -> dict[str, jax.Array]:
        """Return label and predicted class."""
        if outputs.ndim == 2 and outputs.shape[1] > self.num_classes:
            raise ValueError(f"ConfusionMatrix needs num_classes={outputs.shape[1]}, as many as there are logits.")
        return _decisions(outputs, batch, self.label, needed_by="ConfusionMatrix")

    def compute(self, rows: Rows) -> dict[str, float]:
        """Return the counts."""
        counts = confusion(rows, self.num_classes)
        return dict(zip(self.names, map(float, counts.reshape(-1)), strict=True))


@dataclasses.dataclass(frozen=True, kw_only=True)
class F1:
    """The F1 score, as `f1`: of logits (B, classes), or (B,) for two classes.

    A class that is neither a label nor predicted has no part in an average, as in scikit-learn.
    """

    average: Literal["macro", "weighted", "micro", "binary"] = "macro"
    """macro: the mean over the classes; weighted: the mean weighted by the number of labels; micro: of all decisions
    together; binary: of class 1 of two."""
    label: str = "label"
    names = ("f1",)

    def __post_init__(self) -> None:
        if self.average not in ("macro", "weighted", "micro", "binary"):
            raise ValueError(f"average must be macro, weighted, micro or binary; got {self.average!r}.")

    def collect(self, outputs: jax.Array, batch: Batch) -> dict[str, jax.Array]:
        """Return label and predicted class."""
        return _decisions(outputs, batch, self.label, needed_by="F1")

    def compute(self, rows: Rows) -> dict[str, float]:
        """Return the score; that of a class without a true positive is 0."""
        counts = confusion(rows)
        right, labels, predicted = np.diag(counts), counts.sum(axis=1), counts.sum(axis=0)
        if self.average == "binary":
            if len(counts) > 2:
                raise ValueError(f"average='binary' is for two classes; found {len(counts)}. Choose another average.")
            right, labels, predicted = (np.append(each, [0, 0])[1:2] for each in (right, labels, predicted))
        if self.average == "micro":
            right, labels, predicted = (each.sum(keepdims=True) for each in (right, labels, predicted))
        seen = labels + predicted > 0
        if not seen.any():
            return {"f1": 0.0}
        scores = 2 * right[seen] / (labels + predicted)[seen]
        weights = labels[seen] if self.average == "weighted" else np.ones(seen.sum())
        return {"f1": float(np.average(scores, weights=weights)) if weights.sum() else 0.0}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RocAuc:
    """The area under the ROC curve, as `roc_auc`; for more than two classes, the mean of each class against the rest.

    Outputs are logits, (B, classes), or (B,) for two classes. It is NaN where a class has no example, or all examples.
    """

    label: str = "label"
    names = ("roc_auc",)

    def collect(self, outputs: jax.Array, batch: Batch) -> dict[str, jax.Array]:
        """Return label and scores."""
        outputs, labels = _logits(outputs, batch, self.label, needed_by="RocAuc")
        if outputs.ndim == 2 and outputs.shape[1] == 2:
            outputs = outputs[:, 1] - outputs[:, 0]
        # Only ranks matter, and logarithms of probabilities near 1 are distinct where the probabilities are not.
        return {"label": labels, "score": outputs if outputs.ndim == 1 else jax.nn.log_softmax(outputs)}

    def compute(self, rows: Rows) -> dict[str, float]:
        """Return the area."""
        scores, labels = rows["score"], rows["label"]
        if scores.ndim == 1:
            return {"roc_auc": _area(scores, labels == 1)}
        areas = [_area(scores[:, each], labels == each) for each in range(scores.shape[1])]
        return {"roc_auc": float(np.mean(areas))}


@dataclasses.dataclass(frozen=True, kw_only=True)
class R2:
    """The coefficient of determination, as `r2`; for several outputs per example, the mean over them."""

    target: str = "target"
    names = ("r2",)

    def collect(self, outputs: jax.Array, batch: Batch) -> dict[str, jax.Array]:
        """Return outputs and targets."""
        outputs, targets = like_outputs(outputs, batch, self.target, needed_by="R2")
        return {"output": outputs, "target": targets}

    def compute(self, rows: Rows) -> dict[str, float]:
        """Return the coefficient; for constant targets 1 if all outputs equal them, else 0; for one example NaN."""
        outputs, targets = (rows[name].astype(np.float64).reshape(len(rows[name]), -1) for name in ("output", "target"))
        if len(targets) < 2:
            return {"r2": math.nan}
        missed = np.square(targets - outputs).sum(axis=0)
        spread = np.square(targets - targets.mean(axis=0)).sum(axis=0)
        constant = np.where(missed == 0, 1.0, 0.0)
        return {"r2": float(np.mean(np.where(spread == 0, constant, 1 - missed / np.where(spread == 0, 1, spread))))}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Perplexity:
    """The exponential of the mean loss of `next_token`, as `perplexity`."""

    names = ("perplexity",)

    def collect(self, outputs: jax.Array, batch: Batch) -> dict[str, jax.Array]:
        """Return the sum over each example's tokens, and their number."""
        values, _ = next_token(outputs, batch)
        total, count = jax.vmap(masked_mean)(values)
        return {"total": total, "count": count}

    def compute(self, rows: Rows) -> dict[str, float]:
        """Return the perplexity; NaN where nothing counted."""
        count = math.fsum(rows["count"])
        return {"perplexity": float(np.exp(math.fsum(rows["total"]) / count)) if count else math.nan}


def confusion(rows: Rows, num_classes: int | None = None) -> np.ndarray:
    """Return the counts (label, predicted class) of what `_decisions` collected."""
    labels, predicted = rows["label"].astype(np.int64), rows["predicted"].astype(np.int64)
    found = np.concatenate([labels, predicted, [0]])
    size = int(found.max()) + 1 if num_classes is None else num_classes
    outside = found[(found < 0) | (found >= size)]
    if outside.size:
        raise ValueError(f"Classes are numbered from 0 to {size - 1}; found {outside[0]}.")
    return np.bincount(labels * size + predicted, minlength=size * size).reshape(size, size)


def _decisions(outputs: jax.Array, batch: Batch, field: str, *, needed_by: str) -> dict[str, jax.Array]:
    outputs, labels = _logits(outputs, batch, field, needed_by=needed_by)
    predicted = (outputs > 0).astype(jnp.int32) if outputs.ndim == 1 else outputs.argmax(axis=-1)
    return {"label": labels, "predicted": predicted}


def _logits(outputs: jax.Array, batch: Batch, field: str, *, needed_by: str) -> tuple[jax.Array, jax.Array]:
    """Return logits (B, classes) or, for two classes, (B,), and the labels (B,)."""
    if outputs.ndim == 1:
        outputs, labels = like_outputs(outputs, batch, field, needed_by=needed_by)
        return outputs, labels.astype(jnp.int32)
    labels = labels_of(outputs, batch, field, needed_by=needed_by)
    return outputs.astype(jnp.float32), labels.argmax(axis=-1) if labels.ndim == 2 else labels


def _area(scores: np.ndarray, positive: np.ndarray) -> float:
    """Return the probability that a positive example scores higher than a negative one, ties counted half."""
    num_positive, num_negative = int(positive.sum()), int((~positive).sum())
    if not num_positive or not num_negative or np.isnan(scores).any():
        return math.nan
    _, place, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[place]  # the mean rank of equal scores
    return float((ranks[positive].sum() - num_positive * (num_positive + 1) / 2) / (num_positive * num_negative))
