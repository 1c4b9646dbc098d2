import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as some
from jax.sharding import NamedSharding, PartitionSpec

from jaxdist.checkpoint import packing
from jaxdist.spmd.mesh import make_mesh

REPLICATED = PartitionSpec()
DTYPES = ("float32", "bfloat16", "int32", "uint8", "bool")


def put(values, spec=REPLICATED):
    return jax.device_put(values, NamedSharding(make_mesh({"data": -1}, devices=jax.devices()[:4]), spec))


def unpacked(made, state):
    """The leaves of a state as they are put together from what was packed."""
    structure, (content, begin) = json.loads(made.structure), (b"", 0)
    for buffer in made.pack(state):
        content += np.asarray(buffer).tobytes()
    leaves = [np.empty(shape, dtype) for _, _, dtype, shape in structure["leaves"]]
    for piece in structure["pieces"]:
        leaf, end = leaves[piece["leaf"]], begin + piece["num_bytes"]
        index = tuple(slice(*bounds) for bounds in piece["index"])
        leaf[index] = np.frombuffer(content[begin:end], leaf.dtype).reshape(leaf[index].shape)
        begin = end
    assert begin == len(content)
    return leaves


@settings(max_examples=15, deadline=None)
@given(
    kinds=some.lists(
        some.tuples(some.sampled_from(DTYPES), some.sampled_from([(), (0, 2), (8,), (4, 3)]), some.booleans()),
        min_size=1,
        max_size=6,
    )
)
def test_states_are_packed_whole_into_an_array_for_each_dtype(kinds):
    source = np.random.default_rng(0)
    state = []
    for dtype, shape, sharded in kinds:
        values = source.integers(0, 2, shape).astype(jnp.dtype(dtype))
        state.append(put(values, PartitionSpec("data") if sharded and shape in [(8,), (4, 3)] else REPLICATED))
    made = packing.Packing.of(state)
    assert all(len(groups) <= len({leaf.dtype for leaf in state}) for groups in made.groups)
    for found, leaf in zip(unpacked(made, state), state, strict=True):
        np.testing.assert_array_equal(found, np.asarray(leaf))


def test_large_leaves_stay_by_themselves_and_keys_are_packed_as_integers():
    state = {"large": put(np.arange(1 << 18, dtype=np.float32)), "small": put(np.ones(3, np.float32)), "none": None}
    state["key"] = put(jax.random.key(3))
    made = packing.Packing.of(state)
    assert sorted(buffer.size for buffer in made.pack(state)) == [2, 3, 1 << 18]
    key, large, small = unpacked(made, state)
    np.testing.assert_array_equal(key, jax.random.key_data(state["key"]))
    np.testing.assert_array_equal(large, state["large"])
    np.testing.assert_array_equal(small, 1.0)


@pytest.mark.parametrize("other", [{"b": np.zeros(4)}, {"a": np.zeros((2, 2))}, {"a": np.zeros(4, np.int32)}])
def test_a_state_with_other_leaves_is_refused_and_not_packed_wrongly(other):
    made = packing.Packing.of({"a": put(np.zeros(4, np.float32))})
    with pytest.raises(ValueError, match="this one has other leaves"):
        made.pack(jax.tree.map(lambda values: put(jnp.asarray(values)), other))
