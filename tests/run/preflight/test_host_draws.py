# ruff: noqa: NPY002 - the generators that all share are what is tested
import dataclasses
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_experiment
from flax import linen as nn

from jaxdist.errors import ConfigError
from jaxdist.run import components
from jaxdist.run.preflight.host_draws import Draws


def seeded():
    np.random.seed(0)
    return np.random.normal()


@pytest.mark.parametrize(
    ("draw", "modules"),
    [
        (lambda: np.random.normal(size=3), ["numpy.random"]),
        (random.random, ["random"]),
        (lambda: (random.random(), np.random.rand()), ["numpy.random", "random"]),
        (lambda: np.random.default_rng(0).normal(), []),
        (lambda: random.Random(0).random(), []),
        (seeded, []),
        (lambda: None, []),
    ],
)
def test_draws_of_the_generators_that_all_share_are_noticed_and_undone(draw, modules):
    before = np.random.get_state()[1].tobytes(), random.getstate()
    draws = Draws()
    for _ in range(2):
        with draws.noticed():
            draw()
    assert draws.modules() == modules
    assert (np.random.get_state()[1].tobytes(), random.getstate()) == before


class Noisy(nn.Module):
    @nn.compact
    def __call__(self, image, train):
        features = image.reshape(len(image), -1)
        noise = jnp.asarray(np.random.normal(size=features.shape[1:])) if train else 0.0
        return nn.Dense(4)(features + noise)


def test_a_model_that_draws_from_numpy_is_told_so_and_refused_where_bits_are_promised():
    experiment = dataclasses.replace(tiny_experiment.get_config(), model=Noisy())
    with pytest.warns(UserWarning, match=r"draws from numpy\.random.*make_rng"), jax.numpy_rank_promotion("allow"):
        components.put_together(experiment, devices=jax.devices()[:1])
    same_bits = dataclasses.replace(experiment, reduction="canonical")
    with pytest.raises(ConfigError, match=r"draws from numpy\.random"), jax.numpy_rank_promotion("allow"):
        components.put_together(same_bits, devices=jax.devices()[:1])
