import errno
import pathlib
import sys

import pytest

from jaxdist import errors
from jaxdist.rundir import full_disk, ledger, writers


class Disk:
    """Takes `room` more bytes, then reports that it is full."""

    def __init__(self, monkeypatch, module):
        self.room, self._write = 0, module.os.write
        monkeypatch.setattr(module.os, "write", self.write)

    def write(self, descriptor, data):
        part = bytes(data[: self.room])
        if not part:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.room -= len(part)
        return self._write(descriptor, part)


def full():
    return OSError(errno.ENOSPC, "No space left on device")


def test_what_does_not_fit_is_written_later_in_order_and_said_once(capsys):
    written, is_full = [], [True]

    def write(item):
        if is_full[0]:
            raise full()
        written.append(item)

    backlog = full_disk.Backlog(write, "x")
    for item in range(5):
        backlog.add(item)
    assert written == []
    assert capsys.readouterr().err.count("The disk is full: x cannot be written") == 1
    is_full[0] = False
    backlog.add(5)
    assert written == list(range(6))


@pytest.mark.parametrize(("most_kept", "lost"), [(10, 5), (2, 5), (5, 5)])
def test_what_no_room_was_made_for_is_tried_once_more_and_counted(capsys, most_kept, lost):
    written, is_full = [], True

    def write(item):
        if is_full:
            raise full()
        written.append(item)

    backlog = full_disk.Backlog(write, "x", most_kept=most_kept)
    for item in range(5):
        backlog.add(item)
    backlog.close()
    assert f"Lost entries of x: {lost}." in capsys.readouterr().err
    is_full = False
    backlog.close()
    kept = list(range(5))[-most_kept:]
    assert written == kept
    assert (f"Lost entries of x: {5 - len(kept)}." in capsys.readouterr().err) == (len(kept) < 5)


@pytest.mark.parametrize("times_full", [0, 1, 3])
def test_what_cannot_be_done_without_waits_for_room_and_says_so_once(monkeypatch, capsys, times_full):
    pauses, left = [], [times_full]
    monkeypatch.setattr(full_disk.time, "sleep", pauses.append)

    def write():
        if left[0]:
            left[0] -= 1
            raise full()
        return "written"

    assert full_disk.until_written(write, "x") == "written"
    assert len(pauses) == times_full
    assert capsys.readouterr().err.count("x cannot be written. This process waits for room.") == min(times_full, 1)
    with pytest.raises(OSError, match="Input/output"):
        full_disk.until_written(lambda: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output error")), "x")


def test_a_disk_is_full_if_a_small_file_does_not_fit(tmp_path, monkeypatch):
    assert not full_disk.has_no_room(tmp_path)
    assert not full_disk.has_no_room(tmp_path / "missing")
    for number, expected in ((errno.ENOSPC, True), (errno.EDQUOT, True), (errno.EIO, False)):

        def write_bytes(path, data, number=number):
            path.touch()
            raise OSError(number, "no")

        monkeypatch.setattr(pathlib.Path, "write_bytes", write_bytes)
        assert full_disk.has_no_room(tmp_path) is expected
    assert list(tmp_path.iterdir()) == []


def test_a_message_that_nobody_can_store_is_dropped(monkeypatch):
    class Full:
        def write(self, text):
            raise full()

    monkeypatch.setattr(sys, "stderr", Full())
    full_disk.say("x")


def test_only_the_newest_wait():
    backlog = full_disk.Backlog(lambda item: (_ for _ in ()).throw(full()), "x", most_kept=1)
    backlog.add(1)
    backlog.add(2)


@pytest.mark.parametrize(("named", "said"), [((), "x"), (("a/metrics.jsonl",), "a/metrics.jsonl")])
def test_a_file_that_cannot_be_written_is_named_with_the_reason(named, said):
    """By one message, and still as an OSError: the record of a run that ends is left out then."""

    def fail(*_):
        raise OSError(errno.EIO, "Input/output error", *named)

    for write in (full_disk.Backlog(fail, "x").add, lambda item: full_disk.until_written(fail, "x")):
        with pytest.raises(errors.RunFailedError, match=f"and {said} cannot be written: Input/output error") as raised:
            write(1)
        assert isinstance(raised.value, OSError)


def test_a_library_that_raises_no_os_error_is_understood():
    error = ValueError("x")
    error.__cause__ = ValueError("RESOURCE_EXHAUSTED: No space left on device [os_error_code='28']")
    assert full_disk.is_full(error)
    assert not full_disk.is_full(ValueError("x"))


def test_a_ledger_on_a_full_disk_is_whole_when_there_is_room_again(tmp_path, monkeypatch):
    class Place:
        def __init__(self, position):
            self.epoch, self.position = 0, position

    disk = Disk(monkeypatch, ledger)
    disk.room = 20  # in the middle of a line
    recorder = ledger.Recorder(tmp_path)
    for step in range(1, 6):
        recorder.add(step, Place(8 * step))
    disk.room = 1000
    recorder.close()
    entries = ledger.read(tmp_path)
    assert [entry.step for entry in entries] == [1, 2, 3, 4, 5]
    ledger.check(entries, num_examples=48)


@pytest.mark.parametrize("kind", ["jsonl", "csv", "tensorboard"])
def test_metrics_on_a_full_disk_are_whole_when_there_is_room_again(tmp_path, monkeypatch, kind):
    """Half a row is written before the disk is full; a new column of a table comes meanwhile."""
    whole, half = tmp_path / "whole", tmp_path / "half"
    rows = [(1, {"a": 1.0}), (2, {"a": 2.0}), (3, {"a": 3.0, "b": 4.0}), (4, {"a": 5.0, "b": 6.0})]
    write_all, is_full = writers._write_all, [False]

    def torn(path, file, data):
        write_all(path, file, data[: len(data) // 2] if is_full[0] else data)
        if is_full[0]:
            raise full()

    monkeypatch.setattr(writers, "_write_all", torn)
    for folder in (whole, half):
        folder.mkdir()
        writer = writers.Patient(writers.make_writers(folder, (kind,))[0])
        for number, row in enumerate(rows):
            is_full[0] = folder == half and number in (1, 2)
            writer.write(*row)
        writer.close()
    assert [content(path) for path in files_of(half)] == [content(path) for path in files_of(whole)]


def files_of(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def content(path):
    if "tfevents" not in path.name:
        return path.read_text()
    from tensorboard.backend.event_processing import event_file_loader

    events = event_file_loader.EventFileLoader(str(path)).Load()
    return [(event.step, [value.tag for value in event.summary.value]) for event in events]
