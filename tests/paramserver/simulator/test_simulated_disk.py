"""A simulated disk keeps what is durable, and what was written in part is never read."""

import zlib

import pytest

from jaxdist.paramserver.protocol import journal
from jaxdist.paramserver.simulator.fault_rates import CALM, FAST, Faults
from jaxdist.paramserver.simulator.seeded_time import SeededTime
from jaxdist.paramserver.simulator.simulated_disk import Death, Disk
from jaxdist.paramserver.wire import encoding

RECORD = journal.NormRecord(4.0)


def make(faults=CALM, seed=0):
    time = SeededTime(seed)
    return Disk(time, faults, FAST), time


def play(time):
    while time.step():
        pass


def test_a_log_is_appended_to_and_replaced():
    disk, _ = make()
    for _ in range(2):
        disk.append(RECORD, lambda: None)
    assert disk.records() == [RECORD, RECORD]
    disk.replace(RECORD, lambda: None)
    assert disk.records() == [RECORD]
    assert disk.sync_seconds() == 0.0


def test_a_death_leaves_a_whole_record_or_none():
    """A record that was noted as durable is found again; an incomplete one is removed."""
    seen = set()
    for seed in range(40):
        disk, _ = make(Faults(until=1.0, crash_at_append=1.0), seed)
        noted = []
        with pytest.raises(Death):
            disk.append(RECORD, lambda: noted.append(RECORD))  # noqa: B023
        torn = bool(disk.log) and not noted
        assert disk.records() == noted
        seen.add((torn, bool(noted)))
        with pytest.raises(Death):
            disk.replace(journal.NormRecord(5.0), lambda: noted.append(journal.NormRecord(5.0)))  # noqa: B023
        assert disk.records() == noted[-1:]
    assert seen == {(True, False), (False, True), (False, False)} or seen == {(True, False), (False, True)}


@pytest.mark.parametrize("full", [False, True])
def test_a_file_is_there_before_its_writer_is_told(full):
    disk, time = make(Faults(until=9.0, disk_full=1.0 if full else 0.0, disk_slow=1.0))
    told = []
    disk.write(
        "cut", RECORD, lives=lambda: True, note=lambda: told.append("durable"), done=lambda *what: told.append(what)
    )
    assert disk.files == {}
    play(time)
    data = encoding.to_bytes(RECORD)
    assert told == ([(zlib.crc32(data), "no space left on device")] if full else ["durable", (zlib.crc32(data), "")])
    loaded = []
    disk.load("cut", loaded.append)
    play(time)
    assert loaded == ([None] if full else [RECORD])


def test_the_dead_are_told_nothing():
    kept = set()
    for seed in range(20):
        disk, time = make(seed=seed)
        disk.write("cut", RECORD, lives=lambda: False, note=lambda: None, done=lambda *what: pytest.fail("told"))
        play(time)
        kept.add("cut" in disk.files)
    assert kept == {True, False}
