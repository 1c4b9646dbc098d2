import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxdist.checkpoint import pieces
from jaxdist.spmd.mesh import make_mesh

MESH = make_mesh({"data": 4, "model": 2})
SPECS = [PartitionSpec(), PartitionSpec("data"), PartitionSpec(None, "model"), PartitionSpec(("data", "model"))]


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_the_pieces_of_an_array_hold_each_element_once(spec):
    values = np.arange(32, dtype=np.float32).reshape(8, 4)
    joined, times = np.zeros_like(values), np.zeros_like(values)
    for piece in pieces.owned_pieces(jax.device_put(values, NamedSharding(MESH, spec))):
        index = tuple(slice(*bounds) for bounds in piece.index)
        joined[index] = piece.data
        times[index] += 1
    np.testing.assert_array_equal(joined, values)
    np.testing.assert_array_equal(times, np.ones_like(values))


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_a_whole_array_is_laid_out_as_asked(spec):
    values, sharding = np.arange(32, dtype=np.float32).reshape(8, 4), NamedSharding(MESH, spec)
    placed = pieces.place(values, jax.ShapeDtypeStruct(values.shape, jnp.float32, sharding=sharding))
    assert placed.sharding == sharding
    np.testing.assert_array_equal(placed, values)


def test_a_typed_key_is_laid_out_as_one():
    key, sharding = jax.random.key(3), NamedSharding(MESH, PartitionSpec())
    placed = pieces.place(
        np.asarray(jax.random.key_data(key)), jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=sharding)
    )
    assert placed == key
    assert placed.sharding.is_fully_replicated
