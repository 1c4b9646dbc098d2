import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import PartitionSpec
from small_problem import place

from jaxdist.spmd import device_program, reduce
from jaxdist.spmd.canonical import adding
from jaxdist.spmd.mesh import Dealing, make_mesh


class Summand:
    """Remembers which additions it came from."""

    def __init__(self, form):
        self.form = form

    def __add__(self, other):
        return Summand((self.form, other.form))


def balanced(numbers):
    half = len(numbers) // 2
    return (balanced(numbers[:half]), balanced(numbers[half:])) if half else numbers[0]


@pytest.mark.parametrize("count", [1, 2, 4, 8, 16, 32, 64, 128])
def test_values_are_added_in_a_balanced_tree_and_few_are_kept(count):
    tree, most = adding.TreeSum(adding._add_in_pairs), 0
    for number in range(count):
        tree.push(Summand(number))
        most = max(most, len(tree._partial))
    assert most <= 2 + 1.5 * np.log2(count)
    assert tree.result().form == balanced(list(range(count)))


@given(st.lists(st.integers(1, 9), min_size=1, max_size=9))
def test_sums_that_wait_for_each_other_make_the_tree_of_all(turns):
    values = [Summand(number) for number in range(sum(turns))]
    levels, sums = [], []
    for turn, end in zip(turns, np.cumsum(turns), strict=True):
        levels, sums = adding._counted_up(levels, sums, values[end - turn : end])
    assert levels == sorted(set(levels), reverse=True)
    total = sums.pop()
    while sums:
        total = sums.pop() + total
    assert total.form == reduce.tree_sum(values).form


def tree_of(values):
    """The sum in the fixed tree, by NumPy."""
    while len(values) > 1:
        values = [sum(values[place + 1 : place + 2], values[place]) for place in range(0, len(values), 2)]
    return values[0]


@pytest.mark.parametrize(
    ("num_devices", "logical_shards", "size"),
    [(4, 8, 33), *(pytest.param(*each, marks=pytest.mark.slow) for each in ((3, 7, 100), (5, 5, 32), (2, 9, 64)))],
)
def test_slices_add_up_to_the_whole_tree(num_devices, logical_shards, size, monkeypatch):
    monkeypatch.setattr(adding, "BLOCK_SIZE", 32)
    mesh = make_mesh(devices=jax.devices()[:num_devices])
    added = adding.SliceTree(adding.Site(mesh, ("data",), Dealing(logical_shards, num_devices)), size)
    random = np.random.default_rng(0)
    vectors = (random.normal(size=(logical_shards, size)) * 10.0 ** random.integers(-3, 4, size)).astype(np.float32)
    assert set(added.shards.reshape(-1)) == set(range(logical_shards))
    slots = (place(vectors[slot], mesh, "data") for slot in added.shards.T)
    np.testing.assert_array_equal(added.over_devices(added.on_devices(slots)), tree_of(list(vectors)))


@pytest.mark.parametrize(
    ("num_devices", "logical_shards"),
    [(2, 8), (3, 7), *(pytest.param(*each, marks=pytest.mark.slow) for each in ((1, 5), (8, 8), (5, 8), (4, 12)))],
)
def test_a_program_of_all_devices_adds_up_the_whole_tree(num_devices, logical_shards):
    mesh, size = make_mesh(devices=jax.devices()[:num_devices]), 33
    added = adding.held_whole(adding.Site(mesh, ("data",), Dealing(logical_shards, num_devices)), size)
    random = np.random.default_rng(0)
    vectors = (random.normal(size=(logical_shards, size)) * 10.0 ** random.integers(-3, 4, size)).astype(np.float32)
    cut = PartitionSpec("data")
    program = device_program.PerDeviceProgram(
        added.in_program, mesh, in_specs=(cut, cut), out_spec=PartitionSpec(), exchanges=True
    )
    shards = added.shards.reshape(-1)
    total = program(place(vectors[shards], mesh, "data"), place(shards, mesh, "data"))
    for replica in total.addressable_shards:
        np.testing.assert_array_equal(replica.data, tree_of(list(vectors)))


def test_the_exchange_of_slices_takes_little_memory_besides_its_operands(monkeypatch):
    monkeypatch.setattr(adding, "BLOCK_SIZE", 1 << 12)
    mesh, size = make_mesh(devices=jax.devices()[:4]), 1 << 16
    added = adding.SliceTree(adding.Site(mesh, ("data",), Dealing(8, 4)), size)
    vector = place(np.zeros((4, size), np.float32), mesh, "data")
    first = added._turns[0][1].lower(None, [], vector).compile().memory_analysis()
    assert first.temp_size_in_bytes <= size  # a quarter of a vector of float32
    sums = [place(np.zeros(size, np.float32), mesh, "data")]
    gather = added.over_devices.lower(sums).compile().memory_analysis()
    assert gather.temp_size_in_bytes <= size


def test_small_vectors_are_held_whole():
    place_ = adding.Site(make_mesh(), ("data",), Dealing(8, 8))
    assert isinstance(adding.held_in_slices(place_, adding.SMALL_SIZE - 1), adding.PairTree)
    assert isinstance(adding.held_in_slices(place_, adding.SMALL_SIZE), adding.SliceTree)
    assert isinstance(adding.held_whole(place_._replace(dealing=Dealing(9, 8)), 1), adding.AnyTree)
