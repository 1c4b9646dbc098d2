# ruff: noqa: NPY002 - the generators that all share are what is tested
import dataclasses
import datetime
import itertools
import os
import random
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_experiment
from flax import linen as nn

import jaxdist
from jaxdist import adapters
from jaxdist.errors import ConfigError
from jaxdist.run import components
from jaxdist.run.preflight.repeated_traces import check_same_trace

GENERATOR, COUNTER = np.random.default_rng(0), itertools.count(1)


@jax.jit
def under_jit(x):
    return x * next(COUNTER)


def seeded(x):
    np.random.seed(0)
    return x * np.random.normal()


IMPURE = {
    "numpy.random": lambda x: x + np.random.normal(size=3),
    "random": lambda x: x * random.random(),
    "a generator of the module": lambda x: x + GENERATOR.normal(size=3),
    "a new generator": lambda x: x + np.random.default_rng().normal(),
    "a clock": lambda x: x * (time.perf_counter_ns() % 10**6),
    "a date": lambda x: x * datetime.datetime.now().microsecond,
    "the system": lambda x: x * int.from_bytes(os.urandom(3), "big"),
    "a counter": lambda x: x * next(COUNTER),
    "a counted shape": lambda x: jnp.tile(x, next(COUNTER)).sum(),
    "a counted roll": lambda x: jnp.roll(x, next(COUNTER)),
    "a counted exponent": lambda x: x ** next(COUNTER),
    "an order": lambda x: jnp.stack([x, x + 1][:: 1 if next(COUNTER) % 2 else -1]),
    "a result": lambda x: (x, x + 1)[next(COUNTER) % 2],
    "a constant result": lambda x: jnp.asarray(next(COUNTER)),
    "in a loop": lambda x: jax.lax.fori_loop(0, 3, lambda _, y: y * next(COUNTER), x),
    "in a condition": lambda x: jax.lax.cond(x[0] > 0, lambda y: y * next(COUNTER), lambda y: y, x),
    "under jit": lambda x: jax.lax.map(under_jit, x),
}
PURE = {
    "a constant": lambda x: x * 3 + np.arange(3.0),
    "a seeded generator": lambda x: x + np.random.default_rng(0).normal(),
    "a generator seeded there": seeded,
    "NaN": lambda x: x + np.nan * np.ones(3),
    "an array of a key": lambda x: x + jax.random.normal(jax.random.key(0), 3),
    "a bfloat16": lambda x: x + np.ones(3, jnp.bfloat16),
    "functions of JAX": lambda x: jax.nn.softmax(jax.checkpoint(jax.nn.gelu)(x)) + jnp.where(x > 0, x, 0),
    "a callback": lambda x: jax.pure_callback(lambda y: y, jax.ShapeDtypeStruct((3,), jnp.float32), x),
    "derivatives": jax.grad(lambda x: jax.nn.relu(x).sum()),
}


@pytest.mark.parametrize("name", IMPURE)
def test_what_is_another_at_each_trace_is_told_with_its_place(name):
    with pytest.warns(UserWarning, match=r"another each time.*test_repeated_traces\.py:\d+|an(other)? .*traced\. What"):
        check_same_trace("It", IMPURE[name], [jnp.ones(3)], same_bits=False)
    with pytest.raises(ConfigError, match="is another each time that it is traced"):
        check_same_trace("It", lambda x: IMPURE[name](x), [jnp.ones(3)], same_bits=True)  # not seen before


@pytest.mark.parametrize("name", PURE)
def test_nothing_is_said_of_what_is_the_same(name):
    shapes = check_same_trace("It", PURE[name], [jnp.ones(3)], same_bits=True)
    assert shapes == jax.eval_shape(PURE[name], jnp.ones(3))


KEPT = []


def keeps(x):
    KEPT.append(x * 2)
    return x + jax.jit(lambda y: y * KEPT[0])(x)


def test_what_a_trace_before_has_left_is_not_used():
    with pytest.raises(ConfigError, match=r"It uses a value that was kept .*test_repeated_traces\.py:\d+, in keeps"):
        check_same_trace("It", keeps, [jnp.ones(3)], same_bits=False)


class Noisy(nn.Module):
    @nn.compact
    def __call__(self, image, train):
        features = image.reshape(len(image), -1)
        noise = jnp.asarray(np.random.normal(size=features.shape[1:])) if train else 0.0
        return nn.Dense(4)(features + noise)


class BegunByNumPy(nn.Module):
    @nn.compact
    def __call__(self, image, train):
        features = image.reshape(len(image), -1)
        weights = self.param("weights", lambda key: jnp.asarray(GENERATOR.normal(size=(features.shape[1], 4))))
        return features @ weights


@pytest.mark.parametrize(("model", "what"), [(Noisy(), "The model with its loss"), (BegunByNumPy(), "What creates")])
def test_a_model_that_draws_from_numpy_is_told_so_and_refused_where_bits_are_promised(model, what):
    experiment = dataclasses.replace(tiny_experiment.get_config(), model=model)
    with pytest.warns(UserWarning, match=rf"{what}.*another.*make_rng"), jax.numpy_rank_promotion("allow"):
        components.put_together(experiment, devices=jax.devices()[:1])
    same_bits = dataclasses.replace(experiment, reduction="canonical")
    with pytest.raises(ConfigError, match=rf"{what}.*another"), jax.numpy_rank_promotion("allow"):
        components.put_together(same_bits, devices=jax.devices()[:1])


@jax.custom_vjp
def scaled_backward(x):
    return x


scaled_backward.defvjp(lambda x: (x, None), lambda _, grads: (grads * next(COUNTER),))


def plain_functions(train=lambda x: x, evaluate=lambda x: x):
    def function(change):
        def mean(params, batch, key):
            return jaxdist.masked_mean(change(batch["image"] @ params["w"]) ** 2, batch["mask"]), {}

        return mean

    params = {"w": jnp.ones(tiny_experiment.NUM_FEATURES)}
    return adapters.Functions(lambda key: params, function(train), function(evaluate))


def scale_by_a_counter():
    return optax.stateless(lambda updates, params: jax.tree.map(lambda leaf: leaf * next(COUNTER), updates))


class CollectsAnother:
    names = ("score",)

    def collect(self, outputs, batch):
        return {"score": outputs[:, 0] * next(COUNTER)}

    def compute(self, rows):
        return {"score": float(rows["score"].mean())}


@pytest.mark.parametrize(
    ("what", "changes"),
    [
        ("What eval.metrics collect", {"eval": jaxdist.Evaluation(metrics=(CollectsAnother(),))}),
        ("The model with its loss", {"model": plain_functions(train=scaled_backward), "loss": None}),
        ("The evaluation", {"model": plain_functions(evaluate=lambda x: x * next(COUNTER)), "loss": None}),
        ("The update of the optimizer", {"optimizer": optax.chain(scale_by_a_counter(), optax.sgd(0.1))}),
    ],
)
def test_backward_pass_evaluation_metrics_and_optimizer_are_the_same_at_each_trace(what, changes):
    experiment = dataclasses.replace(tiny_experiment.get_config(), **changes)
    with pytest.warns(UserWarning, match=rf"{what} is another each time that it is traced, first at .*test_repe"):
        components.put_together(experiment, devices=jax.devices()[:1])
    with pytest.raises(ConfigError, match=f"{what} is another each time"):
        components.put_together(dataclasses.replace(experiment, reduction="canonical"), devices=jax.devices()[:1])
