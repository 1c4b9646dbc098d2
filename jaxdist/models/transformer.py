"""The pre-normalised transformer block (Vaswani et al., 2017; Radford et al., 2019) that GPT and ViT are stacks of."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn.initializers import Initializer


class Attention(nn.Module):
    """Multi-head self-attention."""

    num_heads: int
    """Attention heads; they divide the width."""
    causal: bool
    """Let a position attend only to itself and those before it."""
    kernel_init: Initializer
    """Initialiser of the matrix that makes queries, keys and values."""
    residual_init: Initializer
    """Initialiser of the matrix that joins the heads."""
    scale: float | None = None
    """What queries times keys are multiplied by; None: one over the square root of the size of a head."""

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """Return an array of the shape and dtype of `x`, (B, T, width); the softmax is computed in float32.

        `mask` (B, 1, T, T) is True where a position (dim 2) may attend to another (dim 3).
        """
        batch_size, length, width = x.shape
        if width % self.num_heads != 0:
            raise ValueError(f"num_heads must divide the width, but got {self.num_heads} heads and width {width}.")
        fused = nn.Dense(3 * width, kernel_init=self.kernel_init, name="qkv")(x)
        # Head by head, each with its query, key and value: columns sharded over devices are then whole heads, and
        # nothing need be sent before the heads are joined.
        by_head = fused.reshape(batch_size, length, self.num_heads, 3 * width // self.num_heads)
        query, key, value = jnp.split(by_head, 3, axis=-1)
        heads = jax.nn.dot_product_attention(query, key, value, mask=mask, scale=self.scale, is_causal=self.causal)
        return nn.Dense(width, kernel_init=self.residual_init, name="out")(heads.reshape(x.shape))


class Block(nn.Module):
    """Attention, then a two-layer perceptron with GELU, each on the normalised input and added to it."""

    num_heads: int
    """Attention heads; they divide the width."""
    causal: bool
    """Let a position attend only to itself and those before it."""
    dropout_rate: float
    """Probability with which a feature of each branch's output is zeroed in training."""
    train: bool
    """Whether this call trains; a field, because a rematerialised call traces its arguments."""
    kernel_init: Initializer
    """Initialiser of the matrices at a branch's beginning."""
    residual_init: Initializer
    """Initialiser of the matrices whose output is added to the residual stream."""
    norm_epsilon: float = 1e-6
    """What the normalisations add to the variance."""
    exact_gelu: bool = False
    """Compute GELU with the error function, in place of its approximation with tanh."""
    attention_scale: float | None = None
    """See Attention."""

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """Return an array of the shape and dtype of `x`, (B, T, width); for `mask` see Attention."""
        width = x.shape[-1]
        drop = nn.Dropout(self.dropout_rate, deterministic=not self.train)
        settings = (self.num_heads, self.causal, self.kernel_init, self.residual_init, self.attention_scale)
        attention = Attention(*settings, name="attention")
        x = x + drop(attention(nn.LayerNorm(self.norm_epsilon, name="attention_norm")(x), mask))
        normed = nn.LayerNorm(self.norm_epsilon, name="mlp_norm")(x)
        hidden = nn.gelu(nn.Dense(4 * width, kernel_init=self.kernel_init, name="mlp_in")(normed), not self.exact_gelu)
        return x + drop(nn.Dense(width, kernel_init=self.residual_init, name="mlp_out")(hidden))
