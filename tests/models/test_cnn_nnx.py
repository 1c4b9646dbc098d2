"""The CNN in NNX is the CNN in Linen."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxdist.models import cnn, cnn_nnx


@pytest.mark.parametrize("batch_norm", [False, True])
def test_with_the_same_params_both_give_the_same_logits(batch_norm):
    model = cnn_nnx.CNN(5, width=2, num_stages=2, batch_norm=batch_norm)(nnx.Rngs(0))
    linen = cnn.CNN(5, width=2, num_stages=2, batch_norm=batch_norm)
    params = {"Dense_0": {name: getattr(model.head, name).get_value() for name in ("kernel", "bias")}}
    for index, layer in enumerate(model.layers):
        params[f"Conv_{index}"] = {"kernel": layer.conv.kernel.get_value()}
        if batch_norm:
            params[f"BatchNorm_{index}"] = {
                "norm": {"scale": jnp.ones(2 * (1 + index // 2)), "bias": jnp.zeros(2 * (1 + index // 2))}
            }
        else:
            params[f"Conv_{index}"]["bias"] = layer.conv.bias.get_value()
    images = jax.random.normal(jax.random.key(1), (3, 8, 8, 1))
    mask = jnp.array([True, True, False])
    expected, _ = linen.apply({"params": params}, images, train=True, mask=mask, mutable=["batch_stats"])
    np.testing.assert_allclose(model(images, train=True, mask=mask), expected, rtol=1e-5, atol=1e-6)


def test_the_hyperparameters_are_a_frozen_value():
    assert cnn_nnx.CNN(5, width=2) == cnn_nnx.CNN(5, width=2)
    assert hash(cnn_nnx.CNN(5)) == hash(cnn_nnx.CNN(5))
    shared = {field for field in cnn.CNN.__dataclass_fields__ if field not in {"parent", "name"}}
    assert shared == set(cnn_nnx.CNN.__dataclass_fields__) - {"image_shape"}
