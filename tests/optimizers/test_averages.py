"""The params in use: the moving average of the params, and the average that schedule-free optimizers train."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib
from optimizer_cases import make_params, train

from jaxdist import optimizers
from jaxdist.optimizers import Optimizer


def test_the_average_follows_the_params():
    params, opt_state = train(
        optimizers.build(Optimizer(name="sgd", learning_rate=0.1, ema_decay=0.3), global_batch_size=1)
    )
    plain = optimizers.build(Optimizer(name="sgd", learning_rate=0.1), global_batch_size=1)
    average = make_params()
    for step in range(1, 6):
        decay = min(0.3, (1 + step) / (10 + step))
        after, _ = train(plain, step)
        average = jax.tree.map(lambda old, new, decay=decay: decay * old + (1 - decay) * new, average, after)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), optimizers.ema_params(opt_state), average)
    jax.tree.map(np.testing.assert_array_equal, params, train(plain)[0])


def test_the_average_is_found_wherever_it_stands():
    built = optax.chain(optax.masked(optimizers.ema(0.9), True), optax.identity())
    params = {"x": jnp.ones(3, jnp.bfloat16)}
    found = optimizers.ema_params(built.init(params))
    assert found["x"].dtype == jnp.float32
    assert optimizers.ema_params(optax.adam(0.1).init(params)) is None
    with pytest.raises(ValueError, match="opt_state, params"):
        optimizers.ema(0.9).update(params, optimizers.ema(0.9).init(params))


def test_the_average_is_a_copy_that_survives_donation():
    built = optimizers.build(Optimizer(name="sgd", learning_rate=0.1, ema_decay=0.9), global_batch_size=1)

    @jax.jit
    def init():
        params = make_params()
        return params, built.init(params)

    params, opt_state = init()
    step = jax.jit(lambda params, opt_state: built.update(params, opt_state, params), donate_argnums=(0, 1))
    _, opt_state = step(params, opt_state)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(optimizers.ema_params(opt_state)))


def test_the_average_of_complex_params_keeps_their_imaginary_part():
    average = optimizers.ema(0.5)
    params = {"w": jnp.full(2, 1 + 2j)}
    _, state = average.update(jax.tree.map(jnp.zeros_like, params), average.init(params), params)
    np.testing.assert_allclose(state.params["w"], params["w"])


def test_the_params_of_a_schedule_free_optimizer_are_used_as_optax_says():
    optimizer = contrib.schedule_free_sgd(0.1)
    params, opt_state = train(optimizer)
    expected = contrib.schedule_free_eval_params(opt_state, params)
    assert np.abs(expected["kernel"] - params["kernel"]).max() > 0.01
    clipped, clipped_state = train(optax.chain(optax.clip(9.0), optimizer))
    for found in (optimizers.params_in_use(params, opt_state), optimizers.params_in_use(clipped, clipped_state)):
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), found, expected)
    assert optimizers.keeps_average(opt_state)


@pytest.mark.parametrize("average", [lambda: contrib.schedule_free_sgd(0.1), lambda: optimizers.ema(0.9)])
def test_params_without_an_average_are_used_as_they_are(average):
    labels = {"kernel": "averaged", "bias": "plain", "scale": "plain"}
    optimizer = optax.multi_transform({"averaged": average(), "plain": optax.sgd(0.1)}, labels)
    params, opt_state = train(optimizer)
    found = optimizers.params_in_use(params, opt_state)
    assert np.abs(found["kernel"] - params["kernel"]).max() > 0.01
    assert found["bias"] is params["bias"]
    assert found["scale"] is params["scale"]
    plain, plain_state = train(optax.sgd(0.1))
    assert optimizers.params_in_use(plain, plain_state) is plain
    assert not optimizers.keeps_average(plain_state)
