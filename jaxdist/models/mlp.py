"""Multi-layer perceptron, in Linen because its frozen fields can be overridden (`--set model.width=64`)."""

import flax.linen as nn
import jax
from jax.nn import initializers

from jaxdist.models import mup, sizes


class MLP(nn.Module):
    """Flatten each example, then `num_layers` hidden layers with ReLU, then a linear layer to the logits."""

    num_classes: int
    """Number of logits."""
    width: int = 128
    """Features of each hidden layer."""
    num_layers: int = 2
    """Number of hidden layers; 0 makes the model linear."""
    dropout_rate: float = 0.0
    """Probability with which a hidden feature is zeroed in training."""
    base_width: int | None = None
    """muP: the width at which settings were found, so that they hold at this one (see `mup`). None: no muP."""

    def __post_init__(self) -> None:
        sizes.check(self)
        super().__post_init__()

    @nn.compact
    def __call__(self, image: jax.Array, *, train: bool) -> jax.Array:
        """Return logits (B, num_classes) for inputs (B, ...)."""
        x = image.reshape(image.shape[0], -1)
        for _ in range(self.num_layers):
            x = nn.relu(nn.Dense(self.width)(x))
            x = nn.Dropout(self.dropout_rate, deterministic=not train)(x)
        if not self.num_layers:
            return nn.Dense(self.num_classes)(x)
        m = mup.multiplier(self.width, self.base_width)
        # Variance m / width: that of the base width, whatever the width is.
        logits = nn.Dense(self.num_classes, kernel_init=initializers.variance_scaling(m, "fan_in", "truncated_normal"))
        return logits(x if m == 1 else x / m)

    def width_role(self, path: str) -> mup.Role:
        """Return what a param is for muP."""
        layer, _, name = path.rpartition("/")
        if name != "kernel" or layer == "Dense_0":
            return "vector"
        return "output" if layer == f"Dense_{self.num_layers}" else "hidden"
