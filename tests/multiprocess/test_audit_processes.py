"""The audit over real processes: all of them come to one finding, which names the faulty device."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxdist import testing
from jaxdist.guards import shard_audit
from jaxdist.spmd.mesh import Dealing, DealtBatch, make_mesh
from jaxdist.spmd.state import create_state

SHARDS = 8


def loss_fn(params, batch, key):
    return jnp.mean((jnp.tanh(batch["x"] @ params["w"]) - batch["y"]) ** 2), {}


def placed(rows, mesh):
    """Return the batch, dealt where eight shards are not divided evenly."""
    sharding, dealing = NamedSharding(mesh, PartitionSpec("data")), Dealing(SHARDS, mesh.size)
    chosen = {name: leaf if dealing.is_even else leaf[dealing.rows(len(leaf))] for name, leaf in rows.items()}
    fields = {
        name: jax.make_array_from_callback(leaf.shape, sharding, leaf.__getitem__) for name, leaf in chosen.items()
    }
    return fields if dealing.is_even else DealtBatch(fields, dealing)


def with_flipped_bit(leaf, device, place, bit):
    """Return a replicated array of which one device's copy has a flipped bit."""
    pieces = []
    for piece in leaf.addressable_shards:
        values = np.array(piece.data)
        if piece.device == device:
            values.view("u4")[place] ^= np.uint32(1 << bit)
        pieces.append(jax.device_put(values, piece.device))
    return jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, pieces)


def findings(num_audits):
    """Audit as often with a fault in the copy of a device drawn by chance, and as often without."""
    mesh, random = make_mesh(), np.random.default_rng(0)
    rows = {"x": random.normal(size=(16, 3)).astype("f4"), "y": random.normal(size=16).astype("f4")}
    state = create_state(lambda key: {"w": jnp.ones(3)}, optax.sgd(0.1), mesh=mesh, seed=0)
    audit = shard_audit.ShardAudit(loss_fn, mesh, logical_shards=SHARDS, num_microbatches=1)
    batch, found = placed(rows, mesh), []
    for number in range(num_audits):
        suspect, place, bit, shard = (int(random.integers(end)) for end in (mesh.size, 3, 32, SHARDS))
        flipped = with_flipped_bit(state.params["w"], mesh.devices.flat[suspect], place, bit)
        faulty = dataclasses.replace(state, params={"w": flipped})
        clean = shard_audit.judge(audit.votes(state, batch, shard), step=number, shard=shard)
        finding = shard_audit.judge(audit.votes(faulty, batch, shard), step=number, shard=shard)
        found.append([suspect, clean is None, finding and [finding.named, list(finding.suspects), finding.what]])
    return found


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("processes", "devices", "num_audits"),
    [
        pytest.param(3, 1, 10, marks=pytest.mark.slow),
        pytest.param(2, 2, 100, marks=pytest.mark.soak),
        pytest.param(3, 1, 100, marks=pytest.mark.soak),
    ],
)
def test_every_process_names_the_faulty_device(processes, devices, num_audits):
    results = testing.run_processes(findings, num_audits, processes=processes, devices=devices, timeout_seconds=600)
    for found in results:
        assert found == results[0]
        assert len(found) == num_audits
        for suspect, is_clean, finding in found:
            assert is_clean
            assert finding == [True, [suspect], "params"]
