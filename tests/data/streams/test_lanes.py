import itertools

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from jaxdist.data.streams import lanes

shard_sizes = st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(sum)


@hypothesis.settings(max_examples=40)
@hypothesis.given(shard_sizes, st.integers(1, 9), st.integers(1, 20), st.integers(0, 3))
def test_an_epoch_has_each_example_once_whatever_the_shards_lanes_and_window(sizes, num_lanes, window, epoch):
    order, total = lanes.Lanes(tuple(sizes), num_lanes, window), sum(sizes)
    ids = order(total, 5, epoch, 0, total)
    assert sorted(ids) == list(range(total))
    part = order(total, 5, epoch, total // 3, total // 2)
    np.testing.assert_array_equal(part, ids[total // 3 : total // 2])


@hypothesis.settings(max_examples=40)
@hypothesis.given(shard_sizes, st.integers(1, 9), st.integers(1, 20), st.integers(1, 17), st.data())
def test_batches_are_consecutive_positions_from_any_start(sizes, num_lanes, window, size, data):
    order, total = lanes.Lanes(tuple(sizes), num_lanes, window), sum(sizes)
    start = data.draw(st.integers(0, total))
    batches = list(order.batches(total, 5, 1, start, size))
    assert len(batches) == -(-(total - start) // size)
    assert order.num_batches(total, size) == -(-total // size)
    place = start
    for batch in batches:
        expected = order(total, 5, 1, place, batch.after)
        assert sorted(batch.ids[batch.mask == 1]) == sorted(expected)
        assert len(batch.ids) == len(batch.mask) == size
        place = batch.after
    assert place == total


def test_a_process_reads_its_own_lanes_only_also_where_it_pads():
    """Two processes hold the first and the second half of each batch; 4 lanes over shards of unequal sizes."""
    sizes = (37, 11, 5, 60, 1, 22)
    order, total = lanes.Lanes(sizes, 4, 3), sum(sizes)
    by_process = [set(), set()]
    for batch in order.batches(total, 0, 0, 0, 16):
        for process, rows in enumerate((batch.ids[:8], batch.ids[8:])):
            by_process[process] |= set(rows.tolist())
    assert not by_process[0] & by_process[1]
    assert by_process[0] | by_process[1] == set(range(total))


def test_shards_are_read_forward_within_a_window():
    """The n-th example of a lane comes from less than a window away, shard after shard."""
    order = lanes.Lanes((100, 100, 100, 100), 2, 8)
    ids = order(400, 3, 0, 0, 400)[::2]
    places = {shard: ids[ids // 100 == shard] % 100 for shard in range(4)}
    for found in places.values():
        if len(found) == 100:
            assert np.abs(found - np.arange(100)).max() < 8
    assert len(list(itertools.groupby((ids // 100).tolist()))) < 30


@hypothesis.settings(max_examples=40)
@hypothesis.given(st.integers(1, 60), st.integers(1, 12))
def test_a_window_permutes_and_never_carries_an_example_farther(length, window):
    found = lanes.in_windows(np.arange(length), window, length, "test")
    assert sorted(found) == list(range(length))
    assert np.abs(found - np.arange(length)).max() < window


def test_windows_begin_elsewhere_in_each_epoch():
    """No two neighbours are apart in every epoch, as they would be on both sides of a fixed cut."""
    together = set()
    for epoch in range(40):
        found = lanes.in_windows(np.arange(64), 8, 64, "test", epoch)
        exchanged = [place for place in range(63) if np.argsort(found)[place] > np.argsort(found)[place + 1]]
        together |= set(exchanged)
    assert together == set(range(63))


@hypothesis.settings(max_examples=40)
@hypothesis.given(st.integers(1, 6), st.integers(1, 9), st.integers(1, 50), st.integers(1, 13))
def test_an_endless_order_goes_on_where_the_last_epoch_ended(num_lanes, window, num_examples, size):
    order = lanes.EndlessLanes(num_lanes, window)
    ids = np.concatenate([order(num_examples, 7, epoch, 0, num_examples) for epoch in range(4)])
    assert len(set(ids.tolist())) == len(ids)
    for lane in range(num_lanes):
        mine = np.sort(ids[ids % num_lanes == lane] // num_lanes)
        assert (np.abs(mine - np.arange(len(mine))) < window).all()
    batched = [b for epoch in range(4) for b in order.batches(num_examples, 7, epoch, 0, size)]
    assert sorted(np.concatenate([b.ids[b.mask == 1] for b in batched])) == sorted(ids)


def test_an_order_says_what_it_depends_on():
    versions = {
        lanes.Lanes((3, 4), 2, 1).version,
        lanes.Lanes((4, 3), 2, 1).version,
        lanes.Lanes((3, 4), 1, 1).version,
        lanes.Lanes((3, 4), 2, 2).version,
        lanes.EndlessLanes(2, 1).version,
        lanes.EndlessLanes(1, 1).version,
    }
    assert len(versions) == 6
    with pytest.raises(ValueError, match="7 examples in all; got num_examples=8"):
        lanes.Lanes((3, 4), 2, 1)(8, 0, 0, 0, 8)


def test_golden_ids_which_stored_positions_depend_on():
    """If they move on purpose, raise LANES_VERSION: positions in saved runs would be misread."""
    order = lanes.Lanes((5, 3, 4), 2, 4)
    assert order(12, 0, 0, 0, 12).tolist() == GOLDEN
    assert lanes.EndlessLanes(2, 4)(12, 0, 1, 0, 12).tolist() == GOLDEN_ENDLESS


GOLDEN = [1, 9, 0, 10, 3, 11, 2, 6, 8, 7, 4, 5]
GOLDEN_ENDLESS = [12, 9, 10, 15, 18, 23, 20, 17, 16, 21, 22, 19]
