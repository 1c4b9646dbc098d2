"""The log of the scheduler, as bytes: what its process did not finish is dropped, and any damage is an error."""

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from jaxdist.paramserver.wire import log_frames

RECORDS = st.lists(st.binary(min_size=1, max_size=20), max_size=6)


def written(records):
    """Return the frames of a log."""
    frames = log_frames.LogFrames()
    made = [frames.frame(record) for record in records]
    assert frames.size == sum(map(len, made))
    return made


def read(data):
    """Return the records of a log, None if it is damaged; and what they would be after one more is appended."""
    frames = log_frames.LogFrames()
    try:
        found = [bytes(record) for record in frames.read(data)]
    except log_frames.DamagedLogError:
        return None
    again = log_frames.LogFrames().read(data[: frames.size] + frames.frame(b"more"))
    assert [bytes(record) for record in again] == [*found, b"more"]
    return found


@given(RECORDS, st.integers(0, 300), st.integers(0, 8))
def test_a_log_that_ends_anywhere_has_the_records_before_its_end(records, cut, zeros):
    """Zeros are what a file system leaves that has made the file longer before a crash, and not written the bytes."""
    frames = written(records)
    data = b"".join(frames)[:cut]
    whole = sum(sum(map(len, frames[: number + 1])) <= len(data) for number in range(len(frames)))
    found = read(data + bytes(zeros))
    # A record whose last bytes are zeros may be completed by zeros.
    assert found == records[:whole] or (zeros and found == records[: whole + 1])


@given(RECORDS.filter(bool), st.data(), st.integers(1, 255))
def test_a_byte_that_has_changed_is_noticed(records, data, change):
    frames = written(records)
    log = bytearray(b"".join(frames))
    at = data.draw(st.integers(0, len(log) - 1))
    log[at] ^= change
    found = read(bytes(log))
    # A last record that now ends with zeros cannot be told from one that was not written to the end.
    assert found is None or (log[-1] == 0 and at >= len(log) - len(frames[-1]) and found == records[:-1])


@given(RECORDS.filter(lambda records: len(records) > 1), st.data())
def test_records_that_are_missing_repeated_or_moved_are_noticed(records, data):
    # One whose last bytes are zeros, again at the end, is taken for one that was not written to its end: it is dropped.
    frames = written([record + b"." for record in records])
    first, second = (data.draw(st.integers(0, len(frames) - 1)) for _ in range(2))
    repeated = [*frames[: first + 1], *frames[second:]]
    assume(repeated != frames)
    assert read(b"".join(repeated)) is None
    moved = list(frames)
    moved[first], moved[second] = moved[second], moved[first]
    assume(moved != frames)
    assert read(b"".join(moved)) is None


@given(RECORDS, st.binary(min_size=1, max_size=60))
def test_bytes_that_are_no_record_are_noticed(records, junk):
    assume(junk.strip(b"\0") and not junk.startswith(b"j"))
    assert read(b"".join(written(records)) + junk) is None


@pytest.mark.parametrize("record", [b"", bytes(5)])
def test_records_of_nothing_are_records(record):
    assert read(b"".join(written([record, record]))) == [record, record]
