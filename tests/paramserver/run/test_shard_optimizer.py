"""Optax on shards: element by element it is exact, the global norm is the global one, the rest is refused."""

import jax
import numpy as np
import optax
import pytest

from jaxdist.paramserver.run.shard_optimizer import OptaxUpdater, classify
from jaxdist.paramserver.run.sharding import make_sharding


def MATRICES(params):
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


SHAPES = ((16, 6), (6,), (5, 3, 2), ())


@pytest.mark.parametrize(
    ("optimizer", "kind"),
    [
        (optax.sgd(0.1), "elementwise"),
        (optax.sgd(0.1, momentum=0.9, nesterov=True), "elementwise"),
        (optax.adamw(1e-3), "elementwise"),
        (optax.lion(1e-3), "elementwise"),
        (optax.chain(optax.clip(1.0), optax.adam(1e-3)), "elementwise"),
        (optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3)), "global_norm"),
        (optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(0.1)), "global_norm"),
    ],
)
def test_what_runs_on_shards(optimizer, kind):
    assert classify(optimizer, SHAPES) == kind


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.lamb(1e-3),
        optax.lars(1e-2),
        optax.adafactor(1e-3, min_dim_size_to_factor=2),
        optax.adaptive_grad_clip(0.01),
    ],
)
def test_what_mixes_elements_is_refused(optimizer):
    with pytest.raises(ValueError, match="other updates on pieces"):
        classify(optimizer, SHAPES)


@pytest.mark.parametrize("servers", [1, 2, 3])
@pytest.mark.parametrize(
    "optimizer",
    [
        optax.sgd(0.1, momentum=0.9),
        optax.adamw(1e-2),
        optax.chain(optax.clip_by_global_norm(0.5), optax.adam(1e-2)),
        optax.adamw(1e-2, weight_decay=0.1, mask=MATRICES),
    ],
)
def test_the_shards_together_are_the_optimizer_on_the_whole(optimizer, servers):
    rng = np.random.default_rng(0)
    leaves = [rng.normal(size=shape).astype(np.float32) for shape in SHAPES]
    kind = classify(optimizer, SHAPES)
    sharding = make_sharding(leaves, num_servers=servers, block_bytes=64)
    ranks = [[len(SHAPES[block.leaf]) for block in shard] for shard in sharding.shards]
    updaters = [OptaxUpdater(optimizer, kind=kind, ranks=each) for each in ranks]
    params = list(sharding.split(leaves))
    states = [updater.init(blocks) for updater, blocks in zip(updaters, params)]
    whole, state = tuple(leaves), optimizer.init(tuple(leaves))

    @jax.jit
    def step(grads, state, whole):
        updates, state = optimizer.update(grads, state, whole)
        return optax.apply_updates(whole, updates), state

    for _ in range(5):
        grads = [rng.normal(size=shape).astype(np.float32) for shape in SHAPES]
        norm_squared = sum(float(np.vdot(g, g)) for g in grads)
        for i, blocks in enumerate(sharding.split(grads)):
            params[i], states[i] = updaters[i].update(
                params[i], states[i], blocks, scale=1.0, norm_squared=norm_squared
            )
        whole, state = step(tuple(grads), state, whole)
    for got, want in zip(sharding.join(params), whole, strict=True):
        if kind == "elementwise":
            assert np.array_equal(got, want)
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-7)


def test_model_state_is_replaced_by_the_mean_that_was_pushed():
    updater = OptaxUpdater(optax.sgd(0.1), kind="elementwise", ranks=[1])
    params = (np.ones(2, np.float32), np.zeros(3, np.float32))
    state = updater.init(params)
    new, _ = updater.update(
        params, state, (np.ones(2, np.float32), np.full(3, 7.0, np.float32)), scale=0.5, norm_squared=0
    )
    np.testing.assert_allclose(new[0], 0.95)
    assert (new[1] == 7.0).all()


def test_an_optimizer_that_needs_the_names_of_leaves_is_refused():
    named = optax.masked(optax.sgd(0.1), {"kernel": True, "bias": False})
    with pytest.raises(ValueError, match="depends on the params' tree"):
        classify(named, SHAPES)
