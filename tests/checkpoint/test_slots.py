import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from jaxdist.checkpoint import slots

STRUCTURE = json.dumps({"leaves": [["a", "uint8", "uint8", [5]]], "pieces": [{"leaf": 0, "index": [[0, 5]]}]})


def write(made, step, values=(1, 2, 3, 4, 5)):
    buffers = [np.asarray(values, np.uint8)]
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


def test_the_oldest_slot_is_overwritten_also_by_the_next_process(tmp_path):
    first = slots.Slots(tmp_path, 0)
    for step in (1, 2, 3, 4):
        write(first, step)
    assert sorted(slots.by_step(tmp_path, "a")) == [2, 3, 4]
    next_ = slots.Slots(tmp_path, 0)
    write(next_, 5)
    assert sorted(slots.by_step(tmp_path, "a")) == [3, 4, 5]


@pytest.mark.parametrize("at_most", [1, 7, 40])
def test_a_system_that_writes_only_a_part_at_once_is_asked_for_the_rest(tmp_path, monkeypatch, at_most):
    whole = slots.os.pwritev

    def some_of(descriptor, parts, offset):
        return whole(descriptor, [parts[0][:at_most]], offset)

    monkeypatch.setattr(slots.os, "pwritev", some_of)
    write(slots.Slots(tmp_path, 3), 8, range(5))
    (file,) = slots.by_step(tmp_path, "a")[8]
    assert file.is_intact()
    assert bytes(file.content[file.offset : file.offset + 5]) == bytes(range(5))
