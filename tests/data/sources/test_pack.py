import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from jaxdist.data import Loader
from jaxdist.data.sources.combine import Filtered
from jaxdist.data.sources.pack import Blocks, Bucketed, Packed, example_lengths, pack_index
from jaxdist.data.sources.source import COUNTS


class Sentences:
    """Example i is i + 1, repeated."""

    def __init__(self, lengths):
        self.lengths = lengths

    def __len__(self):
        return len(self.lengths)

    def __getitem__(self, index):
        return {"tokens": np.full(self.lengths[index], index + 1, np.int32)}

    def fingerprint(self):
        return f"sentences:{self.lengths}"


lengths = st.lists(st.integers(1, 20), min_size=1, max_size=100)


@hypothesis.given(lengths, st.integers(20, 50))
def test_every_example_is_packed_into_one_row_that_holds_it(sizes, row_length):
    rows = pack_index(np.array(sizes), row_length)
    assert sorted(i for row in rows for i in row) == list(range(len(sizes)))
    assert all(sum(sizes[i] for i in row) <= row_length for row in rows)
    # No two rows fit into one, since best fit would have merged them.
    totals = sorted(sum(sizes[i] for i in row) for row in rows)
    assert len(totals) < 2 or totals[0] + totals[1] > row_length


@hypothesis.given(lengths)
def test_rows_give_the_examples_back_by_their_segments(sizes):
    source = Sentences(sizes)
    packed = Packed(source, example_lengths(source, "tokens"), row_length=25, pad=-1)
    found = []
    for row in (packed[index] for index in range(len(packed))):
        assert {name: value.shape for name, value in row.items()} == dict.fromkeys(row, (25,))
        assert (row["tokens"][row["segment_ids"] == 0] == -1).all()
        for segment in range(1, row["segment_ids"].max() + 1):
            inside = row["segment_ids"] == segment
            (token,) = set(row["tokens"][inside].tolist())
            np.testing.assert_array_equal(row["positions"][inside], np.arange(sizes[token - 1]))
            found.append(token - 1)
    assert sorted(found) == list(range(len(sizes)))


def test_examples_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="Example 1 has 30, and 2 examples"):
        pack_index(np.array([3, 30, 0]), 25)
    with pytest.raises(ValueError, match="a length for each"):
        Packed(Sentences([3, 4]), np.array([3]), row_length=5)
    with pytest.raises(ValueError, match="example 1 has the length 3"):
        Packed(Sentences([3, 4]), np.array([3, 3]), row_length=6)[0]
    with pytest.raises(ValueError, match="example 1 has the length 3"):
        Bucketed(Sentences([3, 4]), np.array([3, 3]), boundaries=(6,))[1]


def test_fields_and_paddings_that_the_examples_cannot_have_are_refused():
    for pad in (0.5, 2**40, float("nan")):
        with pytest.raises(ValueError, match="is no value of int32"):
            Bucketed(Sentences([3, 4]), np.array([3, 4]), boundaries=(6,), pad=pad)[0]
    with pytest.raises(ValueError, match=r"Example 0 has no field 'words'; it has \['tokens'\]"):
        Bucketed(Sentences([3, 4]), np.array([3, 4]), boundaries=(6,), fields=("words",))[0]
    with pytest.raises(ValueError, match="`fields` are a list of names"):
        Packed(Sentences([3, 4]), np.array([3, 4]), row_length=6, fields="tokens")
    for lengths in ([3.0, 4.0], [-1, 4], [[3, 4]]):
        with pytest.raises(ValueError, match="lengths has a whole number for each example"):
            Bucketed(Sentences([3, 4]), np.array(lengths), boundaries=(6,))


@hypothesis.given(lengths, st.integers(1, 9), st.integers(1, 30))
def test_batches_of_a_bucket_have_its_length_and_an_epoch_has_all_examples(sizes, batch_size, block_size):
    source = Bucketed(Sentences(sizes), np.array(sizes), boundaries=(5, 12, 20), block_size=block_size)
    size = min(batch_size, len(sizes))
    loader = Loader(source, shuffle=source.order(), global_batch_size=size, seed=1, num_epochs=1, num_threads=0)
    batches = [batch for batch, _ in loader]
    assert len(batches) == loader.steps_per_epoch
    seen = []
    for batch in batches:
        width = batch["tokens"].shape[1]
        shorter = {5: 0, 12: 5, 20: 12}[width]
        assert ((batch["length"] > shorter) & (batch["length"] <= width)).all()
        np.testing.assert_array_equal((batch["tokens"] > 0).sum(axis=1), batch["length"])
        seen += batch["tokens"][batch["mask"] == 1, 0].tolist()
    assert sorted(seen) == list(range(1, len(sizes) + 1))


@hypothesis.given(st.lists(st.integers(1, 20), min_size=1, max_size=8), st.lists(st.integers(1, 9), min_size=1))
def test_blocks_lose_nothing_when_the_batch_size_changes(sizes, batch_sizes):
    scheme, total, position, seen, step = Blocks(tuple(sizes)), sum(sizes), 0, [], 0
    while position < total:
        batch = scheme.batch(total, 0, 1, position, batch_sizes[step % len(batch_sizes)])
        seen += batch.ids[batch.mask == 1].tolist()
        position, step = batch.after, step + 1
    assert sorted(seen) == list(range(total))


def test_boundaries_must_hold_the_longest_example():
    with pytest.raises(ValueError, match="longest example, 9"):
        Bucketed(Sentences([3, 9]), np.array([3, 9]), boundaries=(4, 8))


class Marked(Sentences):
    """Sentences whose elements all have a mask: 0 for every third."""

    def __getitem__(self, index):
        return {**super().__getitem__(index), COUNTS: np.arange(self.lengths[index]) % 3 > 0}


@hypothesis.given(lengths)
def test_what_was_filtered_out_is_in_no_row(sizes):
    source = Filtered(Sentences(sizes), lambda example: len(example["tokens"]) % 2 == 0, version="even")
    found = set()
    for row in Packed(source, np.array(sizes), row_length=25):
        inside = row["segment_ids"] > 0
        assert bool(row[COUNTS]) == inside.any()
        assert not row["tokens"][~inside].any()
        found |= set(row["tokens"][inside].tolist())
    assert found == {i + 1 for i, size in enumerate(sizes) if size % 2 == 0}


def test_masks_of_elements_are_packed_and_padded_like_the_elements():
    sizes = [4, 7, 2, 9]
    (row,) = Packed(Marked(sizes), np.array(sizes), row_length=25)
    assert row[COUNTS].shape == (25,)
    for segment in range(1, 5):
        inside = row["segment_ids"] == segment
        np.testing.assert_array_equal(row[COUNTS][inside], row["positions"][inside] % 3 > 0)
    assert not row[COUNTS][row["segment_ids"] == 0].any()
    bucketed = Bucketed(Marked(sizes), np.array(sizes), boundaries=(5, 10))
    assert {len(example[COUNTS]) for example in bucketed} == {5, 10}


def test_bucketed_data_are_evaluated_in_their_order():
    sizes = [3, 9, 4, 8, 2, 7, 1]
    source = Bucketed(Sentences(sizes), np.array(sizes), boundaries=(4, 10), block_size=2)
    for _ in range(2):
        loader = Loader(source, global_batch_size=2, seed=0, shuffle=False, num_epochs=1)
        batches = [batch for batch, _ in loader]
        assert len(batches) == loader.steps_per_epoch == 4
        seen = [int(t) for batch in batches for t in batch["tokens"][batch["mask"] == 1][:, 0]]
        assert seen == [1, 3, 5, 7, 2, 4, 6]
    assert source[-1]["tokens"][0] == 6
