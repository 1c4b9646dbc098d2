"""The learning rate of each step: warm-up, decay, epochs, and a batch size that changes."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from optimizer_cases import rate, train

from jaxdist import optimizers
from jaxdist.optimizers import Optimizer
from jaxdist.optimizers.schedules import Schedule


def test_constant():
    assert [rate(step) for step in (1, 2, 10**6)] == pytest.approx([0.8] * 3)
    assert [rate(step, warmup=4) for step in (1, 2, 4, 5, 6)] == pytest.approx([0.2, 0.4, 0.8, 0.8, 0.8])


def test_linear():
    rates = [rate(step, name="linear", warmup=2, last=10) for step in range(1, 13)]
    assert rates == pytest.approx([0.4, 0.8, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0, 0.0], abs=1e-6)
    assert rate(99, name="linear", length=10, final_fraction=0.25) == pytest.approx(0.2)


def test_cosine():
    rates = [rate(step, name="cosine", last=4) for step in range(1, 6)]
    assert rates == pytest.approx([0.4 * (1 + math.cos(math.pi * done)) for done in (0, 0.25, 0.5, 0.75, 1)], abs=1e-6)
    assert rate(5, name="cosine", final_fraction=0.5, last=4) == pytest.approx(0.4)


@given(
    name=st.sampled_from(["constant", "linear", "cosine"]),
    warmup=st.floats(0, 5),
    length=st.floats(6, 20),
    epoch=st.integers(1, 50),
    step=st.integers(1, 1100),
)
def test_epochs_are_that_many_steps(name, warmup, length, epoch, step):
    def at(unit, length_of_unit):
        decay = {} if name == "constant" else {"length": round(length * epoch) / length_of_unit}
        return rate(step, name=name, unit=unit, warmup=round(warmup * epoch) / length_of_unit, epoch=epoch, **decay)

    assert at("epochs", epoch) == at("steps", 1)


def test_an_offset_is_that_many_steps_more():
    described = Optimizer(name="sgd", learning_rate=0.8, schedule=Schedule(name="cosine", warmup=3))
    make = functools.partial(optimizers.make_schedule, described, global_batch_size=1, max_steps=20)
    assert [float(make(offset=5)(step)) for step in range(10)] == [float(make()(step + 5)) for step in range(10)]


def test_the_linear_scaling_rule_warms_up_from_the_unscaled_rate():
    rates = [rate(step, learning_rate=0.1, base=32, batch=128, epoch=4) for step in (1, 10, 20, 21, 99)]
    assert rates == pytest.approx([0.1 + 0.3 / 20, 0.25, 0.4, 0.4, 0.4])
    assert rate(1, learning_rate=0.1, base=32, batch=128, warmup=0) == pytest.approx(0.4)
    # A smaller batch has nothing to warm up to.
    assert rate(1, learning_rate=0.1, base=32, batch=16) == pytest.approx(0.05)
    assert rate(1, learning_rate=0.1, base=32, batch=32) == pytest.approx(0.1)


def test_a_run_that_ends_inside_its_warm_up_needs_no_other_schedule():
    schedule = Schedule(name="cosine", warmup=20)
    described = Optimizer(name="sgd", learning_rate=1.0, schedule=schedule)
    for max_steps in (5, 20, 100):
        rates = [
            optimizers.learning_rate_at(described, step, global_batch_size=1, max_steps=max_steps)
            for step in range(1, min(max_steps, 20) + 1)
        ]
        np.testing.assert_allclose(rates, [step / 20 for step in range(1, len(rates) + 1)], rtol=1e-6)


HALVED = optax.piecewise_constant_schedule(0.4, {3: 0.5})


@pytest.mark.parametrize(
    "settings",
    [
        {"learning_rate": HALVED},
        {"learning_rate": 0.1, "schedule": lambda count: 10 * HALVED(count)},
        {"learning_rate": 0.2, "base_batch_size": 2, "schedule": lambda count: jnp.where(count < 3, 4.0, 2.0)},
    ],
)
def test_a_plain_function_may_be_the_rate_or_the_schedule(settings):
    described = Optimizer(name="momentum", **settings)
    rates = [optimizers.learning_rate_at(described, step, global_batch_size=1) for step in (1, 3, 4, 8)]
    assert rates == pytest.approx([0.4, 0.4, 0.2, 0.2])
    ours, _ = train(optimizers.build(described, global_batch_size=1))
    expected, _ = train(optax.sgd(HALVED, momentum=0.9))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7), ours, expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learning_rate": HALVED, "schedule": Schedule(warmup=3)}, "gives the rate of each step by itself"),
        ({"learning_rate": HALVED, "base_batch_size": 8}, "gives the rate of each step by itself"),
        ({"learning_rate": HALVED, "schedule": HALVED}, "gives the rate of each step by itself"),
        ({"learning_rate": lambda count: 0.1 if count < 3 else 0.2}, "write jnp.where"),
        ({"learning_rate": 0.1, "schedule": lambda count: jnp.ones(2)}, r"must return a number; got the shape \(2,\)"),
    ],
)
def test_a_function_that_cannot_be_a_schedule_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        optimizers.build(Optimizer(name="sgd", **settings), global_batch_size=8)


@pytest.mark.parametrize(
    ("schedule", "base", "ends_in_epochs", "units"),
    [
        ({}, None, True, ""),
        ({}, 8, True, "epochs"),  # the warm-up of five epochs
        ({"warmup": 0}, 8, True, ""),
        ({}, 64, True, ""),  # scaled down: no warm-up
        ({"warmup": 3}, None, True, "steps"),
        ({"name": "cosine"}, None, True, "epochs"),
        ({"name": "cosine"}, None, False, "steps"),
        ({"name": "cosine", "warmup": 3}, None, True, "epochs steps"),
        ({"name": "cosine", "warmup": 3, "unit": "epochs"}, None, True, "epochs"),
        ({"name": "linear", "length": 9}, 8, True, "epochs steps"),
        ({"name": "step", "boundaries": (3,)}, None, True, "steps"),
        ({"name": "step", "boundaries": (3,), "unit": "epochs"}, 8, False, "epochs"),
        ({"name": "inverse_sqrt"}, None, True, "steps"),
    ],
)
def test_what_a_schedule_counts(schedule, base, ends_in_epochs, units):
    optimizer = Optimizer(name="sgd", learning_rate=0.1, schedule=Schedule(**schedule), base_batch_size=base)
    found = optimizers.units(optimizer, global_batch_size=32, ends_in_epochs=ends_in_epochs)
    assert " ".join(sorted(found)) == units
