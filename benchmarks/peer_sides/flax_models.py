"""The works as Linen models, for the sides that run on JAX."""

import os
import pathlib
from typing import Any

import jax
import numpy as np
import optax
from flax import traverse_util
from works import FOLDER, WORK, WORKS

from jaxdist.models import cnn, gpt, mlp

NAME = os.environ[WORK]
SIZES = WORKS[NAME]
HERE = pathlib.Path(os.environ[FOLDER])
INPUTS = "tokens" if NAME == "gpt" else "image"


def make_model() -> Any:
    """Return the model; it is plain Linen."""
    if NAME == "mlp":
        return mlp.MLP(10, width=SIZES.width, num_layers=SIZES.num_layers)
    if NAME == "cnn":
        return cnn.CNN(10, width=SIZES.width)
    return gpt.GPT(256, SIZES.context_length, SIZES.num_layers, SIZES.num_heads, SIZES.width)


def load(file: str) -> dict[str, np.ndarray]:
    """Return the arrays of a file."""
    with np.load(HERE / file) as arrays:
        return dict(arrays)


def first_params() -> Any:
    """Return the first weights as a tree."""
    return traverse_util.unflatten_dict(load("weights.npz"), sep="/")


def mean_loss(params: Any, batch: Any) -> jax.Array:
    """Return the mean cross entropy of labels or next tokens."""
    outputs = make_model().apply({"params": params}, batch[INPUTS], train=True)
    if NAME == "gpt":
        return optax.softmax_cross_entropy_with_integer_labels(outputs[:, :-1], batch["tokens"][:, 1:]).mean()
    return optax.softmax_cross_entropy_with_integer_labels(outputs, batch["label"]).mean()


def loss_of(params: Any) -> float:
    """Return the loss of params on the first batch."""
    batch = {name: array[: SIZES.batch_size] for name, array in load("arrays.npz").items()}
    return float(jax.jit(mean_loss)(jax.tree.map(np.asarray, params), batch))
