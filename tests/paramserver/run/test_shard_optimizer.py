"""An optimizer on a server's blocks; tests/paramserver/run/test_optimizer_kind.py compares all of them with optax."""

import numpy as np
import optax

from jaxdist.paramserver.run.shard_optimizer import OptaxUpdater


def test_model_state_is_replaced_by_the_mean_that_was_pushed():
    updater = OptaxUpdater(optax.sgd(0.1), kind="elementwise", shapes=[(2,)])
    params = (np.ones(2, np.float32), np.zeros(3, np.float32))
    state = updater.init(params)
    new, _ = updater.update(
        params, state, (np.ones(2, np.float32), np.full(3, 7.0, np.float32)), step=0, scale=0.5, norm_squared=0
    )
    np.testing.assert_allclose(new[0], 0.95)
    assert (new[1] == 7.0).all()


def test_a_shard_clips_by_the_norm_over_all_shards():
    updater = OptaxUpdater(optax.clip_by_global_norm(1.0), kind="global_norm", shapes=[(2,)])
    params, grads = (np.zeros(2, np.float32),), (np.asarray([3.0, 0.0], np.float32),)
    new, _ = updater.update(params, updater.init(params), grads, step=0, scale=1.0, norm_squared=25.0)
    np.testing.assert_allclose(new[0], [0.6, 0.0], rtol=1e-6)
