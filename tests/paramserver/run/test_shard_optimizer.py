"""An optimizer on a server's blocks; tests/paramserver/run/test_optimizer_kind.py compares all of them with optax."""

import compile_cache
import jax
import numpy as np
import optax
import pytest

from jaxdist import optimizers
from jaxdist.optimizers import Optimizer
from jaxdist.paramserver.run.shard_optimizer import OptaxUpdater


def test_model_state_is_replaced_by_the_mean_that_was_pushed():
    updater = OptaxUpdater(optax.sgd(0.1), kind="elementwise", shapes=[(2,)], names=["w"])
    params = (np.ones(2, np.float32), np.zeros(3, np.float32))
    state = updater.init(params)
    new, _ = updater.update(
        params, state, (np.ones(2, np.float32), np.full(3, 7.0, np.float32)), step=0, scale=0.5, norm_squared=0
    )
    np.testing.assert_allclose(new[0], 0.95)
    assert (new[1] == 7.0).all()


def test_a_shard_clips_by_the_norm_over_all_shards():
    updater = OptaxUpdater(optax.clip_by_global_norm(1.0), kind="global_norm", shapes=[(2,)], names=["w"])
    params, grads = (np.zeros(2, np.float32),), (np.asarray([3.0, 0.0], np.float32),)
    new, _ = updater.update(params, updater.init(params), grads, step=0, scale=1.0, norm_squared=25.0)
    np.testing.assert_allclose(new[0], [0.6, 0.0], rtol=1e-6)


def test_another_learning_rate_is_another_input_of_the_same_program(tmp_path):
    missed, counts, found = [], [], []

    def listen(event, **_):
        if event == "/jax/compilation_cache/cache_misses":
            missed.append(event)

    jax.monitoring.register_event_listener(listen)
    with compile_cache.compile_once(tmp_path):
        for rate in (0.1, 0.3):
            optimizer = optimizers.build(Optimizer(name="sgd", learning_rate=rate), global_batch_size=1)
            updater = OptaxUpdater(optimizer, kind="elementwise", shapes=[(2,)], names=["w"])
            ones = (np.ones(2, np.float32),)
            new, _ = updater.update(ones, updater.init(ones), ones, step=0, scale=1.0, norm_squared=0.0)
            found.append(float(new[0][0]))
            counts.append(len(missed))
    jax.monitoring.unregister_event_listener(listen)
    assert found == pytest.approx([0.9, 0.7])
    assert 0 < counts[0] == counts[1]
