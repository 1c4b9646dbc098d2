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
    with pytest.raises(ConfigError, match="An optimizer is called as update"):
        preflight.check_update(optax.lbfgs(), parts.abstract_state)
