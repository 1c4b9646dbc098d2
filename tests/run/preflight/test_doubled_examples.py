"""Sums in place of means are refused in plain functions; what is right, or cannot be tried, is not."""

import contextlib
import dataclasses

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_experiment
from hypothesis import strategies

import jaxdist
from jaxdist import adapters
from jaxdist import data as data_lib
from jaxdist.data.sources.source import COUNTS
from jaxdist.errors import ConfigError
from jaxdist.run import components, preflight
from jaxdist.spmd import state

WIDTH, KEY = tiny_experiment.NUM_FEATURES, jax.random.key(0)

pytestmark = pytest.mark.usefixtures("shared_compilations")


def init_fn(key):
    return {"w": jax.random.normal(key, (WIDTH,))}


def squares(params, batch):
    return jnp.square(batch["image"] @ params["w"] - batch["label"])


def mean(params, batch):
    return jaxdist.masked_mean(squares(params, batch), batch["mask"])


def total(params, batch):
    return (squares(params, batch) * batch["mask"]).sum()


def right(params, batch):
    return ((batch["image"] @ params["w"] > 0) == (batch["label"] > 0)) * batch["mask"]


def tried(loss_fn, eval_fn=None, init_fn=init_fn, num_devices=1):
    model = adapters.Functions(init_fn, loss_fn, eval_fn or loss_fn)
    experiment = dataclasses.replace(tiny_experiment.get_config(), model=model, loss=None)
    components.put_together(experiment, devices=jax.devices()[:num_devices])


def with_metric(metric):
    return lambda params, batch, key: (mean(params, batch), {"each": metric(params, batch)})


def with_loss(loss):
    return lambda params, batch, key: (loss(params, batch), {})


SUMS = {
    "a sum": total,
    "by the size of the global batch": lambda params, batch: total(params, batch) / 16,
    "a sum and a little of something else": lambda params, batch: total(params, batch) + 1e-6 * params["w"].sum() ** 2,
}
COUNTED = {
    "rows": lambda params, batch: batch["mask"].sum(),
    "whole numbers": lambda params, batch: (batch["mask"] > 0).sum(),
    "right answers": lambda params, batch: right(params, batch).sum(),
}


@pytest.mark.parametrize("loss", SUMS.values(), ids=SUMS)
def test_a_loss_that_is_a_sum_is_refused(loss):
    with pytest.raises(ConfigError, match=r"'loss' of <lambda> \(.*\) is a sum: .* Return jaxdist\.masked_mean"):
        tried(with_loss(loss))


@pytest.mark.parametrize("metric", COUNTED.values(), ids=COUNTED)
def test_a_metric_that_is_a_sum_is_refused_also_where_only_the_evaluation_has_it(metric):
    message = r"'each' of <lambda> \(.*\) is a sum"
    with pytest.raises(ConfigError, match=message):
        tried(with_metric(metric), num_devices=2)
    with pytest.raises(ConfigError, match=message):
        tried(with_loss(mean), with_metric(metric))


OF_ALL_ROWS = {
    "values": lambda params, batch: (squares(params, batch) * batch["mask"]).mean(),
    "counts": lambda params, batch: batch["mask"].mean(),
    "right answers": lambda params, batch: jnp.where(batch["mask"] > 0, right(params, batch), 0).mean(),
}


@pytest.mark.parametrize("metric", OF_ALL_ROWS.values(), ids=OF_ALL_ROWS)
def test_a_mean_that_counts_rows_of_padding_is_refused(metric):
    message = r"'each' of <lambda> \(.*\) is a mean that counts the rows of padding.* for them and two rows of padding"
    with pytest.raises(ConfigError, match=message):
        tried(with_metric(metric))


def ratio(params, batch):
    return total(params, batch) / batch["mask"].sum()


def contrasted(params, batch):
    outputs = batch["image"] * params["w"][None]
    values = jax.nn.logsumexp(jnp.where(batch["mask"][None] > 0, outputs @ outputs.T, -1e9), axis=1)
    return jaxdist.masked_mean(values, batch["mask"]).value


def pairs(params, batch):
    """Of each example the sum of its distances to the others: it doubles with the batch, and is no sum."""
    outputs = batch["image"] @ params["w"]
    distances = jnp.square(outputs[:, None] - outputs[None]) * batch["mask"][None]
    return (distances.sum(axis=1) * batch["mask"]).sum() / batch["mask"].sum()


def normalized(params, batch):
    outputs, mask = batch["image"] @ params["w"], batch["mask"]
    center = (outputs * mask).sum() / mask.sum()
    spread = (jnp.square(outputs - center) * mask).sum() / mask.sum()
    return (jnp.square((outputs - center) / jnp.sqrt(spread + 1e-5) - batch["label"]) * mask).sum() / mask.sum()


def by_positives(params, batch):
    """Of the examples that are tried, none is positive."""
    rare = (batch["image"][:, 0] > 100) * batch["mask"]
    return total(params, batch) / jnp.maximum(rare.sum(), 1)


def by_positives_of_classes(params, batch):
    rare = (batch["image"] > 100) * batch["mask"][:, None]
    each = squares(params, batch)[:, None] * batch["mask"][:, None] / jnp.maximum(rare.sum(axis=0), 1)[None]
    return each.sum()


MEANS = {
    "by positives, or 1": by_positives,
    "by positives of each class, or 1": by_positives_of_classes,
    "a Mean": mean,
    "a ratio": ratio,
    "with weight decay": lambda params, batch: ratio(params, batch) + 0.1 * jnp.square(params["w"]).sum(),
    "contrastive": contrasted,
    "pairs": pairs,
    "batch statistics": normalized,
    "its root": lambda params, batch: jnp.sqrt(ratio(params, batch)),
    "for sixteen": lambda params, batch: ratio(params, {**batch, "image": batch["image"].reshape(16, -1)}),
    "for devices": lambda params, batch: ratio(params, batch) * (1.0 if batch["mask"].shape[0] % 16 == 0 else 1 / 0),
}
OTHERS = {
    "a number": lambda params, batch: 0.3,
    "of params": lambda params, batch: jnp.square(params["w"]).sum(),
    "of a loop": lambda params, batch: jax.lax.while_loop(
        lambda carry: carry[0] < 1, lambda carry: (1, by_positives(params, batch)), (0, 0.0)
    )[1],
    "zero": lambda params, batch: 0.0 * batch["mask"].sum(),
    "any": lambda params, batch: batch["mask"].max(),
    "NaN": lambda params, batch: jnp.nan * batch["mask"].sum(),
    "of none": lambda params, batch: jaxdist.Mean(0.0 * batch["mask"].sum(), 0.0 * batch["mask"].sum()),
    "precision": lambda params, batch: jaxdist.Mean(
        right(params, batch).sum(), ((batch["image"] @ params["w"] > 0) * batch["mask"]).sum()
    ),
    "accuracy": lambda params, batch: right(params, batch).sum() / batch["mask"].sum(),
    "difference": lambda params, batch: ratio(params, batch) - mean(params, batch).value,
}


@pytest.mark.parametrize("loss", MEANS.values(), ids=MEANS)
def test_losses_that_are_no_sums_pass(loss):
    tried(with_loss(loss))


@pytest.mark.filterwarnings("ignore:.*which held-out examples are in a batch")  # that is another question
@pytest.mark.parametrize("metric", OTHERS.values(), ids=OTHERS)
def test_metrics_that_are_no_sums_pass(metric):
    tried(with_metric(metric))


def test_of_what_draws_nothing_is_said_and_what_prints_is_not_called(capfd):
    def dropped(params, batch, key):
        kept = jax.random.bernoulli(key, 0.5, batch["image"].shape)
        return ratio(params, {**batch, "image": batch["image"] * kept}), {"kept": kept.sum() * batch["mask"].mean()}

    def printing(params, batch, key):
        jax.debug.print("called")
        return ratio(params, batch), {}

    tried(dropped, printing)
    jax.effects_barrier()
    assert "called" not in capfd.readouterr().out


@pytest.mark.parametrize("is_sum", [False, True])
def test_a_model_state_is_passed(is_sum):
    def loss_fn(params, batch, key, model_state):
        values = total(params, batch) * model_state["scale"]
        return values / (1 if is_sum else batch["mask"].sum()), {}, model_state

    def eval_fn(params, batch, key, model_state):
        return mean(params, batch), {}

    expected = pytest.raises(ConfigError, match=r"'loss' of loss_fn \(.*\) is a sum")
    with expected if is_sum else contextlib.nullcontext():
        tried(loss_fn, eval_fn, lambda key: (init_fn(key), {"scale": jnp.ones(())}))


@hypothesis.settings(max_examples=10)
@hypothesis.given(seed=strategies.integers(0, 2**31), length=strategies.integers(1, 4), data=strategies.data())
def test_means_pass_and_sums_are_refused_whatever_the_masks(seed, length, data):
    rows = strategies.lists(strategies.booleans(), min_size=length, max_size=length)
    mask = np.array([data.draw(rows), data.draw(rows)], np.float32)
    x = np.random.default_rng(seed).normal(size=(2, length)).astype(np.float32)
    loader = data_lib.Loader(jaxdist.ArraySource({"x": x, COUNTS: mask}), global_batch_size=2, seed=0)

    def values(params, batch):
        return (batch["x"] - params["b"]) ** 2 * batch["mask"]

    def means(params, batch, key):
        return values(params, batch).sum() / batch["mask"].sum(), {
            "of tokens": jaxdist.masked_mean(values(params, batch), batch["mask"]),
            "of rows": values(params, batch).sum() / batch["mask"].max(axis=1).sum(),
        }

    def sums(params, batch, key):
        loss, found = means(params, batch, key)
        return loss, {**found, "each": values(params, batch).sum()}

    check(means, loader)
    with pytest.raises(ConfigError, match="'each' of sums") if mask.any() else contextlib.nullcontext():
        check(sums, loader)


def check(loss_fn, loader):
    functions = adapters.Functions(lambda key: {"b": jnp.zeros(())}, loss_fn, loss_fn)
    experiment = dataclasses.replace(tiny_experiment.get_config(), model=functions, loss=None)
    abstract = state.TrainState(*jax.eval_shape(lambda key: (0, functions.init_fn(key), None, (), key), KEY))
    preflight.check_no_sums(experiment, functions, abstract, loader, {})
