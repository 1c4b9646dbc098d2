import dataclasses
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
import tiny_experiment

from jaxdist import adapters, errors, losses
from jaxdist.config import overrides
from jaxdist.errors import ConfigError
from jaxdist.run import components, preflight
from jaxdist.spmd.metrics import masked_mean


@pytest.fixture(scope="module")
def traced():
    experiment = tiny_experiment.get_config()
    parts = components.put_together(experiment, devices=jax.devices()[:1])
    shapes = components.example_batch(parts.loader)
    return experiment, parts.functions, parts.abstract_state, shapes


def check(traced, *assignments, **eval_shapes):
    experiment, functions, abstract, shapes = traced
    held_out = {**shapes, **eval_shapes} if eval_shapes is not None else None
    held_out = {name: shape for name, shape in held_out.items() if shape is not None}
    preflight.check(overrides.override(experiment, assignments), functions, abstract, shapes, {"": held_out}, None)


def test_what_is_right_passes(traced):
    check(traced, "stop.target=0.9", "checkpoints.best_metric=train/accuracy")


def test_held_out_examples_may_have_more_fields_but_not_fewer(traced):
    check(traced, name=jax.ShapeDtypeStruct((16,), "int32"))
    with pytest.raises(ConfigError, match=r"need the fields of the training examples; label is missing"):
        check(traced, label=None)


def test_held_out_examples_of_another_width_are_refused_with_the_place(traced):
    with pytest.raises(
        ConfigError, match=r"evaluation fails on the examples of data\.eval: .*mlp\.py:\d+, in __call__"
    ):
        check(traced, image=jax.ShapeDtypeStruct((16, 3), "float32"))


def test_a_metric_that_never_comes_is_refused_with_the_nearest(traced):
    with pytest.raises(ConfigError, match=r"Did you mean 'eval/accuracy'\?"):
        check(traced, "stop.target=0.9", "stop.target_metric=eval/acuracy")


def plain(loss):
    """Return the tiny experiment with plain functions; `loss(params, batch)` gives the loss."""
    functions = adapters.Functions(
        lambda key: {"w": jnp.zeros((tiny_experiment.NUM_FEATURES, 1))},
        lambda params, batch, key: (loss(params, batch), {}),
        lambda params, batch, key: (loss(params, batch), {}),
    )
    return dataclasses.replace(tiny_experiment.get_config(), model=functions, loss=None)


def squared(params, batch):
    return jnp.square((batch["image"] @ params["w"])[:, 0] - batch["label"])


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda params, batch: masked_mean(squared(params, batch)), "count of the Mean 'loss' does not depend on it"),
        (
            lambda params, batch: masked_mean(
                jnp.square(batch["image"] @ params["w"] - batch["label"][None]), batch["mask"]
            ),
            r"shape \(B, B\).*test_losses_and_metrics\.py:\d+, in ",
        ),
        (
            lambda params, batch: masked_mean(jnp.round(squared(params, batch)), batch["mask"]),
            "that of every param is 0 here",
        ),
    ],
    ids=["no mask", "broadcast", "no gradient"],
)
def test_plain_functions_that_train_on_something_else_are_refused(loss, message):
    with pytest.raises(ValueError) as caught, errors.as_user_error():
        components.put_together(plain(loss), devices=jax.devices()[:1])
    assert re.search(message, str(caught.value))


def test_plain_functions_that_are_right_pass_also_those_for_one_number_of_examples():
    def for_sixteen(params, batch):
        return masked_mean(squared(params, batch).reshape(16), batch["mask"])

    components.put_together(plain(for_sixteen), devices=jax.devices()[:1])
    components.put_together(plain(lambda params, batch: for_sixteen(params, batch).value), devices=jax.devices()[:1])


def test_a_constant_gradient_is_a_gradient():
    components.put_together(plain(lambda params, batch: params["w"].sum()), devices=jax.devices()[:1])


@pytest.mark.parametrize("returned", ["the loss alone", "metrics without names"])
def test_plain_functions_that_return_something_else_are_told_what(returned):
    def loss_fn(params, batch, key):
        loss = masked_mean(squared(params, batch), batch["mask"])
        return loss if returned == "the loss alone" else (loss, loss)

    experiment = plain(lambda params, batch: None)
    message = {
        "the loss alone": r"must return \(loss, metrics\) .* it returned Mean",
        "metrics without names": "returns its metrics as a dict by name; it returned Mean",
    }[returned]
    functions = experiment.model._replace(loss_fn=loss_fn)
    with pytest.raises(ValueError, match=f"loss_fn {message}"):
        components.put_together(dataclasses.replace(experiment, model=functions), devices=jax.devices()[:1])
    good = lambda params, batch, key: (masked_mean(squared(params, batch), batch["mask"]), {})  # noqa: E731
    functions = experiment.model._replace(loss_fn=good, eval_fn=loss_fn)
    with pytest.raises(ValueError, match=r"eval_fn (must return|returns)"):
        components.put_together(dataclasses.replace(experiment, model=functions), devices=jax.devices()[:1])


def test_a_loss_beside_functions_that_have_their_own_is_refused():
    experiment = dataclasses.replace(plain(lambda params, batch: None), loss=losses.classification)
    with pytest.raises(ConfigError, match=r"would never be used; got .*classification.* Set loss=None"):
        preflight.check_settings(experiment)


class DrawsAlways(nn.Module):
    @nn.compact
    def __call__(self, image, train):
        features = image.reshape(len(image), -1)
        return nn.Dense(4)(features + jax.random.normal(self.make_rng("noise"), features.shape))


def test_a_module_that_draws_in_evaluation_is_told_so():
    experiment = dataclasses.replace(tiny_experiment.get_config(), model=DrawsAlways())
    with pytest.raises(ConfigError, match=r'needs PRNG for "noise"\. Evaluation and prediction draw nothing'):
        components.put_together(experiment, devices=jax.devices()[:1])


@pytest.mark.parametrize("ordered", [False, True])
def test_callbacks_in_order_are_refused_where_a_batch_has_parts_at_the_same_time(ordered):
    def loss(params, batch):
        values = ((batch["image"] @ params["w"])[:, 0] - batch["label"]) ** 2
        jax.debug.print("{}", values.shape[0], ordered=ordered)
        return masked_mean(values, batch["mask"])

    experiment = plain(loss)
    components.put_together(experiment, devices=jax.devices()[:1])
    for devices, changed in ((2, experiment), (1, dataclasses.replace(experiment, reduction="canonical"))):
        if ordered:
            with pytest.raises(ConfigError, match=r"callback with ordered=True .* Leave `ordered` out"):
                components.put_together(changed, devices=jax.devices()[:devices])
        else:
            components.put_together(changed, devices=jax.devices()[:devices])
