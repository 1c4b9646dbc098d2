"""Vision Transformer (Dosovitskiy et al., 2021), in Linen because its frozen fields can be overridden by `--set`."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn import initializers

from jaxdist.models import sizes
from jaxdist.models.transformer import Block


class ViT(nn.Module):
    """Patches and a class token with learned positions, transformer blocks, logits from the class token."""

    num_classes: int
    """Number of logits."""
    patch_size: int
    """Height and width of a patch in pixels; it divides the image's."""
    num_layers: int
    """Number of transformer blocks."""
    num_heads: int
    """Attention heads of each block; they divide the width."""
    width: int
    """Features of the residual stream."""
    dropout_rate: float = 0.0
    """Probability with which a feature is zeroed in training."""
    remat: bool = False
    """Compute each block's activations again in the backward pass instead of keeping them."""
    norm_epsilon: float = 1e-6
    """What the normalisations add to the variance; the weights of the ViTs in transformers need 1e-12."""
    exact_gelu: bool = False
    """Compute GELU with the error function, as these weights need, in place of its approximation with tanh."""

    def __post_init__(self) -> None:
        sizes.check(self)
        super().__post_init__()

    @nn.compact
    def __call__(self, image: jax.Array, *, train: bool) -> jax.Array:
        """Return logits (B, num_classes) for images (B, H, W, C), all of the size the model was initialised with."""
        batch_size, height, width, _ = image.shape
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(f"patch_size must divide the image, but got {self.patch_size} and {height}x{width}.")
        patch = (self.patch_size, self.patch_size)
        x = nn.Conv(self.width, patch, strides=patch, padding="VALID", name="patch_embedding")(image)
        x = x.reshape(batch_size, -1, self.width)
        class_token = self.param("class_token", initializers.zeros, (1, 1, self.width))
        x = jnp.concatenate([jnp.broadcast_to(class_token, (batch_size, 1, self.width)), x], axis=1)
        x = x + self.param("position_embedding", initializers.normal(0.02), (1, x.shape[1], self.width))
        x = nn.Dropout(self.dropout_rate, deterministic=not train)(x)
        init = initializers.xavier_uniform()
        block_type = nn.remat(Block) if self.remat else Block
        for index in range(self.num_layers):
            # An explicit name: with and without remat the params are the same tree.
            settings = (self.num_heads, False, self.dropout_rate, train, init, init, self.norm_epsilon, self.exact_gelu)
            x = block_type(*settings, name=f"block_{index}")(x)
        x = nn.LayerNorm(self.norm_epsilon, name="final_norm")(x[:, 0])
        return nn.Dense(self.num_classes, name="head")(x)


def vit_b16(num_classes: int = 1000, *, dropout_rate: float = 0.0, remat: bool = False) -> ViT:
    """Return ViT-B/16: 86,567,656 parameters with 1000 classes and 224x224 images."""
    return ViT(num_classes, 16, num_layers=12, num_heads=12, width=768, dropout_rate=dropout_rate, remat=remat)
