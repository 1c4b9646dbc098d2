"""The CNN's stages and optional normalisation."""

import jax
import jax.numpy as jnp
import pytest

from jaxdist.models import cnn


@pytest.mark.parametrize("num_stages", [1, 2, 3])
@pytest.mark.parametrize("batch_norm", [False, True])
def test_each_stage_halves_the_image_and_doubles_the_channels(num_stages, batch_norm):
    model = cnn.CNN(5, width=3, num_stages=num_stages, batch_norm=batch_norm)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((2, 8, 8, 1)), train=False))
    features = (8 // 2**num_stages) ** 2 * 3 * 2 ** (num_stages - 1)
    assert shapes["params"]["Dense_0"]["kernel"].shape == (features, 5)
    assert ("batch_stats" in shapes) == batch_norm
    assert ("bias" in shapes["params"]["Conv_0"]) != batch_norm
