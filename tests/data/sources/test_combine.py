import json

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType

from jaxdist import data
from jaxdist.data import ArraySource, Loader
from jaxdist.data.placement import host_shards
from jaxdist.data.sources.combine import Concatenated, Filtered, Sharded, ShardList
from jaxdist.data.sources.mixture import mix


def part(begin, end):
    return ArraySource({"id": np.arange(begin, end)})


def test_concatenated_sources_keep_their_order_and_their_fingerprints():
    source = Concatenated([part(0, 3), part(3, 4), part(4, 9)])
    assert [int(source[index]["id"]) for index in range(len(source))] == list(range(9))
    assert source.fingerprint() != Concatenated([part(0, 3), part(3, 9)]).fingerprint()
    assert source.fingerprint() == Concatenated([part(0, 3), part(3, 4), part(4, 9)]).fingerprint()


def test_a_mixture_resumes_anywhere():
    def load(size, start=None):
        source, shuffle = mix([part(0, 20), part(20, 25)], (2, 1))
        return Loader(source, shuffle=shuffle, global_batch_size=size, seed=0, num_epochs=2, start=start)

    items = list(load(6))
    whole = np.concatenate([batch["id"][batch["mask"] == 1] for batch, _ in items])
    assert np.count_nonzero(whole[:24] >= 20) == 8
    resumed = list(load(5, start=items[2].position))
    rest = np.concatenate([batch["id"][batch["mask"] == 1] for batch, _ in resumed])
    np.testing.assert_array_equal(rest, whole[18:])


def test_filtered_examples_keep_their_row_and_lose_their_mask():
    source = Filtered(part(0, 7), lambda example: example["id"] % 3 == 0, version="thirds")
    batches = [batch for batch, _ in Loader(source, global_batch_size=4, seed=0, shuffle=False, num_epochs=1)]
    assert [batch["mask"].tolist() for batch in batches] == [[1, 0, 0, 1], [0, 0, 1, 0]]
    assert source.fingerprint() != Filtered(part(0, 7), lambda e: True, version="all").fingerprint()


SHARDS = [part(0, 5), part(5, 7), part(7, 16), part(16, 20)]


@pytest.mark.parametrize("num_hosts", [1, 2, 4])
def test_shards_on_hosts_give_the_batches_of_one_host_with_all_of_them(num_hosts):
    shard_list = ShardList.from_json(json.loads(json.dumps(ShardList.of(SHARDS).to_json())))
    per_host, rows_per_host = len(SHARDS) // num_hosts, 8 // num_hosts

    def load(numbers, rows=None):
        source = Sharded({number: SHARDS[number] for number in numbers}, shard_list)
        return Loader(source, shuffle=source.order(), global_batch_size=8, seed=3, num_epochs=2, rows=rows)

    alone = list(load(range(4)))
    assert len(alone) == 2 * load(range(4)).steps_per_epoch == 10
    hosts = [
        list(
            load(
                range(host * per_host, (host + 1) * per_host),
                np.arange(host * rows_per_host, (host + 1) * rows_per_host),
            )
        )
        for host in range(num_hosts)
    ]
    for step, (batch, position) in enumerate(alone):
        assert all(host[step].position == position for host in hosts)
        for name, array in batch.items():
            np.testing.assert_array_equal(array, np.concatenate([host[step].batch[name] for host in hosts]))
    for epoch in (alone[:5], alone[5:]):
        ids = np.concatenate([batch["id"][batch["mask"] == 1] for batch, _ in epoch])
        assert sorted(ids) == list(range(20))


def test_shards_that_are_missing_or_differ_from_the_list_are_refused():
    shard_list = ShardList.of(SHARDS)
    with pytest.raises(ValueError, match=r"shard 3.*has the shards \[0, 1\]"):
        Sharded({0: SHARDS[0], 1: SHARDS[1]}, shard_list)[17]
    with pytest.raises(ValueError, match="Shard 1 differs from the shard list"):
        Sharded({1: part(5, 8)}, shard_list)
    with pytest.raises(ValueError, match="no shard 9"):
        Sharded({9: part(5, 8)}, shard_list)


def test_host_shards_follow_the_mesh():
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]), ("data",), axis_types=(AxisType.Auto,))
    assert host_shards(mesh, 6) == list(range(6))


def even(example):
    return example["id"] % 2 == 0


def true_ids(source, **settings):
    loader = Loader(source, global_batch_size=4, seed=0, num_epochs=1, num_threads=0, **settings)
    return sorted(i for batch, _ in loader for i in batch["id"][batch["mask"] == 1].tolist())


def test_filters_mean_what_they_say_in_any_composition():
    evens = Filtered(part(0, 9), even, version="even")
    joined = Concatenated([evens, part(9, 14), Filtered(part(14, 17), even, version="even")])
    expected = [0, 2, 4, 6, 8, *range(9, 14), 14, 16]
    assert true_ids(joined) == expected
    source, shuffle = mix([part(9, 14), evens], (1, 1))
    assert set(true_ids(source, shuffle=shuffle)) <= {0, 2, 4, 6, 8, *range(9, 14)}
    assert true_ids(Filtered(joined, lambda example: example["id"] > 4, version="large")) == expected[3:]
    shards = {0: evens, 1: part(9, 14)}
    assert true_ids(Sharded(shards, ShardList.of(list(shards.values())))) == expected[:10]


def test_a_function_that_makes_a_new_dict_does_not_undo_a_filter():
    evens = Filtered(part(0, 9), even, version="even")
    assert true_ids(evens, example_fn=lambda example, random: {"id": example["id"]}) == [0, 2, 4, 6, 8]


def test_joined_sources_count_from_the_end_and_end():
    joined = Concatenated([part(0, 3), part(3, 5)])
    assert joined[-1]["id"] == 4
    assert [int(example["id"]) for example in joined] == [0, 1, 2, 3, 4]
    for index in (5, -6):
        with pytest.raises(IndexError, match=f"no example {index}: the source has 5"):
            joined[index]


def test_the_order_of_a_source_that_needs_one_is_taken_by_itself():
    sharded = Sharded(dict(enumerate(SHARDS)), ShardList.of(SHARDS))
    for shuffle in (True, False):
        asked = Loader(sharded, shuffle=sharded.order(shuffle=shuffle), global_batch_size=8, seed=3, num_epochs=1)
        found = Loader(sharded, shuffle=shuffle, global_batch_size=8, seed=3, num_epochs=1)
        assert found.beginning == asked.beginning
        assert true_ids(sharded, shuffle=shuffle) == list(range(20))


class KeepMost:
    """Leaves out the numbers that have a rest."""

    def __init__(self, divisor, rest):
        self.divisor, self.rest = divisor, rest

    def __call__(self, example):
        return example["x"] % self.divisor != self.rest


def composed(draw, depth, first=0):
    """Return a source put together at random, and (number, whether it counts) of each of its examples."""
    kind = draw(st.sampled_from(["leaf", "subset", "filter", "concatenate", "fold"])) if depth else "leaf"
    if kind == "leaf":
        numbers = list(range(first, first + draw(st.integers(1, 12))))
        return ArraySource({"x": np.array(numbers)}), [(number, True) for number in numbers]
    source, model = composed(draw, depth - 1, first)
    if kind == "subset":
        ids = draw(st.lists(st.integers(0, len(model) - 1), min_size=1, max_size=15))
        return data.Subset(source, ids), [model[index] for index in ids]
    if kind == "filter":
        keep = KeepMost(draw(st.integers(2, 4)), draw(st.integers(0, 1)))
        counts = [(number, counted and number % keep.divisor != keep.rest) for number, counted in model]
        return data.Filtered(source, keep, version=f"{keep.divisor} {keep.rest}"), counts
    if kind == "fold" and len(model) > 1:
        part = draw(st.sampled_from(draw(st.sampled_from(data.folds(source, 2, seed=draw(st.integers(0, 3)))))))
        return part, [model[index] for index in part.ids]
    other, others = composed(draw, depth - 1, first + 100 * 2**depth)
    return data.Concatenated([source, other]), [*model, *others]


@settings(max_examples=60)
@given(st.data())
def test_any_composition_has_the_examples_that_a_list_of_them_would_have_and_resumes_anywhere(drawn):
    source, model = composed(drawn.draw, drawn.draw(st.integers(0, 3)))
    size = drawn.draw(st.integers(1, min(len(model), 6)))
    orders = st.sampled_from([True, False, data.BlockShuffled(3)])
    loader = data.Loader(
        source, global_batch_size=size, seed=drawn.draw(st.integers(0, 9)), shuffle=drawn.draw(orders), num_epochs=2
    )
    batches = list(loader)
    for epoch in range(2):
        mine = [batch for batch, position in batches if position.epoch == epoch]
        found = [int(number) for batch in mine for number in batch["x"][batch["mask"] == 1]]
        assert sorted(found) == sorted(number for number, counted in model if counted)
    at, rows = drawn.draw(st.integers(1, len(batches))), drawn.draw(st.integers(1, size))
    for part in np.array_split(np.arange(size), rows):
        again = loader.with_rows(part).starting_at(batches[at - 1][1])
        for (batch, position), (whole, expected) in zip(again, batches[at:], strict=True):
            assert position == expected
            for name in whole:
                np.testing.assert_array_equal(batch[name], whole[name][part])
