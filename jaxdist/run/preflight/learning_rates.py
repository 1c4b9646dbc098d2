"""Whether a user's schedule gives a learning rate at every step of a run."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdist import optimizers
from jaxdist.errors import ConfigError

_MOST_STEPS = 1 << 20


def check_rates(
    optimizer: optimizers.Optimizer, *, global_batch_size: int, steps_per_epoch: int | None, max_steps: int | None
) -> None:
    """Raise ConfigError where a function given as a schedule gives a rate that is negative, infinite or NaN.

    It is called for every step up to the last one, at most 2**20. Nothing is said of a run without a last step.

    Args:
      optimizer: the description.
      global_batch_size: examples of a step.
      steps_per_epoch: the steps of an epoch.
      max_steps: the last step of the run, None if unknown.
    """
    if max_steps is None or not (callable(optimizer.schedule) or callable(optimizer.learning_rate)):
        return
    schedule = optimizers.make_schedule(
        optimizer, global_batch_size=global_batch_size, steps_per_epoch=steps_per_epoch, max_steps=max_steps
    )
    try:
        rates = np.asarray(jax.vmap(lambda count: schedule(count))(jnp.arange(min(max_steps, _MOST_STEPS))))
    except Exception:
        return  # a function that cannot be called for many steps at once is tried in each
    bad = np.flatnonzero(~(np.isfinite(rates) & (rates >= 0)))
    if bad.size:
        raise ConfigError(_told(optimizer, int(bad[0]), rates, max_steps))


def _told(optimizer: Any, count: int, rates: np.ndarray, last: int) -> str:
    name = "learning_rate" if callable(optimizer.learning_rate) else "schedule"
    return (
        f"The function given as optimizer.{name} must give a finite rate of at least 0 at every step; after {count} "
        f"finished steps of {last} the rate is {rates[count]:g}. Correct the function (jnp.maximum, jnp.where), or end "
        "the run before (stop.max_steps)."
    )
