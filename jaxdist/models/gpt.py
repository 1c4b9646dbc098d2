"""Decoder-only transformer (GPT-2; Radford et al., 2019), in Linen: its frozen fields can be overridden by `--set`.

Dropout acts on the embeddings and on each branch's output, not on the attention weights: those exist only inside the
attention kernel.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn import initializers

from jaxdist.models import mup, sizes
from jaxdist.models.transformer import Block


class GPT(nn.Module):
    """Token and position embeddings, causal transformer blocks, a last normalisation, logits over the vocabulary."""

    vocab_size: int
    """Number of different tokens; 256 for bytes."""
    context_length: int
    """Longest sequence the position embedding covers."""
    num_layers: int
    """Number of transformer blocks."""
    num_heads: int
    """Attention heads of each block; they divide the width."""
    width: int
    """Features of the residual stream."""
    dropout_rate: float = 0.0
    """Probability with which a feature is zeroed in training."""
    tie_embeddings: bool = True
    """Use the token embedding as the last layer's matrix, too."""
    remat: bool = False
    """Compute each block's activations again in the backward pass instead of keeping them."""
    norm_epsilon: float = 1e-6
    """What the normalisations add to the variance; the weights of GPT-2 need 1e-5."""
    base_width: int | None = None
    """muP: the width at which settings were found, so that they hold at this one, with as many heads (see `mup`). None:
    no muP."""

    def __post_init__(self) -> None:
        sizes.check(self)
        super().__post_init__()

    @nn.compact
    def __call__(self, tokens: jax.Array, *, train: bool, segment_ids: jax.Array | None = None) -> jax.Array:
        """Return logits (B, T, vocab_size) for integer tokens (B, T), T at most context_length.

        Rows of several packed examples come with `segment_ids` (B, T), the same number for all tokens of one example:
        a token then sees its own example only, and positions count from 0 in each.
        """
        length = tokens.shape[1]
        if length > self.context_length:
            raise ValueError(f"GPT's context_length is {self.context_length}, but the tokens are {length} long.")
        m = mup.multiplier(self.width, self.base_width)
        init, hidden_init = initializers.normal(0.02), initializers.normal(0.02 / m**0.5)
        # The variance of the residual stream would grow with every branch added to it.
        residual_init = initializers.normal(0.02 / (2 * self.num_layers * m) ** 0.5)
        embed = nn.Embed(self.vocab_size, self.width, embedding_init=init, name="token_embedding")
        positions = self.param("position_embedding", init, (self.context_length, self.width))
        x = embed(tokens) + self._positions(positions, length, segment_ids)
        mask = None if segment_ids is None else (segment_ids[:, None, :, None] == segment_ids[:, None, None, :])
        x = nn.Dropout(self.dropout_rate, deterministic=not train)(x)
        block_type = nn.remat(Block) if self.remat else Block
        for index in range(self.num_layers):
            # An explicit name: with and without remat the params are the same tree.
            inits = (hidden_init, residual_init)
            settings = (self.num_heads, True, self.dropout_rate, train, *inits, self.norm_epsilon)
            x = block_type(*settings, attention_scale=self._attention_scale(), name=f"block_{index}")(x, mask)
        x = nn.LayerNorm(self.norm_epsilon, name="final_norm")(x)
        x = x if m == 1 else x / m
        if self.tie_embeddings:
            return embed.attend(x)
        return nn.Dense(self.vocab_size, use_bias=False, kernel_init=init, name="head")(x)

    def _attention_scale(self) -> float | None:
        """Return the factor of queries times keys: 1 / size of a head, with the usual value at the base width."""
        if self.base_width is None:
            return None
        return (self.base_width / self.num_heads) ** 0.5 / (self.width / self.num_heads)

    def width_role(self, path: str) -> mup.Role:
        """Return what a param is for muP; the token embedding is vector-like, also where it makes the logits, too."""
        if path == "head/kernel":
            return "output"
        return "hidden" if path.startswith("block_") and path.endswith("/kernel") else "vector"

    def _positions(self, table: jax.Array, length: int, segment_ids: jax.Array | None) -> jax.Array:
        """Return the position embeddings, (1, T, width), or (B, T, width) where rows are packed."""
        if segment_ids is None:
            return jnp.expand_dims(table[:length], 0)
        index = jnp.broadcast_to(jnp.arange(length)[None], segment_ids.shape)
        begins = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)))
        return table[index - jax.lax.cummax(jnp.where(begins, index, 0), axis=1)]


def gpt2_small(*, dropout_rate: float = 0.1, remat: bool = False, norm_epsilon: float = 1e-6) -> GPT:
    """Return GPT-2 small: 124,439,808 parameters; for its weights, `norm_epsilon` is 1e-5."""
    model = GPT(50257, 1024, num_layers=12, num_heads=12, width=768, dropout_rate=dropout_rate, remat=remat)
    return dataclasses.replace(model, norm_epsilon=norm_epsilon)
