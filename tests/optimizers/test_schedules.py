"""The shapes of schedules at their corners, and schedules that contradict themselves."""

import numpy as np
import optax
import pytest
from optimizer_cases import rate

from jaxdist import optimizers
from jaxdist.optimizers import Optimizer
from jaxdist.optimizers.schedules import Schedule


def test_exponential_and_inverse_square_root_equal_optax():
    ours = [rate(step, name="exponential", length=10, final_fraction=0.01) for step in range(1, 12)]
    theirs = optax.exponential_decay(0.8, 10, 0.01, end_value=0.008)
    np.testing.assert_allclose(ours, [theirs(step) for step in range(11)], rtol=1e-5)
    ours = [rate(step, name="inverse_sqrt", warmup=4) for step in (1, 4, 16, 100)]
    np.testing.assert_allclose(ours, [0.8 / 4, 0.8, 0.8 * 0.5, 0.8 * 0.2], rtol=1e-6)


def test_step_falls_at_each_boundary():
    rates = [rate(step, name="step", boundaries=(2, 4), decay_factor=0.5) for step in range(1, 7)]
    np.testing.assert_allclose(rates, [0.8, 0.8, 0.4, 0.4, 0.2, 0.2], rtol=1e-6)
    by_epoch = [rate(step, name="step", boundaries=(1,), unit="epochs", epoch=3) for step in (3, 4)]
    np.testing.assert_allclose(by_epoch, [0.8, 0.08], rtol=1e-6)


def test_warmup_stable_decay_is_constant_until_the_last_part():
    settings = {"name": "warmup_stable_decay", "warmup": 2, "length": 12, "decay_fraction": 0.4}
    rates = [rate(step, **settings) for step in (1, 2, 3, 9, 10, 11, 12, 13, 50)]
    np.testing.assert_allclose(rates, [0.4, 0.8, 0.8, 0.8, 0.6, 0.4, 0.2, 0.0, 0.0], atol=1e-6)


def test_one_cycle_equals_optax():
    theirs = optax.cosine_onecycle_schedule(100, 0.8, pct_start=0.3, div_factor=25, final_div_factor=1e4)
    ours = [rate(step, name="one_cycle", length=100, final_fraction=1e-4 / 25) for step in range(1, 102, 10)]
    np.testing.assert_allclose(ours, [theirs(step) for step in range(0, 101, 10)], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("schedule", "complaint"),
    [
        ({"name": "polynomial"}, "constant, cosine, linear"),
        ({"name": "exponential", "length": 5}, "never reaches 0: set"),
        ({"name": "step"}, "boundaries belong to the schedule 'step'"),
        ({"boundaries": (3,)}, "boundaries belong to the schedule 'step'"),
        ({"name": "one_cycle", "length": 5, "warmup": 1}, "one_cycle rises by itself"),
        ({"unit": "days"}, "steps, epochs"),
        ({"name": "warmup_stable_decay", "length": 5, "decay_fraction": 2.0}, "above 0 and at most 1"),
        ({"warmup": -1}, "warmup must be at least 0"),
        ({"length": 0}, "length must be above 0"),
        ({"name": "cosine"}, "Set optimizer.schedule.length .* or stop.max_steps"),
        ({"name": "linear", "length": 5, "warmup": 5}, "it ends at step 5 and the warm-up at 5"),
        ({"length": 5}, "have no effect"),
        ({"final_fraction": 0.5}, "have no effect"),
        ({"unit": "epochs", "warmup": 1}, "Set optimizer.schedule.unit to steps"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused(schedule, complaint):
    with pytest.raises(ValueError, match=complaint):
        optimizers.build(Optimizer(name="sgd", learning_rate=0.1, schedule=Schedule(**schedule)), global_batch_size=32)
