import numpy as np
import pytest

from jaxdist.data.streams.forward import EndOfShard, ForwardReader, examples_from


def reader_of(size, *, seeks=False, **settings):
    """Return a reader of shards of `size` numbers, and the starts at which shards were opened."""
    opened, closed = [], []

    def open_shard(shard, start):
        opened.append((shard, start))

        def numbers():
            try:
                yield from ({"x": i} for i in range(start, size))
            finally:
                closed.append(shard)

        return numbers() if seeks else examples_from(({"x": i} for i in range(size)), start)

    settings = {"behind": 4, "num_kept": 8, "num_cursors": 2} | settings
    return ForwardReader(open_shard, farthest=2000 if seeks else None, **settings), opened, closed


@pytest.mark.parametrize("seeks", [False, True])
def test_a_place_in_the_middle_is_found_and_what_is_before_it_is_at_hand(seeks):
    reader, opened, _ = reader_of(50, seeks=seeks)
    assert [reader.get(0, place)["x"] for place in (30, 27, 26, 31, 33, 32)] == [30, 27, 26, 31, 33, 32]
    assert opened == [(0, 26)]
    assert reader.get(0, 3)["x"] == 3
    assert len(opened) == 2


@pytest.mark.parametrize("seeks", [False, True])
@pytest.mark.parametrize("place", [10, 13, 500])
def test_the_size_of_a_shard_that_ends_early_is_right_however_far_the_question_was(seeks, place):
    reader, _, _ = reader_of(10, seeks=seeks)
    with pytest.raises(EndOfShard) as ended:
        reader.get(0, place)
    assert ended.value.size == 10
    assert reader.check_end(0, 10)
    assert not reader.check_end(0, 9)


def test_of_many_open_shards_the_oldest_is_closed():
    reader, opened, closed = reader_of(5, seeks=True)
    for shard in range(4):
        reader.get(shard, 0)
    assert (len(opened), closed) == (4, [0, 1])


def test_one_that_seeks_does_not_read_on_to_what_is_far():
    reader, opened, _ = reader_of(10_000, seeks=True)
    reader.get(0, 0)
    reader.get(0, 9000)
    assert opened == [(0, 0), (0, 8996)]
    reader, opened, _ = reader_of(10_000)
    reader.get(0, 0)
    assert np.array_equal(reader.get(0, 9000)["x"], 9000)
    assert opened == [(0, 0)]


def test_a_shard_that_failed_is_opened_again():
    attempts = []

    def open_shard(shard, start):
        attempts.append(start)
        yield {"x": 0}
        if len(attempts) == 1:
            raise OSError("not now")
        yield {"x": 1}

    reader = ForwardReader(open_shard, behind=4, num_kept=8, num_cursors=2)
    with pytest.raises(OSError, match="not now"):
        reader.get(0, 1)
    assert reader.get(0, 1) == {"x": 1}
