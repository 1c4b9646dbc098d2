"""ResNet's blocks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdist.models import resnet

IMAGES = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))


@pytest.mark.parametrize("kind", ["basic", "bottleneck"])
def test_a_new_block_without_projection_is_the_identity_followed_by_relu(kind):
    channels = 2 * resnet.EXPANSION[kind]
    x = jax.random.normal(jax.random.key(0), (2, 4, 4, channels))
    block = resnet.Block(kind, 2, 1, train=False)
    y, variables = jax.jit(block.init_with_output)(jax.random.key(1), x, None)
    np.testing.assert_array_equal(y, jnp.maximum(x, 0))
    assert len([name for name in variables["params"] if name.endswith("_conv")]) == (2 if kind == "basic" else 3)


def test_every_stage_but_the_first_halves_the_image():
    for small_images, height in ((True, 8), (False, 2)):
        model = resnet.ResNet(5, (1, 1), width=2, small_images=small_images)
        shapes = jax.eval_shape(
            lambda model=model: model.init_with_output(
                jax.random.key(0), IMAGES, train=False, capture_intermediates=True, mutable=True
            )[1]["intermediates"]
        )
        outputs = [shapes[f"stage_{stage}_block_0"]["__call__"][0].shape for stage in range(2)]
        assert outputs == [(2, height, height, 2), (2, height // 2, height // 2, 4)]


def test_an_unknown_kind_of_block_is_refused():
    with pytest.raises(ValueError, match=r"basic.*bottleneck.*'wide'"):
        resnet.ResNet(5, (1,), "wide").init(jax.random.key(0), IMAGES, train=False)
