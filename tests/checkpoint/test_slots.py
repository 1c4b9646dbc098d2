import errno
import json
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from jaxdist.checkpoint import slots

STRUCTURE = json.dumps({"leaves": [["a", "uint8", "uint8", [5]]], "pieces": [{"leaf": 0, "index": [[0, 5]]}]})


def write(made, step, values=(1, 2, 3, 4, 5)):
    buffers = [np.asarray(values).astype(np.uint8)]
    made.write(slots.header_of({"identity": "a", "step": step}, STRUCTURE, buffers), buffers)


@settings(max_examples=60, deadline=None)
@given(size=some.integers(1, 20_000), where=some.floats(0, 1, exclude_max=True), flipped=some.integers(1, 255))
def test_the_checksum_notices_every_change_of_a_byte(size, where, flipped):
    data = np.random.default_rng(size).integers(0, 256, size, dtype=np.uint8)
    before = slots.checksum(data)
    data[int(where * size)] ^= flipped
    assert slots.checksum(data) != before
    data[int(where * size)] ^= flipped
    assert slots.checksum(data) == before


@settings(max_examples=60, deadline=None)
@given(
    begin=some.integers(0, 16_000),
    places=some.sets(some.integers(0, 4095), min_size=2, max_size=2),
    flipped=some.integers(1, 255),
)
def test_the_checksum_notices_the_same_change_of_two_bytes_that_are_close(begin, places, flipped):
    data = np.random.default_rng(0).integers(0, 256, 20_101, dtype=np.uint8)
    before = slots.checksum(data)
    data[[begin + place for place in places]] ^= flipped
    assert slots.checksum(data) != before


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_the_next_process_fills_an_empty_slot_and_overwrites_the_oldest_only_without_one(tmp_path, count):
    first = slots.Slots(tmp_path, 0)
    for step in range(1, count + 1):
        write(first, step)
    write(slots.Slots(tmp_path, 0), count + 1)
    assert sorted(slots.by_step(tmp_path, "a")) == list(range(max(1, count - 1), count + 2))


@pytest.mark.parametrize("fitting", [0, 1, 2])
def test_slots_that_do_not_fit_take_no_memory_and_the_error_says_why(tmp_path, monkeypatch, fitting):
    reserve, reserved = os.posix_fallocate, []

    def nearly_full(descriptor, offset, length):
        if len(reserved) == fitting:
            raise OSError(errno.ENOSPC, "No space left on device")
        reserved.append(reserve(descriptor, offset, length))

    monkeypatch.setattr(os, "posix_fallocate", nearly_full)
    with pytest.raises(OSError, match="No space left"):
        write(slots.Slots(tmp_path, 0), 1)
    assert [path.stat().st_size for path in tmp_path.iterdir()] == [0] * (fitting + 1)


def test_a_snapshot_that_is_copied_is_the_same(tmp_path):
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    write(slots.Slots(tmp_path / "here", 0), 1)
    (file,) = slots.by_step(tmp_path / "here", "a")[1]
    slots.Slots(tmp_path / "there", 0).write(file.header_text(), [np.frombuffer(file.data(), np.uint8)])
    (copied,) = slots.by_step(tmp_path / "there", "a")[1]
    assert (copied.header, copied.header_text(), copied.data()) == (file.header, file.header_text(), file.data())


@pytest.mark.parametrize("step", [10**digits for digits in range(8)])
def test_numbers_begin_at_a_multiple_of_their_size_whatever_the_length_of_the_header(tmp_path, step):
    write(slots.Slots(tmp_path, 0), step)
    assert slots.by_step(tmp_path, "a")[step][0].offset % 8 == 0


def test_a_slot_that_was_removed_or_is_too_small_is_made_again(tmp_path):
    made = slots.Slots(tmp_path, 3)
    for step in (1, 2, 3):
        write(made, step)
    slots.of_process(tmp_path, 3)[0].unlink()
    write(made, 4)
    assert sorted(slots.by_step(tmp_path, "a")) == [2, 3, 4]
    large = range(200_000)
    write(made, 5, np.asarray(large).astype(np.uint8))
    (file,) = slots.by_step(tmp_path, "a")[5]
    assert file.is_intact()
    assert file.data() == np.asarray(large).astype(np.uint8).tobytes()
    assert sorted(slots.by_step(tmp_path, "a")) == [3, 4, 5]


@settings(max_examples=40, deadline=None)
@given(lengths=some.lists(some.integers(0, 9000), max_size=4))
def test_what_an_interrupted_write_has_left_is_no_snapshot(tmp_path_factory, lengths):
    directory, killed = tmp_path_factory.mktemp("slots"), RuntimeError("killed")
    made = slots.Slots(directory, 0)
    for step in (1, 2, 3):
        write(made, step, np.full(9000, step))

    class Killed(np.ndarray):
        def reshape(self, *shape):
            raise killed

    buffers = [np.zeros(length, np.uint8) for length in lengths]
    header = slots.header_of({"identity": "a", "step": 4}, STRUCTURE, buffers)
    with pytest.raises(RuntimeError):
        made.write(header, [*buffers, np.zeros(1, np.uint8).view(Killed)])
    assert sorted(slots.by_step(directory, "a")) == [2, 3]


def described(*pieces, shape=(5, 2)):
    """Return a header whose pieces are rows of one leaf."""
    indices = [[list(bounds), [0, shape[1]]] for bounds in pieces]
    return {"leaves": [["a", "a", "uint8", list(shape)]], "pieces": [{"leaf": 0, "index": index} for index in indices]}


@pytest.mark.parametrize(
    ("headers", "whole"),
    [
        ([], False),
        ([described((0, 5))], True),
        ([described((0, 3)), described((3, 5))], True),
        ([described((0, 3)), described((0, 3), (3, 5))], True),
        ([described((0, 4))], False),
        ([described((0, 2), (0, 2)), described((4, 5))], False),
    ],
)
def test_pieces_of_several_processes_cover_a_leaf_and_copies_count_once(headers, whole):
    assert slots.covers(headers) == whole


def test_a_slot_that_was_cut_off_is_not_opened(tmp_path):
    write(slots.Slots(tmp_path, 0), 1)
    path = next(path for _, path in slots.paths_in(tmp_path) if slots.open_slot(path))
    file = slots.open_slot(path)
    content = path.read_bytes()[: file.offset + 5]
    assert file.data() == bytes([1, 2, 3, 4, 5])
    path.write_bytes(content)
    assert slots.open_slot(path) is not None
    path.write_bytes(content[:-1])
    assert slots.open_slot(path) is None
