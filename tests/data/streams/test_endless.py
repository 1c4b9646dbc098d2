import itertools

import hypothesis
import pytest
from hypothesis import strategies as st

from jaxdist.data.streams.endless import EndlessLane
from jaxdist.data.streams.forward import ForwardReader


def lane_of(sizes, known=None):
    def open_shard(shard, start):
        return ((shard, number) for number in range(start, sizes[shard]))

    reader = ForwardReader(open_shard, behind=3, num_kept=10, num_cursors=3)
    learned = {} if known is None else known
    return EndlessLane(0, range(len(sizes)), reader, learned, lambda shard: f"shard {shard}"), learned


@hypothesis.settings(max_examples=40)
@hypothesis.given(st.lists(st.integers(0, 6), min_size=1, max_size=5).filter(sum), st.data())
def test_a_lane_repeats_its_shards_whatever_is_asked_first(sizes, data):
    everything = sorted((shard, number) for shard, size in enumerate(sizes) for number in range(size))
    lane, _ = lane_of(sizes)
    found = [lane.get(place) for place in range(3 * len(everything))]
    for number in range(3):
        assert sorted(found[number * len(everything) :][: len(everything)]) == everything
    places = data.draw(st.lists(st.integers(0, len(found) - 1), max_size=12))
    other, learned = lane_of(sizes)
    assert [other.get(place) for place in places] == [found[place] for place in places]
    again, _ = lane_of(sizes, dict(learned))
    assert [again.get(place) for place in places] == [found[place] for place in places]


def test_each_pass_has_an_order_of_its_own_and_reads_a_shard_from_its_beginning():
    lane, _ = lane_of([2, 2, 2, 2])
    shards = [lane.get(place)[0] for place in range(0, 80, 2)]
    passes = set(itertools.batched(shards, 4)) if hasattr(itertools, "batched") else set(zip(*[iter(shards)] * 4))
    assert len(passes) > 3


def test_a_lane_without_examples_and_one_that_changes_are_refused():
    lane, _ = lane_of([0, 0])
    with pytest.raises(ValueError, match=r"no examples in shard [01], shard [01]"):
        lane.get(0)
    sizes = [3]
    lane, _ = lane_of(sizes)
    lane.get(5)
    sizes[0] = 1
    with pytest.raises(ValueError, match="shard 0 had 3 examples in one pass and 1 in another"):
        list(map(lane.get, range(20, 26)))
