"""Which params decay, and what groups of params change."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from optimizer_cases import make_params

from jaxdist import optimizers
from jaxdist.optimizers import Group, Optimizer


@pytest.mark.parametrize(
    ("path", "num_dims", "decayed"),
    [
        ("Dense_0/kernel", 2, True),
        ("layers/Dense_0/kernel", 3, True),
        ("embed/embedding", 2, True),
        ("position_embedding", 2, True),
        ("first", 2, True),
        ("Dense_0/bias", 1, False),
        ("MultiHeadDotProductAttention_0/query/bias", 2, False),
        ("layers/Dense_0/bias", 2, False),
        ("layers/LayerNorm_0/scale", 2, False),
        ("layers/final_norm/weights", 2, False),
        ("block/b1", 2, False),
        ("scale", 0, False),
    ],
)
def test_weight_decay_is_for_matrices_by_what_a_param_is(path, num_dims, decayed):
    assert optimizers.decays(path, num_dims) == decayed


def test_the_biases_and_scales_of_scanned_layers_and_of_attention_are_not_decayed():
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            x = nn.LayerNorm()(x + nn.MultiHeadDotProductAttention(2)(x, x))
            return nn.Dense(x.shape[-1])(x), None

    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)()(x, None)[0]

    params = jax.eval_shape(lambda: Stack().init(jax.random.key(0), jnp.ones((1, 4, 8))))["params"]
    described = Optimizer(name="adamw", learning_rate=0.1, weight_decay=0.1)
    decayed = {each.path.split("/")[-1] for each in optimizers.describe(described, params) if each.decays}
    kept = {each.path.split("/")[-1] for each in optimizers.describe(described, params) if not each.decays}
    assert (decayed, kept) == ({"kernel"}, {"bias", "scale"})


def test_groups_have_a_learning_rate_a_decay_and_a_freeze_of_their_own():
    groups = (Group(pattern="^kernel", learning_rate=0.5, decay=False), Group(pattern="bias", frozen=True))
    described = Optimizer(
        name="sgd", learning_rate=1.0, weight_decay=0.1, decay_mask="all", groups=groups, clip_norm=1e3
    )
    built = optimizers.build(described, global_batch_size=1)
    params, grads = make_params(), make_params(1)
    updates, _ = built.update(grads, built.init(params), params)
    np.testing.assert_allclose(updates["kernel"], -0.5 * grads["kernel"], rtol=1e-6)
    np.testing.assert_array_equal(updates["bias"], np.zeros(5))
    np.testing.assert_allclose(updates["scale"], -(grads["scale"] + 0.1 * params["scale"]), rtol=1e-6)
    assert [tuple(each) for each in optimizers.describe(described, params)] == [
        ("bias", False, 1.0, True),
        ("kernel", False, 0.5, False),
        ("scale", True, 1.0, False),
    ]


def test_a_frozen_param_counts_in_no_norm():
    described = Optimizer(name="sgd", learning_rate=1.0, clip_norm=1.0, groups=(Group(pattern="bias", frozen=True),))
    built = optimizers.build(described, global_batch_size=1)
    grads = {"kernel": jnp.full((2, 2), 0.5), "bias": jnp.full(3, 100.0)}
    updates, _ = built.update(grads, built.init(grads), grads)
    np.testing.assert_allclose(updates["kernel"], np.full((2, 2), -0.5), rtol=1e-6)


def test_a_group_that_matches_nothing_is_refused():
    described = Optimizer(name="sgd", learning_rate=1.0, groups=(Group(pattern="kernels"),))
    with pytest.raises(ValueError, match=r"nothing matches 'kernels'. The nearest param is kernel"):
        optimizers.build(described, global_batch_size=1).init(make_params())
