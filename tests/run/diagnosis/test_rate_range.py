"""The range test: its rates, its losses beside plain JAX, and what it concludes from curves that are known."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_experiment

import jaxdist
from jaxdist.errors import UserError
from jaxdist.models import mlp
from jaxdist.run import components
from jaxdist.run.diagnosis import rate_range

BASE = dataclasses.replace(
    tiny_experiment.get_config(),
    model=mlp.MLP(num_classes=2, width=8, num_layers=1),
    optimizer=jaxdist.Optimizer(name="sgd", learning_rate=0.5, base_batch_size=8),
)
RATES = np.geomspace(1e-5, 1.0, 60)


def curve(best_at, blows_at=np.inf):
    """Return losses that fall around a rate by a logistic curve, and grow from another on."""
    log = np.log10(RATES)
    falling = 2.0 - 1.5 / (1 + np.exp(-6 * (log - np.log10(best_at))))
    return falling + np.where(blows_at <= RATES, (RATES / blows_at) ** 3, 0.0)


def test_rates_are_equal_factors_apart():
    found = [float(rate_range.rate_at(1e-6, 1.0, 7, count)) for count in range(9)]
    np.testing.assert_allclose(found, [1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1, 1, 1], rtol=1e-4)


@pytest.mark.parametrize("text", ["", "1", "1:1", "2:1", "0:1", "a:b", "1e-3:inf", "nan:1", "1:2:3"])
def test_what_is_no_range_is_refused(text):
    with pytest.raises(UserError, match="such as 1e-6:1"):
        rate_range.parse(text)


@pytest.mark.parametrize("best_at", [1e-3, 1e-2])
def test_the_suggestion_is_where_the_loss_falls_steepest(best_at):
    found = rate_range.judge(list(RATES), list(curve(best_at, blows_at=0.3)))
    assert best_at / 1.5 < found.steepest < best_at * 10  # smoothing looks back
    assert found.careful == pytest.approx(RATES[np.argmin(found.smoothed)] / 10)
    assert found.setting == pytest.approx(found.steepest, rel=0.05)
    halved = rate_range.judge(list(RATES), list(curve(best_at)), scale=2.0)
    assert halved.setting == pytest.approx(halved.steepest / 2, rel=0.05)


def test_a_loss_that_never_falls_gives_no_suggestion():
    found = rate_range.judge(list(RATES), list(np.linspace(1, 2, len(RATES))))
    assert (found.steepest, found.setting) == (None, None)
    assert "no rate is suggested" in rate_range.render(found)


def test_a_loss_that_is_not_finite_at_once_is_said():
    with pytest.raises(UserError, match="got 3 before the loss was not finite"):
        rate_range.judge(list(RATES), [1.0, 2.0, 3.0])


def test_the_test_ends_where_the_smoothed_loss_is_four_times_its_least():
    losses = [1.0] * 10
    assert not rate_range.has_diverged(losses)
    while not rate_range.has_diverged(losses):
        losses.append(20.0)
    assert rate_range.smooth(losses)[-1] > 4 * min(rate_range.smooth(losses)) > rate_range.smooth(losses)[-2]


def test_smoothing_is_a_corrected_average():
    assert rate_range.smooth([3.0] * 5) == pytest.approx([3.0] * 5)
    assert rate_range.smooth([1.0, 2.0])[1] == pytest.approx((0.1 * 0.9 * 1 + 0.1 * 2) / (1 - 0.81))


def test_the_losses_are_those_of_a_loop_in_plain_jax():
    num_steps, low, high = 10, 1e-2, 1.0
    found = rate_range.run(BASE, jax.devices()[:1], low=low, high=high, num_steps=num_steps)
    parts = components.put_together(BASE, devices=jax.devices()[:1])
    params = parts.create_state().params

    def loss_fn(params, batch):
        logits = BASE.model.apply({"params": params}, batch["image"], train=False)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        return jnp.sum(losses * batch["mask"]) / jnp.sum(batch["mask"])

    losses, differentiate = [], jax.jit(jax.value_and_grad(loss_fn))
    for count, (batch, _) in zip(range(num_steps), parts.batches()):
        loss, grads = differentiate(params, batch)
        rate = low * (high / low) ** (count / (num_steps - 1))
        params = jax.tree.map(lambda param, grad, rate=rate: param - rate * grad, params, grads)
        losses.append(float(loss))
    np.testing.assert_allclose(found.losses, losses, rtol=1e-5)
    assert (len(found.rates), found.diverged, found.scale) == (num_steps, False, 2.0)
    assert len(list(itertools.islice(rate_range.render(found).splitlines(), 20))) > 10


def test_rates_that_are_not_ours_to_set_are_refused():
    for changed, message in (
        ({"optimizer": optax.sgd(0.1)}, "is inside it"),
        ({"strategy": "parameter-server"}, "a parameter server has several"),
    ):
        with pytest.raises(UserError, match=message):
            rate_range.with_rising_rate(dataclasses.replace(BASE, **changed), 1e-3, 1, 10)
