"""The CNN of `jaxdist.models.cnn`, in NNX: the same network for readers who know that API.

An NNX module is a mutable object with its arrays in it, so the hyperparameters live in a frozen dataclass beside it,
which is called with the random streams to build the module; `jaxdist.adapters.nnx` takes it as `make_module`.
"""

import dataclasses

import jax
from flax import nnx

from jaxdist.models import sizes


@dataclasses.dataclass(frozen=True)
class CNN:
    """Hyperparameters of `CNNModule`; `CNN(...)(rngs)` builds it."""

    num_classes: int
    """Number of logits."""
    image_shape: tuple[int, int, int] = (8, 8, 1)
    """Height, width and channels of the images; NNX makes its parameters before it sees an input."""
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

    def __call__(self, rngs: nnx.Rngs) -> "CNNModule":
        """Return a new module, initialised from `rngs`."""
        return CNNModule(self, rngs)


class Layer(nnx.Module):
    """A 3x3 convolution, optional batch normalisation, ReLU."""

    def __init__(self, in_features: int, out_features: int, *, batch_norm: bool, rngs: nnx.Rngs):
        self.conv = nnx.Conv(in_features, out_features, (3, 3), use_bias=not batch_norm, rngs=rngs)
        self.norm = nnx.BatchNorm(out_features, momentum=0.9, rngs=rngs) if batch_norm else None

    def __call__(self, x: jax.Array, *, train: bool, mask: jax.Array | None) -> jax.Array:
        """Return features (B, H, W, out_features) of `x` (B, H, W, in_features)."""
        x = self.conv(x)
        if self.norm is not None:
            rows = None if mask is None else mask.reshape(-1, 1, 1, 1)
            x = self.norm(x, use_running_average=not train, mask=rows)
        return nnx.relu(x)


class CNNModule(nnx.Module):
    """Stages of two layers and a 2x2 average pool, then a linear layer to the logits."""

    def __init__(self, config: CNN, rngs: nnx.Rngs):
        height, width, features = config.image_shape
        layers = []
        for stage in range(config.num_stages):
            for _ in range(2):
                out_features = config.width * 2**stage
                layers.append(Layer(features, out_features, batch_norm=config.batch_norm, rngs=rngs))
                features = out_features
            height, width = height // 2, width // 2
        self.layers = nnx.List(layers)
        self.dropout = nnx.Dropout(config.dropout_rate, rngs=rngs)
        self.head = nnx.Linear(height * width * features, config.num_classes, rngs=rngs)

    def __call__(self, image: jax.Array, *, train: bool, mask: jax.Array | None = None) -> jax.Array:
        """Return logits (B, num_classes) for images (B, H, W, C); `mask` (B,) is true for rows that are not padding."""
        x = image
        for index, layer in enumerate(self.layers):
            x = layer(x, train=train, mask=mask)
            if index % 2 == 1:
                x = nnx.avg_pool(x, (2, 2), strides=(2, 2))
        x = x.reshape(x.shape[0], -1)
        x = self.dropout(x, deterministic=not train)
        return self.head(x)
