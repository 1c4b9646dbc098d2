import contextlib
import dataclasses
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_experiment

import jaxdist
from jaxdist import adapters, losses
from jaxdist.errors import ConfigError
from jaxdist.run import components


def compares_examples(outputs, batch):
    return jnp.square(outputs - outputs.mean(axis=0, keepdims=True)).sum(axis=1), {}


@pytest.mark.parametrize(
    ("changes", "num_devices", "together"),
    [({}, 1, None), ({}, 2, 8), ({"num_microbatches": 2}, 1, 8), ({"reduction": "canonical"}, 1, 2)],
)
def test_a_loss_that_compares_the_examples_of_a_part_is_told(changes, num_devices, together):
    experiment = dataclasses.replace(
        tiny_experiment.get_config(), loss=compares_examples, stop=jaxdist.Stop(max_steps=1)
    )
    experiment = dataclasses.replace(experiment, global_batch_size=16, **changes)
    end = r"on other devices\.$" if changes else r"losses\.WholeBatch\(loss\) compares those of all devices\.$"
    expected = contextlib.nullcontext() if together is None else pytest.warns(
        UserWarning, match=rf"by compares_examples \(.*\), depends on .* These are {together} of the 16 .* {end}"
    )  # fmt: skip
    with expected:
        components.put_together(experiment, devices=jax.devices()[:num_devices])


@pytest.mark.parametrize(
    ("changes", "named"),
    [({"num_microbatches": 2}, "num_microbatches=2"), ({"reduction": "canonical"}, "reduction=canonical")],
)
def test_a_loss_of_the_whole_batch_is_refused_where_only_parts_are_together(changes, named):
    experiment = tiny_experiment.get_config()
    experiment = dataclasses.replace(experiment, loss=losses.WholeBatch(experiment.loss), **changes)
    with pytest.raises(ConfigError, match=rf"WholeBatch needs the whole batch at the same time, and {named}"):
        components.put_together(experiment, devices=jax.devices()[:2])


def ratio(batch, predicted):
    """Return the precision of a batch, a ratio of two sums over its examples."""
    counted = (predicted > 0) * batch["mask"]
    return (counted * (batch["label"] > 2)).sum() / jnp.maximum(counted.sum(), 1.0)


METRICS = {
    "a mean": lambda values, batch: (values * batch["mask"]).sum() / jnp.maximum(batch["mask"].sum(), 1.0),
    "a Mean": lambda values, batch: jaxdist.Mean((values * batch["mask"]).sum(), batch["mask"].sum()),
    "a Mean with a count of its own": lambda values, batch: jaxdist.Mean(
        (values * batch["mask"] * (batch["label"] > 2)).sum(), (batch["mask"] * (batch["label"] > 2)).sum()
    ),
    "a ratio": lambda values, batch: ratio(batch, values),
    "scaled by the batch": lambda values, batch: (values / jnp.abs(values).max() * batch["mask"]).mean(),
}
MIXED_METRICS = ["a ratio", "scaled by the batch"]


@pytest.mark.parametrize("num_held_out", [16, 40])
@pytest.mark.parametrize("metric", METRICS)
def test_a_metric_that_mixes_the_held_out_examples_is_told(metric, num_held_out):
    random = np.random.default_rng(0)
    fields = {
        "x": random.normal(size=(40, 3)).astype(np.float32),
        "label": random.integers(0, 5, 40).astype(np.int32),
    }

    def loss_fn(params, batch, key):
        values = batch["x"] @ params["w"]
        return METRICS["a mean"](jnp.square(values), batch), {}

    def eval_fn(params, batch, key):
        return loss_fn(params, batch, key)[0], {"mine": METRICS[metric](batch["x"] @ params["w"], batch)}

    experiment = jaxdist.Experiment(
        name="mixing",
        model=adapters.Functions(lambda key: {"w": jax.random.normal(key, (3,))}, loss_fn, eval_fn),
        loss=None,
        data=jaxdist.Data(train=fields, eval={name: field[:num_held_out] for name, field in fields.items()}),
        optimizer=jaxdist.Optimizer(name="sgd", learning_rate=0.1),
        global_batch_size=20,
        stop=jaxdist.Stop(max_steps=1),
    )
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        components.put_together(experiment, devices=jax.devices()[:1])
    said = [str(each.message) for each in found if "held-out examples are in a batch" in str(each.message)]
    assert len(said) == (metric in MIXED_METRICS and num_held_out > 20), said
    assert all("mine, of eval_fn" in each for each in said)
