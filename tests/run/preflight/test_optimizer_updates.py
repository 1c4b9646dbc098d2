import dataclasses

import jax
import jax.numpy as jnp
import optax
import pytest
import tiny_experiment

from jaxdist import optimizers
from jaxdist.errors import ConfigError
from jaxdist.run import components, preflight


def test_groups_that_leave_nothing_to_train_are_refused():
    params = {"first": jnp.zeros((2, 2)), "second": jnp.zeros(2)}
    some, every = (
        optimizers.Optimizer(name="sgd", learning_rate=0.1, groups=(optimizers.Group(pattern=pattern, frozen=True),))
        for pattern in ("first", "first|second")
    )
    preflight.check_groups(some, params)
    with pytest.raises(ConfigError, match="Training needs a param that changes"):
        preflight.check_groups(every, params)


def test_an_optimizer_that_needs_more_than_gradients_is_refused():
    parts = components.put_together(tiny_experiment.get_config(), devices=jax.devices()[:1])
    preflight.check_update(parts.optimizer, parts.abstract_state)
    with pytest.raises(ConfigError, match=r"without a function that computes the loss again.*linesearch=None"):
        preflight.check_update(optax.lbfgs(), parts.abstract_state)


def test_an_optimizer_that_needs_the_loss_is_refused_where_there_is_none():
    abstract = components.put_together(tiny_experiment.get_config(), devices=jax.devices()[:1]).abstract_state
    optimizer = optax.polyak_sgd(0.1)
    abstract = dataclasses.replace(abstract, opt_state=optimizer.init(abstract.params))
    preflight.check_update(optimizer, abstract)
    with pytest.raises(ConfigError, match="without the value of the loss, which no server has"):
        preflight.check_update(optimizer, abstract, gives_value=False)
