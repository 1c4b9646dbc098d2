import itertools
import math

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType

from jaxdist.spmd import mesh as meshes
from jaxdist.spmd.mesh import Dealing, DealtBatch, is_power_of_two


def test_every_device_is_on_the_data_axis_by_default():
    mesh = meshes.make_mesh()
    assert dict(mesh.shape) == {"data": 8}
    assert list(mesh.devices.flat) == jax.devices()


def test_axes_are_auto_and_keep_the_order_of_names_and_devices():
    devices = jax.devices()[::-1]
    mesh = meshes.make_mesh({"data": 2, "model": -1}, devices=devices)
    assert mesh.axis_names == ("data", "model")
    assert mesh.axis_types == (AxisType.Auto, AxisType.Auto)
    assert mesh.devices.shape == (2, 4)
    assert list(mesh.devices.flat) == devices


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({}, "positive sizes"),
        ({"data": 0}, "positive sizes"),
        ({"data": -1, "model": -1}, "at most one of them -1"),
        ({"data": 3}, r"product 3\) for 8 devices"),
        ({"data": 4}, r"product 4\) for 8 devices"),
        ({"data": -1, "model": 3}, "for 8 devices"),
    ],
)
def test_sizes_that_do_not_fit_the_devices_are_refused(axes, message):
    with pytest.raises(ValueError, match=message):
        meshes.make_mesh(axes)


@given(
    st.sampled_from([1, 2, 3, 4, 8]),
    st.integers(1, 6),
    st.one_of(st.none(), st.sampled_from([8, 12, 16])),
    st.integers(-3, 200),
)
def test_batch_sizes_fit_together_or_the_nearest_valid_ones_are_named(num_devices, microbatches, logical_shards, size):
    mesh = meshes.make_mesh(devices=jax.devices()[:num_devices])

    def sizes_of(size):
        return meshes.batch_sizes(size, mesh, num_microbatches=microbatches, logical_shards=logical_shards)

    try:
        sizes = sizes_of(size)
    except ValueError as error:
        proposed = [int(word) for word in str(error).split("Nearest valid: ")[1].rstrip(".").split(" or ")]
        assert all(sizes_of(each).global_batch_size == each for each in proposed)
        assert size not in proposed
        return
    assert sizes.global_batch_size == size
    assert sizes.device_batch_size * num_devices == sizes.host_batch_size >= size
    if logical_shards is None or logical_shards % num_devices == 0:
        assert sizes.host_batch_size == size
    assert sizes.microbatch_size * microbatches == sizes.device_batch_size
    assert size % (logical_shards or 1) == 0


@pytest.mark.parametrize(("size", "proposal"), [(31, "16 or 32"), (33, "32 or 48"), (15, "16"), (0, "16"), (-4, "16")])
def test_the_message_proposes_the_sizes_on_either_side(size, proposal):
    with pytest.raises(ValueError, match=rf"multiple of 16 .*got {size}\. Nearest valid: {proposal}\.$"):
        meshes.batch_sizes(size, meshes.make_mesh(), num_microbatches=2)


def test_the_batch_repeats_over_axes_it_is_not_cut_over():
    mesh = meshes.make_mesh({"data": 2, "model": 4})
    sizes = meshes.batch_sizes(32, mesh)
    assert sizes.device_batch_size == 16
    assert sizes.host_batch_size == 32
    both = meshes.batch_sizes(32, mesh, axes=("data", "model"))
    assert both.device_batch_size * math.prod(mesh.shape.values()) == both.host_batch_size == 32


DEALINGS = st.integers(1, 40).flatmap(lambda shards: st.builds(Dealing, st.just(shards), st.integers(1, shards)))


@given(DEALINGS)
def test_every_shard_is_computed_and_counts_once(dealing):
    slots = dealing.slots()
    assert slots.shape == (dealing.num_devices, dealing.num_slots)
    own = [sorted(set(device.tolist())) for device in slots]
    assert list(itertools.chain(*own)) == list(range(dealing.logical_shards)), "in order, each on one device"
    assert {len(shards) for shards in own} <= {dealing.num_slots - 1, dealing.num_slots} - {0}
    assert slots.reshape(-1)[dealing.slot_of_shards()].tolist() == list(range(dealing.logical_shards))
    assert dealing.is_even == all(len(shards) == dealing.num_slots for shards in own)


@given(DEALINGS, st.integers(1, 5))
def test_a_slot_holds_the_rows_of_its_shard(dealing, size):
    rows = dealing.rows(dealing.logical_shards * size).reshape(dealing.num_devices, dealing.num_slots, size)
    expected = dealing.slots()[..., None] * size + np.arange(size)
    np.testing.assert_array_equal(rows, expected)
    if dealing.is_even:
        np.testing.assert_array_equal(rows.reshape(-1), np.arange(dealing.logical_shards * size))


def test_a_batch_that_does_not_divide_into_the_shards_is_refused():
    with pytest.raises(ValueError, match=r"8 equal logical shards; got 12 examples\. Choose a multiple of 8"):
        Dealing(8, 3).rows(12)


def test_a_dealt_batch_is_a_tree_that_keeps_its_dealing():
    batch = DealtBatch({"x": np.ones(2), "a": np.zeros(3)}, Dealing(8, 3))
    doubled = jax.tree.map(lambda leaf: leaf * 2, batch)
    assert isinstance(doubled, DealtBatch)
    assert doubled.dealing == batch.dealing
    assert doubled["x"].tolist() == [2, 2]
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(batch)]
    assert names == ["['a']", "['x']"]
    assert jax.tree.structure(batch) != jax.tree.structure(DealtBatch(dict(batch), Dealing(8, 5)))


def test_powers_of_two():
    assert [number for number in range(1, 20) if is_power_of_two(number)] == [1, 2, 4, 8, 16]
