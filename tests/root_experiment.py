"""The tiny experiment with a loss that is finite everywhere and whose gradient is not: the root of nothing."""

import dataclasses

import jax.numpy as jnp
import tiny_experiment

import jaxdist
from jaxdist import losses

BAD_EXAMPLES = (7, 40)
"""Those whose last feature is 0."""


def rooted(outputs, batch):
    values, metrics = losses.classification(outputs, batch)
    return values + 1e-3 * jnp.sqrt(jnp.square(outputs[:, 0] * batch["image"][:, -1])), metrics


def get_config() -> jaxdist.Experiment:
    tiny = tiny_experiment.get_config()
    image = tiny.data.train.arrays["image"].copy()
    image[list(BAD_EXAMPLES), -1] = 0.0
    source = jaxdist.ArraySource({**tiny.data.train.arrays, "image": image})
    return dataclasses.replace(tiny, loss=rooted, data=dataclasses.replace(tiny.data, train=source))
