"""Keras 3 on JAX: `compile` and `fit` on arrays, with a callback that waits for its turns."""

import os
import pathlib
import sys
from typing import Any

import jax
import keras
import numpy as np
from keras import ops
from turns import Turns
from works import FOLDER, LEARNING_RATE, WORK, WORKS

NAME = os.environ[WORK]
SIZES = WORKS[NAME]
HERE = pathlib.Path(os.environ[FOLDER])


def load(file: str) -> dict[str, np.ndarray]:
    """Return the arrays of a file."""
    with np.load(HERE / file) as arrays:
        return dict(arrays)


WEIGHTS = load("weights.npz")


def constant(name: str) -> Any:
    """Return the initializer that gives an array its first values."""
    return keras.initializers.Constant(WEIGHTS[name])


def dense(path: str, **settings: Any) -> keras.layers.Dense:
    """Return the layer with its first weights."""
    outputs = WEIGHTS[f"{path}/bias"].size
    return keras.layers.Dense(
        outputs, kernel_initializer=constant(f"{path}/kernel"), bias_initializer=constant(f"{path}/bias"), **settings
    )


def conv(path: str) -> keras.layers.Conv2D:
    """Return the layer with its first weights."""
    settings = {"kernel_initializer": constant(f"{path}/kernel"), "bias_initializer": constant(f"{path}/bias")}
    return keras.layers.Conv2D(WEIGHTS[f"{path}/bias"].size, 3, padding="same", activation="relu", **settings)


class GPT(keras.Model):
    """The GPT."""

    def __init__(self) -> None:
        super().__init__()
        length, width = SIZES.context_length, SIZES.width
        self.tokens = self.add_weight(shape=(256, width), initializer=constant("token_embedding/embedding"))
        self.positions = self.add_weight(shape=(length, width), initializer=constant("position_embedding"))
        self.parts = [
            {
                "norms": [keras.layers.LayerNormalization(epsilon=1e-6) for _ in range(2)],
                "qkv": dense(f"block_{index}/attention/qkv"),
                "out": dense(f"block_{index}/attention/out"),
                "mlp_in": dense(f"block_{index}/mlp_in"),
                "mlp_out": dense(f"block_{index}/mlp_out"),
            }
            for index in range(SIZES.num_layers)
        ]
        self.norm = keras.layers.LayerNormalization(epsilon=1e-6)

    def call(self, tokens: Any) -> Any:
        """Return the logits of all but the last position."""
        length, width, heads = SIZES.context_length, SIZES.width, SIZES.num_heads
        x = ops.take(self.tokens, tokens, axis=0) + self.positions
        for part in self.parts:
            fused = ops.reshape(part["qkv"](part["norms"][0](x)), (-1, length, heads, 3 * width // heads))
            mixed = ops.dot_product_attention(*ops.split(fused, 3, axis=-1), is_causal=True)
            x = x + part["out"](ops.reshape(mixed, (-1, length, width)))
            x = x + part["mlp_out"](ops.gelu(part["mlp_in"](part["norms"][1](x)), approximate=True))
        return ops.matmul(self.norm(x), ops.transpose(self.tokens))[:, :-1]


def make_model() -> keras.Model:
    """Return the work's model."""
    if NAME == "gpt":
        return GPT()
    flatten, pool = keras.layers.Flatten(), keras.layers.AveragePooling2D
    if NAME == "mlp":
        hidden = [dense(f"Dense_{i}", activation="relu") for i in range(2)]
        return keras.Sequential([flatten, *hidden, dense("Dense_2")])
    convs = [conv(f"Conv_{i}") for i in range(4)]
    return keras.Sequential([*convs[:2], pool(2), *convs[2:], pool(2), flatten, dense("Dense_0")])


class Wait(keras.callbacks.Callback):
    """Waits between turns."""

    def __init__(self, turns: Turns) -> None:
        super().__init__()
        self.turns = turns

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """See turns."""
        if not self.turns.step(lambda: float(logs["loss"])):
            self.model.stop_training = True


def main() -> None:
    if int(sys.argv[1]) > 1:
        mesh = keras.distribution.DeviceMesh((len(jax.devices()),), ("data",))
        keras.distribution.set_distribution(keras.distribution.DataParallel(device_mesh=mesh))
    arrays = load("arrays.npz")
    x, y = (arrays["tokens"], arrays["tokens"][:, 1:]) if NAME == "gpt" else (arrays["image"], arrays["label"])
    model, turns = make_model(), Turns()
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer=keras.optimizers.Adam(LEARNING_RATE, epsilon=1e-8), loss=loss)
    size = SIZES.batch_size
    model.fit(x, y, batch_size=size, epochs=10**9, shuffle=False, verbose=0, callbacks=[Wait(turns)])
    turns.tell(float(loss(y[:size], model(x[:size]))))


if __name__ == "__main__":
    main()
