"""Batch normalisation leaves padding rows out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxdist.models.norm import BatchNorm

NORM = BatchNorm(momentum=0.75)
ROWS = 5


@jax.jit
def train(variables, x, mask):
    return NORM.apply(variables, x, train=True, mask=mask, mutable=["batch_stats"])


def variables_of(x):
    return NORM.init(jax.random.key(0), x, train=False)


@settings(max_examples=20)
@given(mask=st.lists(st.booleans(), min_size=ROWS, max_size=ROWS).filter(any), seed=st.integers(0, 2**32 - 1))
def test_statistics_and_outputs_are_those_of_the_true_rows(mask, seed):
    mask = np.array(mask)
    x = np.random.default_rng(seed).normal(size=(ROWS, 3, 2)).astype(np.float32)
    y, new = train(variables_of(x), x, mask)
    mean, variance = (statistic(x[mask].reshape(-1, 2), axis=0) for statistic in (np.mean, np.var))
    np.testing.assert_allclose(y[mask], ((x - mean) / np.sqrt(variance + 1e-5))[mask], rtol=1e-3, atol=1e-4)
    running = new["batch_stats"]["norm"]
    np.testing.assert_allclose(running["mean"], 0.25 * mean, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(running["var"], 0.75 + 0.25 * variance, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("mask", [None, jnp.array([True, False, True, True, False])])
def test_evaluation_uses_the_running_statistics_and_keeps_them(mask):
    x = jnp.linspace(-1.0, 3.0, ROWS * 2).reshape(ROWS, 2)
    variables = variables_of(x)
    y, new = NORM.apply(variables, x, train=False, mask=mask, mutable=["batch_stats"])
    np.testing.assert_allclose(y, x / np.sqrt(1 + 1e-5), rtol=1e-6)  # running mean 0, variance 1
    jax.tree.map(np.testing.assert_array_equal, new["batch_stats"], variables["batch_stats"])
