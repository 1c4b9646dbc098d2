"""Models as users write them, in Linen and in NNX, each as small as it can be: what `test_users_models.py` trains.

All give logits (B, CLASSES) of numbers `x` (B, LENGTH, WIDTH), those called "tied weights" of `tokens` (B, LENGTH).
"""

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx

LENGTH, WIDTH, CLASSES = 3, 4, 5


class LinenScan(nn.Module):
    """Two layers as one scan over stacked params."""

    @nn.compact
    def __call__(self, x, *, train):
        layers = nn.scan(LinenLayer, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
        x, _ = layers()(x.mean(axis=1), None)
        return nn.Dense(CLASSES)(x)


class LinenLayer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.tanh(nn.Dense(WIDTH)(x)), None


class LinenRnn(nn.Module):
    @nn.compact
    def __call__(self, x, *, train):
        return nn.Dense(CLASSES)(nn.RNN(nn.GRUCell(WIDTH))(x)[:, -1])


class LinenAttention(nn.Module):
    @nn.compact
    def __call__(self, x, *, train):
        x = nn.MultiHeadDotProductAttention(num_heads=2, deterministic=not train)(nn.LayerNorm()(x))
        return nn.Dense(CLASSES)(x.mean(axis=1))


class LinenTied(nn.Module):
    @nn.compact
    def __call__(self, tokens, *, train):
        embed = nn.Embed(CLASSES, WIDTH)
        return embed.attend(nn.tanh(nn.Dense(WIDTH)(embed(tokens).mean(axis=1))))


class LinenBatchNorm(nn.Module):
    @nn.compact
    def __call__(self, x, *, train, mask=None):
        x = nn.Dense(WIDTH)(x.mean(axis=1))
        x = nn.BatchNorm(use_running_average=not train)(x, mask=None if mask is None else mask[:, None])
        return nn.Dense(CLASSES)(x)


class LinenGroupNorm(nn.Module):
    @nn.compact
    def __call__(self, x, *, train):
        return nn.Dense(CLASSES)(nn.GroupNorm(num_groups=2)(x).mean(axis=1))


class LinenSpectralNorm(nn.Module):
    @nn.compact
    def __call__(self, x, *, train):
        x = nn.SpectralNorm(nn.Dense(WIDTH))(x.mean(axis=1), update_stats=train)
        return nn.Dense(CLASSES)(nn.tanh(x))


class LinenRemat(nn.Module):
    @nn.compact
    def __call__(self, x, *, train):
        x, _ = nn.remat(LinenLayer)()(x.mean(axis=1), None)
        return nn.Dense(CLASSES)(x)


class LinenVmap(nn.Module):
    """An ensemble of two: their logits are added."""

    @nn.compact
    def __call__(self, x, *, train):
        members = nn.vmap(nn.Dense, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=None, axis_size=2)
        return members(CLASSES)(nn.tanh(x.mean(axis=1))).sum(axis=0)


class LinenMapVariables(nn.Module):
    """A layer that computes with the squares of its params."""

    @nn.compact
    def __call__(self, x, *, train):
        squared = nn.map_variables(nn.Dense, "params", lambda found: jax.tree.map(jnp.square, found), init=True)
        return squared(CLASSES)(x.mean(axis=1))


class NnxLayer(nnx.Module):
    def __init__(self, rngs):
        self.dense = nnx.Linear(WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x):
        return nnx.tanh(self.dense(x))


class NnxScan(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.vmap(NnxLayer, in_axes=0, out_axes=0)(rngs.split(2))
        self.head = nnx.Linear(WIDTH, CLASSES, rngs=rngs)

    def __call__(self, x):
        scan = nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        return self.head(scan(x.mean(axis=1), self.layers))


class NnxRnn(nnx.Module):
    def __init__(self, rngs):
        self.rnn = nnx.RNN(nnx.GRUCell(WIDTH, WIDTH, rngs=rngs), rngs=rngs)
        self.head = nnx.Linear(WIDTH, CLASSES, rngs=rngs)

    def __call__(self, x):
        return self.head(self.rnn(x)[:, -1])


class NnxAttention(nnx.Module):
    def __init__(self, rngs):
        self.attention = nnx.MultiHeadAttention(2, WIDTH, decode=False, rngs=rngs)
        self.head = nnx.Linear(WIDTH, CLASSES, rngs=rngs)

    def __call__(self, x):
        return self.head(self.attention(x).mean(axis=1))


class NnxTied(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(CLASSES, WIDTH, rngs=rngs)
        self.again = self.embed  # the same module at a second place
        self.dense = nnx.Linear(WIDTH, WIDTH, rngs=rngs)

    def __call__(self, tokens):
        return self.again.attend(nnx.tanh(self.dense(self.embed(tokens).mean(axis=1))))


class NnxBatchNorm(nnx.Module):
    def __init__(self, rngs):
        self.dense = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.norm = nnx.BatchNorm(WIDTH, rngs=rngs)
        self.head = nnx.Linear(WIDTH, CLASSES, rngs=rngs)

    def __call__(self, x, mask=None):
        x = self.norm(self.dense(x.mean(axis=1)), mask=None if mask is None else mask[:, None])
        return self.head(x)


class NnxGroupNorm(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.GroupNorm(WIDTH, num_groups=2, rngs=rngs)
        self.head = nnx.Linear(WIDTH, CLASSES, rngs=rngs)

    def __call__(self, x):
        return self.head(self.norm(x).mean(axis=1))


class NnxSpectralNorm(nnx.Module):
    """The call of `train()` has it update its statistics."""

    def __init__(self, rngs):
        self.norm = nnx.SpectralNorm(nnx.Linear(WIDTH, WIDTH, rngs=rngs), rngs=rngs)
        self.head = nnx.Linear(WIDTH, CLASSES, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.tanh(self.norm(x.mean(axis=1))))


class NnxWeightNorm(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.WeightNorm(nnx.Linear(WIDTH, WIDTH, rngs=rngs), rngs=rngs)
        self.head = nnx.Linear(WIDTH, CLASSES, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.tanh(self.norm(x.mean(axis=1))))


class NnxRemat(nnx.Module):
    def __init__(self, rngs):
        self.layer = NnxLayer(rngs)
        self.head = nnx.Linear(WIDTH, CLASSES, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.remat(lambda layer, x: layer(x))(self.layer, x.mean(axis=1)))


class NnxVmap(nnx.Module):
    def __init__(self, rngs):
        self.members = nnx.vmap(lambda rngs: nnx.Linear(WIDTH, CLASSES, rngs=rngs))(rngs.split(2))

    def __call__(self, x):
        each = nnx.vmap(lambda member, x: member(x), in_axes=(0, None), out_axes=0)
        return each(self.members, nnx.tanh(x.mean(axis=1))).sum(axis=0)


LINEN = {
    "scan": LinenScan(),
    "rnn": LinenRnn(),
    "attention": LinenAttention(),
    "tied weights": LinenTied(),
    "batch norm": LinenBatchNorm(),
    "group norm": LinenGroupNorm(),
    "spectral norm": LinenSpectralNorm(),
    "remat": LinenRemat(),
    "vmap": LinenVmap(),
    "map_variables": LinenMapVariables(),
}
NNX = {
    "scan": NnxScan,
    "rnn": NnxRnn,
    "attention": NnxAttention,
    "tied weights": NnxTied,
    "batch norm": NnxBatchNorm,
    "group norm": NnxGroupNorm,
    "spectral norm": NnxSpectralNorm,
    "weight norm": NnxWeightNorm,
    "remat": NnxRemat,
    "vmap": NnxVmap,
}
