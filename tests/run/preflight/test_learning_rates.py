import jax.numpy as jnp
import optax
import pytest

from jaxdist import optimizers
from jaxdist.errors import ConfigError
from jaxdist.run import preflight


def check(function, max_steps=12, *, name="schedule", learning_rate=0.1):
    given = {"learning_rate": learning_rate, name: function}
    optimizer = optimizers.Optimizer(name="sgd", **given)
    preflight.check_rates(optimizer, global_batch_size=8, steps_per_epoch=4, max_steps=max_steps)


@pytest.mark.parametrize(
    ("function", "count", "rate"),
    [
        (lambda step: 1 / (5 - step), 5, "inf"),
        (lambda step: jnp.log(5.0 - step), 5, "-inf"),
        (lambda step: jnp.sqrt(7.0 - step), 8, "nan"),
        (lambda step: 0.1 - 0.02 * step, 6, "-0.02"),
    ],
)
def test_a_function_that_gives_no_rate_at_some_step_is_refused_with_the_step(function, count, rate):
    wanted = rf"optimizer.learning_rate must give.*after {count} finished steps of 12 the rate is {rate}"
    with pytest.raises(ConfigError, match=wanted):
        check(function, name="learning_rate")
    check(function, count if rate != "-inf" else 4, name="learning_rate")  # up to there all is well
    check(function, None, name="learning_rate")


def test_a_fraction_of_the_peak_is_checked_too():
    with pytest.raises(ConfigError, match=r"optimizer.schedule must give.*the rate is nan"):
        check(lambda step: jnp.where(step == 3, jnp.nan, 1.0))
    check(optax.cosine_decay_schedule(1.0, 5))
    check(optax.cosine_decay_schedule(0.1, 5), name="learning_rate")
