"""Params, updates and learning rates for the tests of optimizers."""

import jax.numpy as jnp
import numpy as np
import optax

from jaxdist import optimizers
from jaxdist.optimizers import Optimizer
from jaxdist.optimizers.schedules import Schedule


def make_params(seed=0, rows=7):
    rng = np.random.default_rng(seed)
    return {
        "kernel": jnp.asarray(rng.standard_normal((rows, 5)), jnp.float32),
        "bias": jnp.asarray(rng.standard_normal(5), jnp.float32),
        "scale": jnp.float32(1.5),
    }


def train(optimizer, steps=5, params=None):
    params = make_params() if params is None else params
    opt_state = optimizer.init(params)
    for step in range(steps):
        grads = {name: value for name, value in make_params(step + 1).items() if name in params}
        updates, opt_state = optimizer.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
    return params, opt_state


def rate(step, *, batch=32, epoch=None, last=None, learning_rate=0.8, base=None, **schedule):
    described = Optimizer(name="sgd", learning_rate=learning_rate, base_batch_size=base, schedule=Schedule(**schedule))
    return optimizers.learning_rate_at(described, step, global_batch_size=batch, steps_per_epoch=epoch, max_steps=last)
