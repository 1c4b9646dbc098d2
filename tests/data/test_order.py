import itertools
from unittest import mock

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from jaxdist.data import order

sizes = st.integers(1, 200) | st.integers(201, 5000)


@hypothesis.given(sizes, st.integers(-(2**40), 2**70), st.integers(0, 1000))
def test_shuffled_order_is_a_permutation(num_examples, seed, epoch):
    ids = order.Shuffled()(num_examples, seed, epoch, 0, num_examples)
    assert ids.dtype == np.int64
    assert sorted(ids) == list(range(num_examples))


def test_every_size_to_200_is_a_permutation():
    for num_examples in range(1, 201):
        ids = order.Shuffled()(num_examples, 0, 0, 0, num_examples)
        assert sorted(ids) == list(range(num_examples))


@hypothesis.given(sizes, st.data())
def test_any_part_of_the_order_is_found_alone(num_examples, data):
    start = data.draw(st.integers(0, num_examples))
    stop = data.draw(st.integers(start, num_examples))
    for scheme in (order.Shuffled(), order.Sequential()):
        np.testing.assert_array_equal(
            scheme(num_examples, 3, 1, start, stop), scheme(num_examples, 3, 1, 0, num_examples)[start:stop]
        )


@hypothesis.given(st.integers(1, 60), st.integers(1, 20), st.integers(0, 60), st.integers(1, 40))
def test_batches_are_runs_of_the_order_however_many_ids_are_made_at_a_time(num_examples, size, start, at_a_time):
    whole = order.Shuffled()(num_examples, 3, 1, 0, num_examples)
    with mock.patch.object(order, "_IDS_AT_A_TIME", at_a_time):
        found = list(order.Shuffled().batches(num_examples, 3, 1, start, size))
    assert [batch.after for batch in found] == [
        min(first + size, num_examples) for first in range(start, num_examples, size)
    ]
    for batch, first in zip(found, range(start, num_examples, size), strict=True):
        expected = whole[first : first + size]
        assert batch.ids.tolist() == [*expected, *[expected[0]] * (size - len(expected))]
        assert batch.mask.tolist() == [1.0] * len(expected) + [0.0] * (size - len(expected))
        assert (batch.ids.dtype, batch.mask.dtype) == (np.int64, np.float32)
    assert order.Shuffled().num_batches(num_examples, size) == len(range(0, num_examples, size))


@hypothesis.given(st.integers(1, 2**62), st.data())
def test_inverse_finds_the_position(size, data):
    positions = np.array(data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=20)))
    permutation = order.Permutation.make(size, "test", 5)
    ids = permutation(positions)
    assert ((ids >= 0) & (ids < size)).all()
    np.testing.assert_array_equal(permutation.inverse(ids), positions)


@hypothesis.given(st.integers(1, 2**40), st.integers(0, 2**20))
def test_few_numbers_are_walked_as_many_are(size, seed):
    permutation = order.Permutation.make(size, "test", seed)
    positions = np.arange(seed % size, min(seed % size + 40, size))
    together = permutation(positions)
    assert [int(permutation(positions[[i]])[0]) for i in range(len(positions))] == together.tolist()


def test_epochs_and_seeds_differ():
    def ids(seed, epoch):
        return order.Shuffled()(1000, seed, epoch, 0, 1000).tolist()

    seen = [ids(seed, epoch) for seed in range(-1, 4) for epoch in range(4)]
    assert len({tuple(one) for one in seen}) == len(seen)
    # Not even shifted: neighbours of one order are not neighbours of another more often than chance has it.
    pairs = [set(itertools.pairwise(one)) for one in seen]
    assert max(len(a & b) for i, a in enumerate(pairs) for b in pairs[:i]) < 12


def test_every_example_is_equally_likely_at_every_position():
    for size in (3, 10, 100):
        ids = np.stack([order.Shuffled()(size, seed, 0, 0, size) for seed in range(2000)])
        counts = np.stack([np.bincount(column, minlength=size) for column in ids.T])
        expected = 2000 / size
        # The chi-square statistic has mean (size - 1)**2 and variance about twice that.
        chi_square = ((counts - expected) ** 2 / expected).sum()
        freedom = (size - 1) ** 2
        assert abs(chi_square - freedom) < 6 * np.sqrt(2 * freedom)


def test_neighbours_are_unrelated():
    """The distance of two neighbouring positions is spread like that of two random ids."""
    size = 4096
    ids = order.Shuffled()(size, 1, 0, 0, size)
    distance = np.abs(np.diff(ids))
    assert abs(distance.mean() / (size / 3) - 1) < 0.05


def excess_of_pairs(size, num_orders):
    """How far, in standard deviations, the ids at positions 0 and 1 are from all pairs being equally likely."""
    ids = np.stack([order.Shuffled()(size, seed, 0, 0, 2) for seed in range(num_orders)])
    counts = np.bincount(ids[:, 0] * size + ids[:, 1], minlength=size**2).reshape(size, size)
    counts = counts[~np.eye(size, dtype=bool)]
    expected = num_orders / len(counts)
    return (((counts - expected) ** 2 / expected).sum() - len(counts)) / np.sqrt(2 * len(counts))


def excess_of_neighbours(size, distance):
    """The same for the high bits of the ids that stand `distance` apart in one order."""
    ids = order.Shuffled()(size, 1, 0, 0, size) * 16 // size
    counts = np.bincount(ids[:-distance] * 16 + ids[distance:], minlength=256)
    expected = counts.sum() / 256
    return (((counts - expected) ** 2 / expected).sum() - 255) / np.sqrt(2 * 255)


def test_the_rounds_of_the_network_suffice(monkeypatch):
    """Positions are independent as far as pairs tell; with half the rounds they are not, and this test sees it."""
    for size in (10, 32):
        assert abs(excess_of_pairs(size, 3000)) < 5
    for distance in (1, 2, 64, 256):
        assert abs(excess_of_neighbours(65_536, distance)) < 5
    monkeypatch.setattr(order, "_NUM_ROUNDS", 3)
    assert excess_of_pairs(32, 3000) > 20
    assert excess_of_neighbours(65_536, 1) > 20


def test_the_scheme_has_not_changed():
    """If this fails, stored positions would be misread: raise ORDER_VERSION, then renew these numbers."""
    assert order.ORDER_VERSION == 1
    assert order.Shuffled().version == "shuffled-1"
    for scheme, expected in GOLDEN.items():
        assert scheme(1000, 7, 3, 500, 506).tolist() == expected, scheme
    dealt = order.Dealt((500, 300, 200)).batch(1000, 7, 3, 12, 6)
    assert dealt.ids.tolist() == GOLDEN_DEALT


GOLDEN = {
    order.Shuffled(): [934, 428, 303, 702, 886, 532],
    order.BlockShuffled(64): [720, 736, 760, 758, 755, 759],
    order.Mixed((900, 100), (3, 1)): [7, 368, 914, 437, 365, 225],
}
GOLDEN_DEALT = [180, 259, 564, 507, 866, 804]


@pytest.mark.parametrize(
    ("start", "stop", "epoch"),
    [(-1, 3, 0), (4, 3, 0), (0, 11, 0), (0, 3, -1)],
    ids=["start", "swapped", "stop", "epoch"],
)
def test_positions_outside_the_epoch_are_refused(start, stop, epoch):
    with pytest.raises(ValueError, match=r"start|epoch"):
        order.Shuffled()(10, 0, epoch, start, stop)


@hypothesis.settings(max_examples=30)
@hypothesis.given(sizes, st.integers(1, 40), st.integers(0, 5))
def test_block_order_is_a_permutation_of_whole_blocks(num_examples, block_size, epoch):
    ids = order.BlockShuffled(block_size)(num_examples, 7, epoch, 0, num_examples)
    assert sorted(ids) == list(range(num_examples))
    changes = np.count_nonzero(np.diff(ids // block_size))
    assert changes == -(-num_examples // block_size) - 1  # each block is read in one go


@hypothesis.settings(max_examples=30)
@hypothesis.given(sizes, st.integers(1, 40), st.data())
def test_any_part_of_the_block_order_is_found_alone(num_examples, block_size, data):
    start = data.draw(st.integers(0, num_examples))
    stop = data.draw(st.integers(start, num_examples))
    scheme = order.BlockShuffled(block_size)
    np.testing.assert_array_equal(
        scheme(num_examples, 3, 1, start, stop), scheme(num_examples, 3, 1, 0, num_examples)[start:stop]
    )


mixtures = st.lists(st.tuples(st.integers(1, 30), st.integers(1, 7)), min_size=1, max_size=4)


@hypothesis.given(mixtures, st.integers(1, 3))
def test_a_mixture_keeps_its_proportions_and_repeats_no_example_within_a_pass(parts, seed):
    example_counts, weights = zip(*parts)
    scheme, total = order.Mixed(example_counts, weights), sum(example_counts)
    ids = np.concatenate([scheme(total, seed, epoch, 0, total) for epoch in range(4)])
    owner = np.searchsorted(np.cumsum(example_counts), ids, side="right")
    for index, (count, weight) in enumerate(parts):
        drawn = (ids - sum(example_counts[:index]))[owner == index]
        for begin in range(0, len(drawn) - count + 1, count):
            assert sorted(drawn[begin : begin + count]) == list(range(count))
        share = np.cumsum(owner == index) - np.arange(1, len(ids) + 1) * weight / sum(weights)
        assert np.abs(share).max() <= len(parts)


@hypothesis.given(mixtures, st.data())
def test_any_part_of_a_mixture_is_found_alone(parts, data):
    example_counts, weights = zip(*parts)
    scheme, total = order.Mixed(example_counts, weights), sum(example_counts)
    start = data.draw(st.integers(0, total))
    stop = data.draw(st.integers(start, total))
    np.testing.assert_array_equal(scheme(total, 3, 1, start, stop), scheme(total, 3, 1, 0, total)[start:stop])


weights_of_examples = st.lists(st.sampled_from([0.0, 0.3, 1.0, 2.5, 1e-9]), min_size=1, max_size=40)


@hypothesis.given(weights_of_examples.filter(any), st.integers(0, 3), st.data())
def test_an_example_comes_as_often_as_its_weight_says(weights, epoch, data):
    scheme, count = order.Resampled(tuple(weights)), len(weights)
    ids = scheme(count, 7, epoch, 0, count)
    expected = count * np.array(weights) / sum(weights)
    times = np.bincount(ids, minlength=count)
    assert (times >= np.floor(expected - 1e-6)).all()
    assert (times <= np.ceil(expected + 1e-6)).all()
    assert not times[np.array(weights) == 0].any()
    start = data.draw(st.integers(0, count))
    stop = data.draw(st.integers(start, count))
    np.testing.assert_array_equal(scheme(count, 7, epoch, start, stop), ids[start:stop])


def test_rare_examples_come_in_some_epochs():
    scheme = order.Resampled((1.0,) * 9 + (0.5,))
    times = [np.count_nonzero(scheme(10, 0, epoch, 0, 10) == 9) for epoch in range(400)]
    assert abs(np.mean(times) - 10 * 0.5 / 9.5) < 0.1


@hypothesis.given(
    st.lists(st.integers(1, 40), min_size=1, max_size=8), st.lists(st.integers(1, 9), min_size=1), st.booleans()
)
def test_dealt_shards_give_each_example_once_with_changing_batch_sizes(shard_sizes, rows_each, shuffle):
    scheme, total = order.Dealt(tuple(shard_sizes), shuffle), sum(shard_sizes)
    position, seen, step, batches = 0, [], 0, []
    bounds = np.cumsum([0, *shard_sizes])
    while position < total:
        rows = rows_each[step % len(rows_each)]
        batch = scheme.batch(total, 5, 2, position, rows * len(shard_sizes))
        owners = np.searchsorted(bounds, batch.ids, side="right") - 1
        np.testing.assert_array_equal(owners, np.repeat(np.arange(len(shard_sizes)), rows))
        true_ids = batch.ids[batch.mask == 1].tolist()
        seen += true_ids
        assert batch.after == position + len(true_ids)
        position, step = batch.after, step + 1
        batches.append(batch)
    assert sorted(seen) == list(range(total))
    if len(rows_each) == 1:
        whole = list(scheme.batches(total, 5, 2, 0, rows_each[0] * len(shard_sizes)))
        np.testing.assert_equal([each._asdict() for each in whole], [each._asdict() for each in batches])
        assert scheme.num_batches(total, rows_each[0] * len(shard_sizes)) == step


def test_impossible_orders_are_refused():
    with pytest.raises(ValueError, match="block_size"):
        order.BlockShuffled(0)
    with pytest.raises(ValueError, match="whole numbers"):
        order.Mixed((3, 3), (0.5, 0.5))
    with pytest.raises(ValueError, match="at least 1; got 0"):
        order.Mixed((3, 0), (1, 1))
    with pytest.raises(ValueError, match="There are 2 weights; the source has 3 examples"):
        order.Resampled((1, 1))(3, 0, 0, 0, 3)
    for weights in ((), (0, 0), (1, -1), (1, float("nan")), (1, float("inf")), (1e308, 1e308)):
        with pytest.raises(ValueError, match="at least 0 and not all of them 0"):
            order.Resampled(weights)
    for num_examples, size in ((6, 2), (6, 4), (7, 6)):
        with pytest.raises(ValueError, match="multiple of 3"):
            order.Dealt((2, 2, 2)).batch(num_examples, 0, 0, 0, size)
        with pytest.raises(ValueError, match="multiple of 3"):
            order.Dealt((2, 2, 2)).num_batches(num_examples, size)


def test_a_trillion_examples_are_ordered_without_holding_any():
    for scheme in (order.Shuffled(), order.BlockShuffled(4096), order.Mixed((10**12 - 5, 5), (9, 1))):
        ids = scheme(10**12, 0, 3, 10**12 - 100, 10**12)
        assert len(set(ids.tolist())) == 100 or isinstance(scheme, order.Mixed)
        assert ids.max() < 10**12
