"""The MLP's depth and width are its fields'."""

import itertools

import jax
import jax.numpy as jnp
import pytest

from jaxdist.models import mlp


@pytest.mark.parametrize("num_layers", [0, 1, 3])
def test_num_layers_counts_the_hidden_layers(num_layers):
    model = mlp.MLP(5, width=7, num_layers=num_layers)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((2, 4, 3)), train=False))
    kernels = [shapes["params"][f"Dense_{index}"]["kernel"].shape for index in range(num_layers + 1)]
    sizes = [12, *[7] * num_layers, 5]
    assert kernels == list(itertools.pairwise(sizes))
    assert len(shapes["params"]) == num_layers + 1
