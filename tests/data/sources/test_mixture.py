"""Mixtures whose weights change: proportions within a stage, whole passes across stages, any part found alone."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxdist.data import ArraySource, Loader, ScheduledMix, mix, order, ramp

stage_weights = st.tuples(st.integers(0, 5), st.integers(0, 5), st.integers(1, 5))
schedules = st.tuples(
    st.lists(stage_weights, min_size=1, max_size=4), st.lists(st.integers(1, 40), min_size=3, max_size=3)
)


def scheduled(sizes, weights, lengths):
    begins = [0, *np.cumsum(lengths).tolist()]
    return ScheduledMix(sizes, tuple(zip(begins, weights)))


@settings(max_examples=60)
@given(schedules, st.tuples(*[st.integers(1, 20)] * 3), st.integers(0, 3), st.data())
def test_stages_keep_their_proportions_passes_are_whole_and_any_part_is_found_alone(schedule, sizes, seed, data):
    scheme, total, num_epochs = scheduled(sizes, *schedule), sum(sizes), 5
    ids = np.concatenate([scheme(total, seed, epoch, 0, total) for epoch in range(num_epochs)])
    owner = np.searchsorted(np.cumsum(sizes), ids, side="right")
    for index, size in enumerate(sizes):
        drawn = (ids - sum(sizes[:index]))[owner == index]
        for begin in range(0, len(drawn) - size + 1, size):
            assert sorted(drawn[begin : begin + size]) == list(range(size))
    ends = [begin for begin, _ in scheme.stages[1:]] + [len(ids)]
    for (begin, weights), end in zip(scheme.stages, ends):
        mine = owner[begin : min(end, len(ids))]
        for index, weight in enumerate(weights):
            assert abs(np.count_nonzero(mine == index) - len(mine) * weight / sum(weights)) <= len(sizes)
            assert weight or not (mine == index).any()
    epoch = data.draw(st.integers(0, num_epochs - 1))
    start = data.draw(st.integers(0, total))
    stop = data.draw(st.integers(start, total))
    whole = ids[epoch * total : (epoch + 1) * total]
    np.testing.assert_array_equal(scheme(total, seed, epoch, start, stop), whole[start:stop])


@settings(max_examples=60)
@given(st.lists(st.sampled_from([0, 0, 1, 3, np.int8(100), -1, 1.0]), min_size=1, max_size=4), st.integers(0, 3))
def test_one_stage_is_the_mixture_without_a_schedule_or_both_are_refused(weights, seed):
    sizes = (90, 10, 7, 3)[: len(weights)]
    total, weights = sum(sizes), tuple(weights)
    if min(weights) < 0 or not any(weights) or any(isinstance(weight, float) for weight in weights):
        for make in (lambda: order.Mixed(sizes, weights), lambda: ScheduledMix(sizes, ((0, weights),))):
            with pytest.raises(ValueError, match="Weights are whole numbers of at least 0, one for each of the"):
                make()
        return
    one, other = ScheduledMix(sizes, ((0, weights),)), order.Mixed(sizes, weights)
    found = np.concatenate([other(total, seed, epoch, 0, total) for epoch in range(3)])
    np.testing.assert_array_equal(np.concatenate([one(total, seed, epoch, 0, total) for epoch in range(3)]), found)
    drawn = np.bincount(np.searchsorted(np.cumsum(sizes), found, side="right"), minlength=len(sizes))
    assert all(not drawn[index] for index, weight in enumerate(weights) if weight == 0)


def test_a_schedule_resumes_and_another_one_is_refused():
    easy, hard = (ArraySource({"x": np.arange(count) + begin}) for count, begin in ((30, 0), (20, 100)))
    source, scheme = mix([easy, hard], (1, 0), later=ramp((0, (1, 0)), (80, (0.25, 0.75)), num_stages=4))
    loader = Loader(source, shuffle=scheme, global_batch_size=8, seed=0, num_epochs=3)
    batches = list(loader)
    found = [batch["x"].tolist() for batch, _ in batches]
    assert [batch["x"].tolist() for batch, _ in loader.starting_at(batches[8].position)] == found[9:]
    assert all(each < 100 for batch in found[:2] for each in batch)
    assert sum(each >= 100 for batch in found[11:] for each in batch) > 40
    _, other = mix([easy, hard], (1, 0), later={40: (1, 1)})
    with pytest.raises(ValueError, match="order_version"):
        Loader(source, shuffle=other, global_batch_size=8, seed=0, start=batches[8].position)


def test_a_ramp_ends_at_its_last_weights():
    assert ramp((100, (1, 0)), (200, (1, 3)), num_stages=3) == {133: (3, 1), 167: (1, 1), 200: (1, 3)}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ScheduledMix((3, 3), ((1, (1, 1)),)), "ascend from example 0"),
        (lambda: ScheduledMix((3, 3), ((0, (1, 1)), (0, (1, 2)))), "ascend"),
        (lambda: ScheduledMix((3, 3), ((0, (0, 0)),)), "not all of them 0"),
        (lambda: ScheduledMix((3, 3), ((0, (0.5, 0.5)),)), "whole numbers"),
        (lambda: ScheduledMix((3, 0), ((0, (1, 1)),)), "at least 1; got 0"),
        (lambda: ScheduledMix((3, 3), ((0, (1, 1)),))(7, 0, 0, 0, 7), "6 examples in all"),
        (lambda: ramp((5, (1, 0)), (5, (0, 1))), "later one"),
        (lambda: ramp((0, (0, 0)), (50, (0, 1))), "not all 0"),
        (lambda: ramp((0, (1, -0.5)), (50, (0, 1))), "at least 0"),
        (lambda: mix([ArraySource({"x": np.arange(2)})], (1,), later={2.5: (1,)}), "whole numbers of examples"),
    ],
)
def test_impossible_schedules_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
