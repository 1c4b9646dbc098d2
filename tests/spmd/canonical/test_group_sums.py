"""Sums of logical shards that groups of devices compute together: the bits of plain JAX on the devices of one group."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxdist.spmd import group_program
from jaxdist.spmd.canonical import group_sums
from jaxdist.spmd.mesh import Dealing, DealtBatch, make_mesh

SPECS = {"in": P(None, "model"), "out": P("model"), "bias": P()}
ROWS_OF_SHARD = 2


def problem(num_shards):
    random = np.random.default_rng(num_shards)
    shapes = {"in": (6, 16), "out": (16, 3), "bias": (3,)}
    params = {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    num_rows = num_shards * ROWS_OF_SHARD
    return params, {
        "x": random.normal(size=(num_rows, 6)).astype(np.float32),
        "y": random.normal(size=(num_rows, 3)).astype(np.float32),
    }


def loss(params, rows):
    return jnp.sum((jnp.tanh(rows["x"] @ params["in"]) @ params["out"] + params["bias"][None] - rows["y"]) ** 2)


def placed(tree, mesh, specs):
    return {name: jax.device_put(leaf, NamedSharding(mesh, specs[name])) for name, leaf in tree.items()}


def sum_by_tree(values):
    """Neighbours, then pairs of pairs; an odd one out waits."""
    while len(values) > 1:
        pairs = [jax.tree.map(np.add, *values[place : place + 2]) for place in range(0, len(values) - 1, 2)]
        values = pairs + ([values[-1]] if len(values) % 2 else [])
    return values[0]


def sums_of_plain_jax(num_shards, group_size):
    """Each logical shard by `jax.jit` on a mesh of the tensor axis alone, added on the host."""
    params, batch = problem(num_shards)
    mesh = Mesh(np.array(jax.devices()[:group_size]), ("model",))
    shardings = {name: NamedSharding(mesh, spec) for name, spec in SPECS.items()}
    program = jax.jit(jax.value_and_grad(loss), out_shardings=(NamedSharding(mesh, P()), shardings))
    on_mesh, found = placed(params, mesh, SPECS), []
    for shard in range(num_shards):
        rows = {name: leaf[ROWS_OF_SHARD * shard : ROWS_OF_SHARD * (shard + 1)] for name, leaf in batch.items()}
        found.append(jax.device_get(program(on_mesh, placed(rows, mesh, dict.fromkeys(rows, P())))))
    return sum_by_tree(found)


def canonical_sums(num_shards, num_groups, group_size):
    params, batch = problem(num_shards)
    devices = jax.devices()[: num_groups * group_size]
    mesh, dealing = (
        make_mesh({"data": num_groups, "model": group_size}, devices=devices),
        Dealing(num_shards, num_groups),
    )
    if not dealing.is_even:
        rows = dealing.rows(num_shards * ROWS_OF_SHARD)
        batch = {name: leaf[rows] for name, leaf in batch.items()}
    on_mesh = placed(batch, mesh, dict.fromkeys(batch, P("data")))
    sums = group_sums.GroupSums(
        lambda params, rows, index: jax.value_and_grad(loss)(params, rows),
        mesh,
        logical_shards=num_shards,
        sum_specs=lambda params, shapes: (P(), jax.tree.map(group_program.spec_of, params)),
    )
    total = sums(placed(params, mesh, SPECS), on_mesh if dealing.is_even else DealtBatch(on_mesh, dealing))
    total, looked = total
    assert looked == ()
    assert total[1]["in"].sharding.shard_shape((6, 16)) == (6, 16 // group_size)
    return jax.device_get(total)


@pytest.mark.parametrize(
    ("num_shards", "group_size", "groups"),
    [
        pytest.param(4, 2, (1, 2, 3, 4), id="two devices a group"),
        pytest.param(8, 1, (1, 2, 4, 8), id="one", marks=pytest.mark.slow),
        pytest.param(5, 2, (1, 2, 4), id="odd shards", marks=pytest.mark.slow),
        pytest.param(4, 4, (1, 2), id="four", marks=pytest.mark.slow),
        pytest.param(2, 8, (1,), id="eight", marks=pytest.mark.slow),
    ],
)
def test_any_number_of_groups_has_the_bits_of_plain_jax_on_one(num_shards, group_size, groups):
    expected = sums_of_plain_jax(num_shards, group_size)
    for num_groups in groups:
        jax.tree.map(np.testing.assert_array_equal, canonical_sums(num_shards, num_groups, group_size), expected)


def test_a_batch_that_is_placed_otherwise_is_refused():
    mesh = make_mesh({"data": 4, "model": 2})
    sums = group_sums.GroupSums(lambda *args: args[1], mesh, logical_shards=6)
    with pytest.raises(ValueError, match="not placed for 6 logical shards on 4 devices"):
        sums({}, {"x": jnp.zeros(12)})
