"""muP beside multipliers computed by hand in plain JAX and optax; at the base width it is the standard model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_experiment

import jaxdist
from jaxdist.models import gpt, mlp, mup
from jaxdist.run import components

TOKENS = jnp.arange(12).reshape(2, 6) % 11
IMAGES = jax.random.normal(jax.random.key(1), (5, 6))
SMALL = gpt.GPT(11, 6, num_layers=2, num_heads=2, width=8, tie_embeddings=False)


def params_of(model, inputs, seed=0):
    return jax.jit(lambda key: model.init(key, inputs, train=False)["params"])(jax.random.key(seed))


@pytest.mark.slow
@pytest.mark.parametrize("model", [SMALL, SMALL.clone(tie_embeddings=True)], ids=["untied", "tied"])
def test_at_the_base_width_a_gpt_has_the_bits_of_the_standard_one(model):
    base = model.clone(base_width=model.width)
    jax.tree.map(np.testing.assert_array_equal, params_of(model, TOKENS), params_of(base, TOKENS))
    params = params_of(model, TOKENS)
    outputs = [
        jax.jit(lambda params, each=each: each.apply({"params": params}, TOKENS, train=False))(params)
        for each in (model, base)
    ]
    np.testing.assert_allclose(*outputs, rtol=1e-6)


def test_at_the_base_width_an_mlp_has_the_bits_of_the_standard_one():
    model = mlp.MLP(num_classes=3, width=8)
    jax.tree.map(np.testing.assert_array_equal, params_of(model, IMAGES), params_of(model.clone(base_width=8), IMAGES))


def test_the_logits_of_a_wide_mlp_are_those_of_the_formula():
    model = mlp.MLP(num_classes=3, width=32, base_width=8)
    params = params_of(model, IMAGES)
    hidden = jax.nn.relu(IMAGES @ params["Dense_0"]["kernel"])  # biases are 0 at the start
    hidden = jax.nn.relu(hidden @ params["Dense_1"]["kernel"])
    logits = hidden @ params["Dense_2"]["kernel"] / 4
    np.testing.assert_allclose(model.apply({"params": params}, IMAGES, train=False), logits, rtol=1e-4, atol=1e-6)


def spread(kernel):
    return float(jnp.std(kernel))


def test_variances_are_those_of_the_table():
    wide, base = 512, 64
    made = params_of(mlp.MLP(num_classes=256, width=wide, base_width=base), IMAGES)
    assert spread(made["Dense_0"]["kernel"]) == pytest.approx(6**-0.5, rel=0.05)
    assert spread(made["Dense_1"]["kernel"]) == pytest.approx(wide**-0.5, rel=0.02)
    assert spread(made["Dense_2"]["kernel"]) == pytest.approx(base**-0.5, rel=0.02)
    made = params_of(
        gpt.GPT(64, 32, num_layers=1, num_heads=2, width=wide, base_width=base, tie_embeddings=False),
        jnp.zeros((1, 4), jnp.int32),
    )
    block, m = made["block_0"], wide / base
    assert spread(made["token_embedding"]["embedding"]) == pytest.approx(0.02, rel=0.05)
    assert spread(made["head"]["kernel"]) == pytest.approx(0.02, rel=0.05)
    assert spread(block["attention"]["qkv"]["kernel"]) == pytest.approx(0.02 / m**0.5, rel=0.02)
    assert spread(block["mlp_out"]["kernel"]) == pytest.approx(0.02 / (2 * m) ** 0.5, rel=0.02)


def test_attention_of_a_wide_gpt_divides_by_the_size_of_a_head():
    model = SMALL.clone(width=32, base_width=8)
    head, base_head = 32 / 2, 8 / 2
    assert model._attention_scale() == pytest.approx(base_head**0.5 / head)
    assert SMALL.clone(base_width=8)._attention_scale() == pytest.approx(base_head**-0.5)


ROLES = {
    "mlp": {
        "Dense_0/kernel": "vector", "Dense_0/bias": "vector", "Dense_1/kernel": "hidden", "Dense_1/bias": "vector",
        "Dense_2/kernel": "output", "Dense_2/bias": "vector",
    },
    "gpt": {
        "token_embedding/embedding": "vector", "position_embedding": "vector", "block_0/attention/qkv/kernel": "hidden",
        "block_0/attention/out/kernel": "hidden", "block_1/mlp_in/kernel": "hidden", "block_1/mlp_out/kernel": "hidden",
        "block_1/mlp_in/bias": "vector", "block_0/mlp_norm/scale": "vector", "final_norm/bias": "vector",
        "head/kernel": "output",
    },
}  # fmt: skip


@pytest.mark.parametrize(("model", "roles"), [(mlp.MLP(3), ROLES["mlp"]), (SMALL, ROLES["gpt"])])
def test_every_param_has_its_role(model, roles):
    assert {path: model.width_role(path) for path in roles} == roles


@pytest.mark.parametrize(
    ("optimizer", "factors"),
    [
        ("adam", (1, 0.25, 1)),
        ("adamw", (1, 0.25, 1)),
        ("lion", (1, 0.25, 1)),
        ("sgd", (4, 1, 4)),
        ("momentum", (4, 1, 4)),
    ],
)
def test_learning_rates_are_those_of_the_table(optimizer, factors):
    assert tuple(mup.rate_factor(role, optimizer, 4.0) for role in ("vector", "hidden", "output")) == factors


def by_hand(name, grads, params, rate, decay):
    """Return the updates of one step in plain optax, with the factors of the table at 4 times the base width."""
    factors = {"adamw": {"Dense_1": 0.25}, "sgd": {"Dense_0": 4, "Dense_2": 4}}[name]
    rule = optax.scale_by_adam() if name == "adamw" else optax.identity()
    raw, _ = rule.update(grads, rule.init(params))
    updates = {}
    for layer, leaves in raw.items():
        updates[layer] = {}
        for leaf, value in leaves.items():
            factor = 4 if name == "sgd" and leaf == "bias" else factors.get(layer, 1) if leaf == "kernel" else 1
            updates[layer][leaf] = -rate * (factor * value + (decay * params[layer][leaf] if leaf == "kernel" else 0))
    return updates


@pytest.mark.parametrize(("name", "decay"), [("adamw", 0.1), ("sgd", 0.0)])
def test_a_step_is_that_of_plain_optax_with_the_multipliers_by_hand(name, decay):
    model = mlp.MLP(num_classes=2, width=32, num_layers=2, base_width=8)
    described = jaxdist.Optimizer(name=name, learning_rate=0.01, weight_decay=decay)
    experiment = dataclasses.replace(tiny_experiment.get_config(), model=model, optimizer=described)
    optimizer, _ = components.make_optimizer(experiment, {"steps_per_epoch": 4, "max_steps": 10})
    params = params_of(model, IMAGES)
    grads = jax.tree.map(lambda leaf: jnp.cos(jnp.arange(leaf.size, dtype=jnp.float32)).reshape(leaf.shape), params)
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    jax.tree.map(
        lambda ours, theirs: np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-9),
        updates,
        by_hand(name, grads, params, 0.01, decay),
    )


@pytest.mark.parametrize("optimizer", [optax.adam(1e-3), jaxdist.Optimizer(name="adafactor", learning_rate=0.1)])
def test_an_optimizer_whose_factors_are_not_known_is_refused(optimizer):
    experiment = dataclasses.replace(
        tiny_experiment.get_config(), model=mlp.MLP(2, width=32, base_width=8), optimizer=optimizer
    )
    with pytest.raises(ValueError, match=r"muP .* knows how for sgd"):
        components.make_optimizer(experiment, {"steps_per_epoch": 4, "max_steps": 10})


def test_a_model_without_a_base_width_has_no_factors():
    assert mup.rate_factors(mlp.MLP(2), "adam") is None
    assert mup.rate_factors(object(), None) is None
