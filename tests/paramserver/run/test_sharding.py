"""Blocks are disjoint, cover the params, and are spread evenly; what was split is joined again."""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxdist.paramserver.run import sharding as shardings
from jaxdist.paramserver.run.sharding import LeafPacking, make_sharding

SHAPES = st.lists(st.lists(st.integers(1, 9), max_size=3).map(tuple), min_size=1, max_size=6)


def tree(shapes):
    rng = np.random.default_rng(0)
    return [rng.normal(size=shape).astype(np.float32 if i % 2 else np.float16) for i, shape in enumerate(shapes)]


@given(SHAPES, st.integers(1, 5), st.sampled_from([2, 7, 16, 64, 1000]))
def test_split_and_join_are_exact_and_even(shapes, servers, block_bytes):
    leaves = tree(shapes)
    try:
        sharding = make_sharding(leaves, num_servers=servers, block_bytes=block_bytes)
    except ValueError as error:
        assert "would hold nothing" in str(error)  # noqa: PT017
        return
    sizes = [(b.stop - b.start) * sharding.dtypes[b.leaf].itemsize for shard in sharding.shards for b in shard]
    assert max(sharding.num_bytes) - min(sharding.num_bytes) <= max(sizes)
    assert max(sizes) <= max(block_bytes, 4)
    assert sum(sharding.num_bytes) == sum(leaf.nbytes for leaf in leaves)
    joined = sharding.join(sharding.split(leaves))
    assert all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in zip(leaves, joined, strict=True))


@settings(deadline=None, max_examples=15)
@given(SHAPES, st.integers(1, 3), st.sampled_from([0, 64, 1 << 20]))
def test_packed_leaves_are_those_that_were_packed_in_few_arrays(shapes, servers, packed_bytes):
    leaves = tree(shapes)
    servers = min(servers, len(leaves))
    sharding = make_sharding(leaves, num_servers=servers)
    with mock.patch.object(shardings, "PACKED_BYTES", packed_bytes):
        packing = LeafPacking.of(sharding)
    large = sum(leaf.nbytes > packed_bytes for leaf in leaves)
    assert len(packing.arrays) <= large + 2
    arrays = packing.join(sharding.split(leaves))
    unpacked = packing.unpack([jnp.asarray(array) for array in arrays])
    assert all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in zip(leaves, unpacked, strict=True))
    pieces = packing.split([np.asarray(array) for array in packing.pack(unpacked)])
    for got, want in zip(pieces, sharding.split(leaves), strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(got, want, strict=True))


@given(SHAPES, st.integers(8, 64))
def test_blocks_are_cut_between_rows_where_a_row_fits(shapes, block_bytes):
    leaves = [leaf.astype(np.float32) for leaf in tree(shapes)]
    for shard in make_sharding(leaves, num_servers=1, block_bytes=block_bytes).shards:
        for block in shard:
            assert block.start % block.row == 0
            assert block.stop % block.row == 0


def test_it_depends_on_shapes_alone():
    leaves = {"w": np.zeros((64, 8), np.float32), "b": np.zeros(8, np.float32), "empty": np.zeros((0, 3), np.float32)}
    shapes = jax.eval_shape(lambda: jax.tree.map(jax.numpy.asarray, leaves))
    assert make_sharding(leaves, num_servers=3, block_bytes=256) == make_sharding(
        shapes, num_servers=3, block_bytes=256
    )


def test_too_many_servers_are_refused():
    with pytest.raises(ValueError, match="4 servers share 1 blocks"):
        make_sharding([np.zeros(3)], num_servers=4)
    with pytest.raises(ValueError, match="at least 1 server"):
        make_sharding([np.zeros(3)], num_servers=0)


def test_another_tree_is_refused():
    sharding = make_sharding([np.zeros(3, np.float32), np.zeros(2, np.float32)], num_servers=1)
    with pytest.raises(ValueError, match="leaf 1 of 2 is"):
        sharding.split([np.zeros(3, np.float32), np.zeros(2, np.float64)])
