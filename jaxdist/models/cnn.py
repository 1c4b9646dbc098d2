"""Small convolutional network for small images, in Linen because its frozen fields can be overridden by `--set`."""

import flax.linen as nn
import jax

from jaxdist.models import sizes
from jaxdist.models.norm import BatchNorm


class CNN(nn.Module):
    """Stages of two 3x3 convolutions with ReLU and a 2x2 average pool, then a linear layer to the logits.

    The second stage has twice the channels of the first, the third twice those of the second.
    """

    num_classes: int
    """Number of logits."""
    width: int = 32
    """Channels of the first stage."""
    num_stages: int = 2
    """Number of stages; each halves height and width, so 8x8 digits allow at most 3."""
    batch_norm: bool = False
    """Normalise after each convolution; the model then has a model_state."""
    dropout_rate: float = 0.0
    """Probability with which a feature before the last layer is zeroed in training."""

    def __post_init__(self) -> None:
        sizes.check(self)
        super().__post_init__()

    @nn.compact
    def __call__(self, image: jax.Array, *, train: bool, mask: jax.Array | None = None) -> jax.Array:
        """Return logits (B, num_classes) for images (B, H, W, C); `mask` (B,) is true for rows that are not padding."""
        x = image
        for stage in range(self.num_stages):
            for _ in range(2):
                x = nn.Conv(self.width * 2**stage, (3, 3), use_bias=not self.batch_norm)(x)
                if self.batch_norm:
                    x = BatchNorm()(x, train=train, mask=mask)
                x = nn.relu(x)
            x = nn.avg_pool(x, (2, 2), strides=(2, 2))
        x = x.reshape(x.shape[0], -1)
        x = nn.Dropout(self.dropout_rate, deterministic=not train)(x)
        return nn.Dense(self.num_classes)(x)
