"""An optimizer's whole state and those of the shards hold the same arrays."""

import jax
import numpy as np
import optax
import pytest

from jaxdist.paramserver.run import whole_optimizer
from jaxdist.paramserver.run.sharding import make_sharding


def same(some, others):
    return len(some) == len(others) and all(
        np.array_equal(a, b) and a.dtype == b.dtype for a, b in zip(some, others, strict=True)
    )


@pytest.mark.parametrize("servers", [1, 2, 5])
@pytest.mark.parametrize(
    "optimizer",
    [
        optax.adamw(1e-3, mask=lambda params: jax.tree.map(lambda p: np.ndim(p) > 1, params)),
        optax.chain(optax.clip_by_global_norm(1.0), optax.masked(optax.trace(0.9), lambda t: jax.tree.map(np.ndim, t))),
    ],
)
def test_an_optimizers_state_is_cut_and_joined_without_loss(optimizer, servers):
    rng = np.random.default_rng(0)
    shapes = [(7, 3), (5,), (), (4, 2, 2), (6,)]
    leaves = [rng.normal(size=shape).astype(np.float32) for shape in shapes]
    state = jax.tree.map(lambda leaf: rng.normal(size=np.shape(leaf)).astype(leaf.dtype), optimizer.init(leaves[:4]))
    sharding = make_sharding(leaves, num_servers=servers, block_bytes=20)
    cut = whole_optimizer.OptimizerSharding(optimizer, sharding, names=tuple("abcd"), ghost=True)
    assert same(cut.join(cut.split(jax.tree.leaves(state))), [np.asarray(leaf) for leaf in jax.tree.leaves(state)])


def test_what_is_not_shaped_like_the_params_is_refused():
    sharding = make_sharding([np.zeros((8, 8), np.float32)], num_servers=1)
    odd = optax.GradientTransformation(lambda params: jax.tree.map(lambda p: np.zeros(p.shape[0]), params), None)
    with pytest.raises(ValueError, match=r"shape \(8,\) for a param of shape \(8, 8\)"):
        whole_optimizer.OptimizerSharding(odd, sharding, names=("a",), ghost=False)
