"""The models that `plan_truth.py` compares plans with, small enough for a laptop."""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from flax import nnx

import jaxdist
from jaxdist import losses
from jaxdist.models import cnn, gpt, mlp, resnet, vit

Model = tuple[str, Callable[[], jaxdist.Experiment]]


def experiment(model: Any, fields: dict[str, np.ndarray], batch: int, loss: Any, inputs: str) -> jaxdist.Experiment:
    return jaxdist.Experiment(
        model=model,
        loss=loss,
        inputs=inputs,
        data=jaxdist.Data(train=jaxdist.ArraySource(fields), num_threads=0),
        optimizer=jaxdist.Optimizer(name="adam", learning_rate=1e-5),
        global_batch_size=batch,
        stop=jaxdist.Stop(max_steps=1),
        layout=jaxdist.LayoutSettings(min_size=2),
    )


def noise(*shape: int) -> np.ndarray:
    """Return random values: with equal ones gradients would vanish, and denormal numbers are slow to compute with."""
    return np.random.default_rng(0).standard_normal(shape, np.float32)


def labels(count: int) -> np.ndarray:
    return np.arange(count, dtype=np.int32) % 8


def dense(width: int, layers: int, batch: int, features: int = 64) -> Model:
    fields = {"image": noise(batch, features), "label": labels(batch)}
    model = mlp.MLP(num_classes=8, width=width, num_layers=layers, dropout_rate=0.0)
    return f"mlp {width}x{layers}, batch {batch}", lambda: experiment(
        model, fields, batch, losses.classification, "image"
    )


def images(model: Any, name: str, side: int, batch: int, channels: int = 3) -> Model:
    fields = {"image": noise(batch, side, side, channels), "label": labels(batch)}
    return f"{name}, batch {batch}", lambda: experiment(model, fields, batch, losses.classification, "image")


def text(width: int, layers: int, length: int, batch: int) -> Model:
    fields = {"tokens": np.random.default_rng(0).integers(0, 64, (batch, length), np.int32)}
    model = gpt.GPT(64, length, num_layers=layers, num_heads=4, width=width)
    name = f"gpt {width}x{layers}x{length}, batch {batch}"
    return name, lambda: experiment(model, fields, batch, losses.next_token, "tokens")


def small_vit(width: int, layers: int) -> Any:
    return vit.ViT(8, 4, num_layers=layers, num_heads=4, width=width)


class Lstm(nn.Module):
    """A recurrent classifier of sequences: its steps are a loop."""

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Return logits for sequences (B, T, features)."""
        return nn.Dense(8)(nn.RNN(nn.OptimizedLSTMCell(96))(x)[:, -1])


class Mixer(nn.Module):
    """Blocks that mix positions, then features (MLP-Mixer)."""

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Return logits for images of 32 x 32."""
        x = nn.Conv(64, (4, 4), strides=4)(x).reshape(len(x), -1, 64)
        for _ in range(2):
            mixed = nn.Dense(64)(nn.gelu(nn.Dense(128)(nn.LayerNorm()(x).swapaxes(1, 2)))).swapaxes(1, 2)
            x = x + mixed
            x = x + nn.Dense(64)(nn.gelu(nn.Dense(256)(nn.LayerNorm()(x))))
        return nn.Dense(8)(x.mean(axis=1))


class Autoencoder(nnx.Module):
    """Dense layers with normalisation, in NNX, that give back what they are given."""

    def __init__(self, rngs: nnx.Rngs):
        sizes = (192, 384, 48, 384, 192)
        pairs = list(itertools.pairwise(sizes))
        self.layers = nnx.List([nnx.Linear(*pair, rngs=rngs) for pair in pairs])
        self.norms = nnx.List([nnx.BatchNorm(size, rngs=rngs) for size, _ in pairs])

    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """Return an approximation of `x`; rows that the mask leaves out do not count."""
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = nnx.silu(layer(norm(x, mask=mask[:, None])))
        return x


def text_changed(name: str, model: dict[str, Any], **changes: Any) -> Model:
    """Return a language model with other fields of the model or the experiment."""
    _, make = text(96, 2, 80, 8)

    def changed() -> jaxdist.Experiment:
        made = make()
        return dataclasses.replace(made, model=dataclasses.replace(made.model, **model), **changes)

    return name, changed


def recurrent() -> Model:
    fields = {"sequence": noise(32, 24, 32), "label": labels(32)}
    return "lstm 96x24, batch 32", lambda: experiment(Lstm(), fields, 32, losses.classification, "sequence")


def autoencoder() -> Model:
    fields = {"x": noise(256, 192)}
    loss = losses.SquaredError(target="x")
    return "nnx autoencoder, batch 256", lambda: experiment(Autoencoder, fields, 256, loss, "x")


MODELS = (
    dense(64, 1, 32),
    dense(128, 3, 16),
    dense(256, 2, 64),
    images(cnn.CNN(num_classes=8), "cnn", 16, 16),
    images(small_vit(32, 1), "vit 32x1", 16, 16),
    images(small_vit(64, 2), "vit 64x2", 16, 16),
    text(32, 1, 32, 16),
    text(64, 2, 16, 16),
    text(64, 1, 64, 8),
    images(resnet.ResNet(8, (1, 1), "basic"), "resnet", 16, 16),
)

UNSEEN = (
    dense(320, 3, 160, 128), dense(1024, 2, 64, 512), dense(512, 3, 256), dense(2048, 1, 48, 256),
    text(96, 2, 96, 12), text(160, 2, 48, 8), text(128, 1, 192, 4),
    images(small_vit(128, 1), "vit 128x1", 32, 8), images(small_vit(48, 3), "vit 48x3", 16, 32),
    images(cnn.CNN(num_classes=8, width=16), "cnn 16", 20, 32),
    images(cnn.CNN(num_classes=8, width=32), "cnn 32", 16, 64),
    images(resnet.ResNet(8, (2, 1), "basic"), "resnet 2-1", 16, 12),
    recurrent(), autoencoder(), images(Mixer(), "mixer", 32, 16), text_changed("gpt, remat, batch 8", {"remat": True}),
    text_changed("gpt, bfloat16, batch 8", {}, precision="bfloat16"),
    text_changed("gpt, 2 microbatches, batch 8", {}, num_microbatches=2),
)  # fmt: skip
"""Models that `jaxdist plan --calibrate` does not measure, and whose errors had no part in choosing its terms."""
MEMORY = (dense(1024, 4, 8192, 256), text(128, 2, 256, 32), images(small_vit(128, 2), "vit 128x2", 32, 256))
