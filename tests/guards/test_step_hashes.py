"""The hashes of a canonical step: the same on any number of devices, and they change no bit of the step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxdist.guards import step_hashes
from jaxdist.rundir import record
from jaxdist.spmd import step as steps
from jaxdist.spmd.canonical import canonical_step
from jaxdist.spmd.mesh import make_mesh
from jaxdist.spmd.state import create_state

pytestmark = pytest.mark.usefixtures("shared_compilations")
SHARDS = 4


def init_fn(key):
    return {"in": jax.random.normal(key, (3, 5)), "out": jnp.ones(5)}, {"mean": jnp.zeros(3)}


def loss_fn(params, batch, key, model_state):
    loss = jnp.mean((jnp.tanh(batch["x"] @ params["in"]) @ params["out"] - batch["y"]) ** 2)
    return loss, {"twice": 2 * loss}, {"mean": jnp.mean(batch["x"], axis=0)}


def batch(mesh, *, changed_row=None):
    random = np.random.default_rng(0)
    x, y = random.normal(size=(8, 3)).astype("f4"), random.normal(size=8).astype("f4")
    if changed_row is not None:
        x[changed_row] += 1
    return jax.device_put({"x": x, "y": y}, NamedSharding(mesh, PartitionSpec("data")))


def train(num_devices, hashing, **changes):
    """Return the state after two steps, and the hashes of the second."""
    mesh = make_mesh(devices=jax.devices()[:num_devices])
    optimizer = optax.adam(0.1)
    step = canonical_step.canonical_step(loss_fn, optimizer, mesh, logical_shards=SHARDS, hashing=hashing)
    state = create_state(init_fn, optimizer, mesh=mesh, seed=0)
    state, _ = step(state, batch(mesh))
    return step(state, batch(mesh, **changes))


def hashes_of(outputs):
    return np.asarray(outputs[1][steps.STEP_HASHES])


def test_they_are_the_same_on_any_number_of_devices_and_change_no_bit():
    without, _ = train(1, canonical_step.NO_HASHING)
    found = {count: train(count, step_hashes.StepHashing()) for count in (1, 2, 4)}
    for state, _ in found.values():
        assert record.params_sha256(state.params) == record.params_sha256(without.params)
    reference = hashes_of(found[1])
    assert reference.dtype == np.uint32
    assert len(reference) == SHARDS + len(step_hashes.names(without))
    for count in (2, 4):
        np.testing.assert_array_equal(hashes_of(found[count]), reference)


def test_the_metrics_without_hashing_are_scalars():
    _, metrics = train(1, canonical_step.NO_HASHING)
    assert {jnp.ndim(value) for value in metrics.values()} == {0}


def test_another_row_shows_in_its_logical_shard_alone_and_in_the_leaves():
    same, other = (hashes_of(train(2, step_hashes.StepHashing(), changed_row=row)) for row in (None, 5))
    names = step_hashes.names(train(1, canonical_step.NO_HASHING)[0])
    assert names == [
        "grads/in", "grads/out", step_hashes.REST, "params/in", "params/out", "model_state/mean"
    ]  # fmt: skip
    shards, leaves = np.flatnonzero(same[:SHARDS] != other[:SHARDS]), np.flatnonzero(same[SHARDS:] != other[SHARDS:])
    assert shards.tolist() == [2]  # of two rows each
    assert [names[place] for place in leaves] == names


def test_the_hashes_of_a_state_are_the_last_of_a_step():
    state, metrics = train(1, step_hashes.StepHashing())
    found = np.asarray(step_hashes.of_state(state))
    assert len(found) == len(step_hashes.state_names(state))
    np.testing.assert_array_equal(found, np.asarray(metrics[steps.STEP_HASHES])[-len(found) :])
