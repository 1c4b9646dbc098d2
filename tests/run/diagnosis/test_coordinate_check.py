"""The coordinate check: powers by hand, activations beside the model's own, and a model with and without muP."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_experiment

import jaxdist
from jaxdist.errors import UserError
from jaxdist.models import mlp
from jaxdist.run.diagnosis import coordinate_check

BASE = dataclasses.replace(
    tiny_experiment.get_config(),
    model=mlp.MLP(num_classes=2, width=16, num_layers=2),
    optimizer=jaxdist.Optimizer(name="adam", learning_rate=0.03),
)


def test_the_power_is_that_of_the_width():
    widths = [64, 128, 256]
    assert coordinate_check.power(widths, [3 * width**0.5 for width in widths]) == pytest.approx(0.5)
    assert coordinate_check.power(widths, [2.0] * 3) == pytest.approx(0)
    assert coordinate_check.power(widths, [0.0] * 3) == 0
    assert coordinate_check.power(widths, [1.0, math.nan, 1.0]) == math.inf


def test_the_activations_are_those_of_the_layers():
    batch = {"image": jnp.ones((3, 6))}
    params = BASE.model.init(jax.random.key(0), batch["image"], train=False)["params"]
    found = coordinate_check.activations(BASE, params, None, batch)
    first = batch["image"] @ params["Dense_0"]["kernel"]  # the bias is 0 at the start
    assert {"Dense_0", "Dense_1", "Dense_2", "output"} <= set(found)
    np.testing.assert_allclose(found["Dense_0"], first, rtol=1e-5)
    np.testing.assert_allclose(found["output"], BASE.model.apply({"params": params}, batch["image"], train=False))


def sizes(power):
    return [[1.0, 1.0], [1.0, 4.0**power]]


def test_a_layer_grows_that_grows_itself_or_whose_change_does():
    found = coordinate_check.Coordinates(
        [16, 64],
        {"flat": sizes(0), "grows": sizes(1), "changes": sizes(0), "shrinks": sizes(-1)},
        {"flat": sizes(0.1), "grows": sizes(0), "changes": sizes(0.5), "shrinks": sizes(-0.5)},
    )
    assert found.growing() == ["grows", "changes"]
    text = coordinate_check.render(found)
    assert "2 of 4 layers grow with the width: grows, changes." in text
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.slow
@pytest.mark.parametrize(("base_width", "grows"), [(16, False), (None, True)])
def test_logits_grow_with_the_width_unless_it_is_mup(base_width, grows):
    model = dataclasses.replace(BASE.model, base_width=base_width)
    experiment = dataclasses.replace(BASE, model=model)
    found = coordinate_check.check(experiment, jax.devices()[:1], widths=[16, 64, 256], num_steps=3)
    assert ("output" in found.growing()) is grows
    assert (found.growing() != []) is grows
    assert [len(found.sizes["output"]), len(found.sizes["output"][0])] == [4, 3]


@pytest.mark.parametrize(
    ("changed", "widths", "message"),
    [
        ({}, [64], "two widths or more"),
        ({}, [64, 32], "ascending"),
        ({"model": lambda rngs: None}, [32, 64], "Give it a field width"),
    ],
)
def test_what_cannot_be_compared_is_refused(changed, widths, message):
    with pytest.raises(UserError, match=message):
        coordinate_check.check(dataclasses.replace(BASE, **changed), jax.devices()[:1], widths=widths, num_steps=1)
