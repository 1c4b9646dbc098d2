"""Canonical steps with a tensor axis: the same bits for any size of the data axis, and the numbers of one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from small_problem import assert_close, fingerprint

from jaxdist import masked_mean
from jaxdist.guards import step_hashes
from jaxdist.spmd import layout as layouts
from jaxdist.spmd import state as states
from jaxdist.spmd.canonical import canonical_step, tensor_step
from jaxdist.spmd.mesh import make_mesh
from jaxdist.spmd.step import STEP_HASHES

LAYOUT = layouts.by_path([("in$", P(None, "model")), ("out$", P("model", None))])
OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2))
MASK = (np.arange(16) < 13).astype(np.float32)


def init_fn(key):
    first, second = jax.random.split(key)
    params = {"in": jax.random.normal(first, (6, 16)), "out": jax.random.normal(second, (16, 3)), "bias": jnp.zeros(3)}
    return params, {"mean": jnp.zeros(6)}


def loss_fn(params, batch, key, model_state):
    kept = jax.random.bernoulli(key, 0.9, (len(batch["x"]), 16))
    hidden = jnp.tanh(batch["x"] @ params["in"]) * kept
    errors = jnp.sum((hidden @ params["out"] + params["bias"][None] - batch["y"]) ** 2, axis=1)
    statistics = {"mean": jnp.mean(batch["x"], axis=0)}
    return masked_mean(errors, batch["mask"]), {"largest": masked_mean(errors**2, batch["mask"])}, statistics


def batch(seed, mesh):
    random = np.random.default_rng(seed)
    fields = {"x": random.normal(size=(16, 6)), "y": random.normal(size=(16, 3)), "mask": MASK}
    return jax.device_put({k: v.astype("f4") for k, v in fields.items()}, NamedSharding(mesh, P("data")))


@functools.cache
def train(num_groups, group_size, hashing=canonical_step.NO_HASHING, loss_fn=loss_fn, num_microbatches=1):
    devices = jax.devices()[: num_groups * group_size]
    mesh = make_mesh({"data": num_groups, "model": group_size}, devices=devices)
    options = {"logical_shards": 4, "num_microbatches": num_microbatches, "hashing": hashing}
    step = tensor_step.tensor_step(loss_fn, OPTIMIZER, mesh, **options)
    state = states.create_same_state(init_fn, OPTIMIZER, mesh=mesh, seed=0, layout=LAYOUT)
    for seed in range(3):
        state, metrics = step(state, batch(seed, mesh))
    assert state.params["in"].sharding.spec == P(None, "model" if group_size > 1 else None)
    assert step._cache_size() == 1
    return jax.device_get((state.params, state.model_state, state.opt_state, metrics))


@pytest.mark.parametrize(
    ("group_size", "groups"),
    [
        pytest.param(1, (1, 2, 4), marks=pytest.mark.slow),
        (2, (1, 4)),
        pytest.param(2, (1, 2, 4), marks=pytest.mark.slow),
        pytest.param(4, (1, 2), marks=pytest.mark.slow),
    ],
)
def test_any_size_of_the_data_axis_has_the_same_bits(group_size, groups):
    results = [train(num_groups, group_size, step_hashes.StepHashing()) for num_groups in groups]
    assert len({fingerprint(result) for result in results}) == 1
    hashes = results[0][3][STEP_HASHES]
    assert len(hashes) == 4 + len({"in", "out", "bias"}) * 2 + 1 + 1
    assert len(set(hashes.tolist())) == len(hashes)


@pytest.mark.slow
def test_hashes_change_no_bit_and_microbatches_keep_the_promise():
    with_hashes = train(2, 2, step_hashes.StepHashing())
    metrics = {name: value for name, value in with_hashes[3].items() if name != STEP_HASHES}
    assert fingerprint((*with_hashes[:3], metrics)) == fingerprint(train(2, 2))
    assert fingerprint(train(1, 2, num_microbatches=2)) == fingerprint(train(4, 2, num_microbatches=2))


def without_dropout(params, batch, key, model_state):
    """What does not depend on how the batch is divided."""
    hidden = jnp.tanh(batch["x"] @ params["in"])
    errors = jnp.sum((hidden @ params["out"] + params["bias"][None] - batch["y"]) ** 2, axis=1)
    return masked_mean(errors, batch["mask"]), {}, model_state


@pytest.mark.slow
def test_it_has_the_numbers_of_plain_optax_on_one_device():
    found, mesh = train(2, 2, loss_fn=without_dropout), make_mesh(devices=jax.devices()[:1])
    params = states.create_state(init_fn, OPTIMIZER, mesh=mesh, seed=0).params
    grad = jax.grad(lambda params, rows: without_dropout(params, rows, None, None)[0].value)
    opt_state = OPTIMIZER.init(params)
    for seed in range(3):
        updates, opt_state = OPTIMIZER.update(grad(params, batch(seed, mesh)), opt_state, params)
        params = optax.apply_updates(params, updates)
    assert_close(found[0], jax.device_get(params))


def test_a_state_that_is_sharded_over_the_batch_axes_is_refused():
    mesh = make_mesh({"data": 4, "model": 2})
    step = tensor_step.tensor_step(loss_fn, OPTIMIZER, mesh, logical_shards=4)
    layout = layouts.by_path([("params/in$", P(None, "data"))])
    state = states.create_same_state(init_fn, OPTIMIZER, mesh=mesh, seed=0, layout=layout)
    with pytest.raises(ValueError, match="whole along data; params/in is sharded by"):
        step(state, batch(0, mesh))
