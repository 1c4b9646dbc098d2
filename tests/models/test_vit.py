"""ViT: patches."""

import jax
import jax.numpy as jnp
import pytest

from jaxdist.models import vit

MODEL = vit.ViT(5, 4, num_layers=1, num_heads=2, width=8)


def test_every_patch_and_the_class_token_have_a_position():
    shapes = jax.eval_shape(lambda: MODEL.init(jax.random.key(0), jnp.zeros((1, 8, 12, 3)), train=False))
    assert shapes["params"]["position_embedding"].shape == (1, 2 * 3 + 1, 8)


def test_patches_that_do_not_divide_the_image_are_refused():
    with pytest.raises(ValueError, match="4 and 8x10"):
        MODEL.init(jax.random.key(0), jnp.zeros((1, 8, 10, 3)), train=False)
