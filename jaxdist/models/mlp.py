"""Multi-layer perceptron, in Linen because its frozen fields can be overridden (`--set model.width=64`)."""

import flax.linen as nn
import jax


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

    @nn.compact
    def __call__(self, image: jax.Array, *, train: bool) -> jax.Array:
        """Return logits (B, num_classes) for inputs (B, ...)."""
        x = image.reshape(image.shape[0], -1)
        for _ in range(self.num_layers):
            x = nn.relu(nn.Dense(self.width)(x))
            x = nn.Dropout(self.dropout_rate, deterministic=not train)(x)
        return nn.Dense(self.num_classes)(x)
