"""Regression: how far outputs are from numbers."""

import dataclasses

import jax
import jax.numpy as jnp
import optax

from jaxdist.losses.targets import Values, counted, like_outputs, weights_of
from jaxdist.spmd.metrics import Batch


@dataclasses.dataclass(frozen=True, kw_only=True)
class SquaredError:
    """The squared difference of outputs and targets; its mean is the mean squared error. Metric: `absolute_error`."""

    target: str = "target"
    """The batch field with the targets, of the shape of the outputs."""
    weight: str | None = None
    """The batch field that says how much each example counts; means are divided by the sum of the weights."""

    def __call__(self, outputs: jax.Array, batch: Batch) -> tuple[Values, dict[str, Values]]:
        """Return the values of the loss and of the metric, float32 of the shape of `outputs`."""
        error, weights = _error(self, outputs, batch)
        return counted(jnp.square(error), weights), {"absolute_error": counted(jnp.abs(error), weights)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class AbsoluteError:
    """The absolute difference of outputs and targets; see `SquaredError`. Metric: `squared_error`."""

    target: str = "target"
    weight: str | None = None

    def __call__(self, outputs: jax.Array, batch: Batch) -> tuple[Values, dict[str, Values]]:
        """Return the values of the loss and of the metric, float32 of the shape of `outputs`."""
        error, weights = _error(self, outputs, batch)
        return counted(jnp.abs(error), weights), {"squared_error": counted(jnp.square(error), weights)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Huber:
    """Half the squared difference up to `delta`, linear beyond it (Huber, 1964); see `SquaredError`.

    Metrics: `squared_error` and `absolute_error`.
    """

    delta: float = 1.0
    target: str = "target"
    weight: str | None = None

    def __post_init__(self) -> None:
        if not self.delta > 0:
            raise ValueError(f"delta must be above 0; got {self.delta}.")

    def __call__(self, outputs: jax.Array, batch: Batch) -> tuple[Values, dict[str, Values]]:
        """Return the values of the loss and of the metrics, float32 of the shape of `outputs`."""
        error, weights = _error(self, outputs, batch)
        found = {"squared_error": jnp.square(error), "absolute_error": jnp.abs(error)}
        loss = counted(optax.huber_loss(error, delta=self.delta), weights)
        return loss, {name: counted(values, weights) for name, values in found.items()}


def _error(
    loss: SquaredError | AbsoluteError | Huber, outputs: jax.Array, batch: Batch
) -> tuple[jax.Array, jax.Array | None]:
    """Return the differences, and the weights of the examples."""
    name = type(loss).__name__
    outputs, targets = like_outputs(outputs, batch, loss.target, needed_by=name)
    return outputs - targets, weights_of(batch, loss.weight, needed_by=name)
