"""A loss that compares examples is noticed; those that do not are left alone, ours among them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdist import adapters, losses
from jaxdist.spmd.metrics import Weighted

OUTPUTS = jax.ShapeDtypeStruct((32, 5), jnp.float32)
BATCH = {"label": np.array([1, 3]), "target": np.array([[1.0] * 5, [2.0] * 5]), "mask": np.ones(2, np.float32)}


def in_batch_negatives(outputs, batch):
    return -jnp.diagonal(jax.nn.log_softmax(outputs @ outputs.T)), {}


def weights_of_the_batch(outputs, batch):
    weights = batch["label"] / batch["label"].mean()
    return jnp.square(outputs).sum(axis=1) * weights, {}


def batch_hard_triplets(outputs, batch):
    distances = jnp.abs(outputs[:, None] - outputs[None]).sum(axis=-1)
    same = batch["label"][:, None] == batch["label"][None]
    furthest, nearest = jnp.where(same, distances, 0).max(1), jnp.where(same, 99, distances).min(1)
    return jax.nn.relu(furthest - nearest + 100), {}


def centred(outputs, batch):
    return Weighted(jnp.square(outputs - outputs.mean(axis=0, keepdims=True)), jnp.ones(len(outputs))), {}


def cross_entropy(outputs, batch):
    return -jax.nn.log_softmax(outputs)[jnp.arange(len(outputs)), batch["label"]], {}


def weights_of_the_example(outputs, batch):
    return Weighted(jnp.square(outputs - batch["target"]), batch["label"].astype(float)), {}


def not_finite(outputs, batch):
    return jnp.log(-jnp.square(outputs[:, 0])), {}


def of_one_size(outputs, batch):
    return outputs.reshape(32, 5)[:, 0], {}


@pytest.mark.parametrize("loss", [in_batch_negatives, weights_of_the_batch, batch_hard_triplets, centred])
def test_losses_that_compare_examples(loss):
    assert adapters.are_coupled(loss, OUTPUTS, BATCH)


@pytest.mark.parametrize(
    "loss",
    [
        cross_entropy,
        weights_of_the_example,
        not_finite,
        of_one_size,
        losses.classification,
        losses.Classification(label_smoothing=0.1),
        losses.SquaredError(target="target"),
        losses.AbsoluteError(target="target"),
        losses.Huber(target="target"),
    ],
)
def test_losses_of_each_example_by_itself(loss):
    assert not adapters.are_coupled(loss, OUTPUTS, BATCH)
