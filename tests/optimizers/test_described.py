"""Descriptions of optimizers: what can be named, overridden, and what is refused."""

import dataclasses
import math

import jax
import pytest
from optimizer_cases import make_params

from jaxdist import optimizers
from jaxdist.optimizers import Optimizer


@pytest.mark.filterwarnings("ignore:`optimistic_adam` is deprecated:DeprecationWarning")
def test_every_optimizer_of_optax_that_takes_a_learning_rate_can_be_named():
    for name in optimizers.of_optax():
        built = optimizers.build(Optimizer(name=name, learning_rate=0.01), global_batch_size=1)
        jax.eval_shape(built.init, make_params())
    assert {"adafactor", "lamb", "rmsprop", "adagrad", "radam", "yogi"} <= set(optimizers.of_optax())


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"name": "adaam"}, "sgd, momentum, nesterov, adam, adamw, lion, or .*adafactor.*Did you mean 'adam'"),
        ({"arguments": {"b1": 0.5}}, "adamw has its own settings"),
        ({"name": "adagrad", "weight_decay": 0.1}, "adagrad of optax takes .*; got mask, weight_decay"),
        ({"learning_rate": -1.0}, "learning_rate must be at least 0"),
        ({"learning_rate": math.nan}, "learning_rate must be"),
        ({"learning_rate": math.inf}, "learning_rate must be"),
        ({"clip_norm": 0.0}, "clip_norm must be above 0"),
        ({"ema_decay": 1.0}, "ema_decay must be at least 0 and below 1"),
        ({"base_batch_size": 0}, "base_batch_size must be above 0"),
        ({"weight_decay": -0.1}, "weight_decay must be at least 0"),
        ({"decay_mask": "some"}, "matrices, all"),
        ({"momentum": 0.9}, "no effect on adamw; it belongs to momentum, nesterov"),
        ({"name": "sgd", "beta1": 0.9}, "it belongs to adam, adamw, lion"),
        ({"name": "lion", "epsilon": 1e-3}, "it belongs to adam, adamw"),
        ({"name": "adam", "weight_decay": 0.1}, "Use adamw"),
        ({"decay_mask": "all"}, "Set optimizer.weight_decay"),
        ({"base_batch_size": 8}, "Set optimizer.schedule.warmup"),
    ],
)
def test_a_description_that_cannot_be_is_refused(changes, complaint):
    with pytest.raises(ValueError, match=complaint):
        optimizers.build(Optimizer(**({"name": "adamw", "learning_rate": 0.1} | changes)), global_batch_size=32)


def test_one_field_is_overridden_at_a_time():
    described = Optimizer(name="momentum", learning_rate=0.1, momentum=0.8)
    assert dataclasses.replace(described, learning_rate=3e-4).learning_rate == 3e-4
    changed = dataclasses.replace(dataclasses.replace(described, name="sgd"), momentum=None)
    optimizers.build(changed, global_batch_size=1)
