"""What a process leaves in files: counters, and a line for each step."""

import contextlib
import errno
import json
import os
import time
import types

import pytest

from jaxdist.paramserver.processes import process_world, reports, run_folder
from jaxdist.paramserver.protocol import effects, journal, messages
from jaxdist.paramserver.wire import log_frames
from jaxdist.rundir import ledger

LEASE = messages.Lease(step=2, slice=0, epoch=0, start=10, stop=16)
PUSH = messages.Contributor(0, 1, 1, LEASE)
JOINED = journal.MembershipRecord(messages.Membership(1, (), (), 1, ""), 0, (), None)


def applied(version, staleness):
    return effects.Applied(0, 1, version, 5, 6, (PUSH,), 0, staleness, False)


@pytest.mark.parametrize("primary", [True, False])
def test_updates_are_counted_once_by_the_primary(tmp_path, primary):
    machine = types.SimpleNamespace(primary=primary, counters={"fenced": 2})
    statistics = reports.Statistics(tmp_path / "counters.json", machine)
    for version, staleness in enumerate((0, 0, 3), 1):
        statistics.observe(applied(version, staleness))
    statistics.observe(effects.Exit(3, "max_steps"))
    found = json.loads(statistics.path.read_text())
    assert found["counters"] == {"updates": 3 if primary else 0, "fenced": 2}
    assert found["staleness"] == ({"0": 2, "3": 1} if primary else {})


def test_each_start_of_a_process_has_counters_of_its_own(tmp_path, monkeypatch):
    spec = types.SimpleNamespace(directory=str(tmp_path))
    paths = []
    for number in (11, 12):
        monkeypatch.setattr(reports.os, "getpid", lambda number=number: number)
        paths.append(reports.statistics_of("server/0/a", spec, None).path)
    assert len(set(paths)) == 2
    assert {path.parent for path in paths} == {tmp_path / run_folder.STATISTICS_NAME}


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EFBIG, errno.ESTALE])
def test_counters_that_a_disk_does_not_take_are_left_to_the_next_time(tmp_path, monkeypatch, caplog, number):
    is_full = [True]
    write = process_world.write_report

    def write_report(path, parts):
        if is_full[0]:
            raise OSError(number, os.strerror(number))
        return write(path, parts)

    monkeypatch.setattr(process_world, "write_report", write_report)
    statistics = reports.Statistics(tmp_path / "counters.json", types.SimpleNamespace(primary=True))
    statistics.observe(applied(1, 0))
    is_full[0] = False
    statistics.observe(effects.Exit(3, "max_steps"))
    assert json.loads(statistics.path.read_text())["counters"] == {"updates": 1}
    assert ("was not written" in caplog.text) == (number != errno.ENOSPC), "a full disk is told by the observer"


@pytest.fixture
def open_report(tmp_path):
    """Yield a function that opens a report, closed after the test: a process keeps its report open until it ends."""
    opened = []

    def open_():
        opened.append(reports.ReportFiles(tmp_path, time.time))
        return opened[-1]

    yield open_
    for report in opened:
        report._steps.close()


def rows(directory):
    return [json.loads(line) for line in (directory / run_folder.STEPS_NAME).read_text().splitlines()]


def test_a_step_is_a_line_with_the_means_of_its_metrics(tmp_path, open_report):
    metrics = (messages.Metric("loss", 6.0, 4.0), messages.Metric("none", 0.0, 0.0))
    open_report().observe(effects.Committed(3, 16, metrics))
    (row,) = rows(tmp_path)
    assert (row["step"], row["examples"], row["metrics"]) == (3, 16, {"loss": 1.5})


def test_steps_and_the_names_of_silent_processes_wait_for_room(tmp_path, open_report, monkeypatch):
    """In the order of the steps, each once."""
    report, pauses = open_report(), []
    is_full = lambda: len(pauses) % 3 != 2  # noqa: E731 - full twice, then there is room

    def failing(original):
        def write(*args):
            if is_full():
                raise OSError(28, "No space left on device")
            pauses.append("written")
            return original(*args)

        return write

    monkeypatch.setattr(reports.full_disk.time, "sleep", pauses.append)
    monkeypatch.setattr(reports.files, "append", failing(reports.files.append))
    monkeypatch.setattr(reports, "write_report", failing(reports.write_report))
    report.observe(effects.Committed(3, 16, ()))
    report.observe(effects.GradNorm(3, 0.5))
    report.observe(effects.Replace("server/0/a"))
    assert [row["step"] for row in rows(tmp_path)] == [3, 3]
    assert run_folder.take_silent(tmp_path, "server/0/a")
    assert len(pauses) == 9


def test_the_name_of_a_silent_process_is_a_file(tmp_path, open_report):
    open_report().observe(effects.Replace("server/0/a"))
    assert run_folder.take_silent(tmp_path, "server/0/a")


@pytest.mark.parametrize(
    ("records", "reported", "expected"),
    [
        ([], [], []),
        ([JOINED], [2], [2]),
        ([journal.CommitRecord(3, False, (PUSH, PUSH))], [1, 2], [1, 2, 3]),
        ([journal.CommitRecord(3, False, (PUSH, PUSH))], [1, 2, 3], [1, 2, 3]),
        ([journal.CompleteRecord(PUSH)], [2], [2, 3]),
        ([journal.CommitRecord(3, False, (PUSH,)), journal.NormRecord(1.0)], [2], [2, 3]),
        ([journal.CommitRecord(3, False, (PUSH,)), JOINED], [2], [2]),
    ],
    ids=["nothing", "joined", "commit", "reported", "complete", "norm", "membership"],
)
@pytest.mark.parametrize("empty_step", [0, 3])
def test_a_step_that_was_committed_and_not_reported_is_reported_after_a_restart(
    tmp_path, open_report, records, reported, expected, empty_step
):
    first = open_report()
    for step in reported:
        first.observe(effects.Committed(step, 6, ()))
    scheduler = types.SimpleNamespace(state=types.SimpleNamespace(membership=None, step=3, empty_step=empty_step))
    open_report().catch_up(scheduler, records)
    assert [row["step"] for row in rows(tmp_path)] == expected
    if len(expected) > len(reported):
        assert rows(tmp_path)[-1].get("empty", False) == (empty_step == 3)
        assert rows(tmp_path)[-1]["examples"] == 6 * len(getattr(records[0], "contributors", (PUSH,)))


def test_leases_that_follow_one_another_are_one_range():
    leases = [
        messages.Lease(2, number, 1, start, stop) for number, (start, stop) in enumerate([(8, 10), (10, 10), (10, 13)])
    ]
    assert reports.ranges(leases) == [(1, 8, 13)]
    assert reports.ranges([*leases[:1], *leases[2:]]) == [(1, 8, 13)]
    assert reports.ranges([leases[0], messages.Lease(2, 1, 1, 11, 13)]) == [(1, 8, 10), (1, 11, 13)]
    assert reports.ranges([]) == []


def committed(step):
    """What the scheduler does in a step of two slices, of 16 examples an epoch of 4 steps."""
    epoch, within = divmod(step - 1, 4)
    leases = [
        messages.Lease(step - 1, each, epoch, 4 * within + 2 * each, 4 * within + 2 * each + 2) for each in (0, 1)
    ]
    pushes = tuple(messages.Contributor(each, 1, step, lease) for each, lease in enumerate(leases))
    return [effects.Append(journal.CommitRecord(step, False, pushes)), effects.Committed(step, 4, ())]


ROLLBACK = effects.Append(
    journal.MembershipRecord(messages.Membership(2, (), (), 2, "cut"), 0, (), messages.Trained(3, ()))
)
HISTORY = [each for step in (1, 2, 3, 4, 5) for each in committed(step)]
HISTORY += [ROLLBACK, *(each for step in (4, 5, 6, 7) for each in committed(step))]


@pytest.mark.parametrize("killed", range(len(HISTORY) + 1))
@pytest.mark.parametrize("durable", [0, 1])
def test_the_ledger_has_each_step_once_whenever_the_scheduler_is_killed(tmp_path, killed, durable):
    """`durable`: the log has the record of the next effect, which was not reported any more."""

    @contextlib.contextmanager
    def scheduler(done):
        records, step = [each.record for each in done if isinstance(each, effects.Append)], 0
        for record in records:
            step = record.step if isinstance(record, journal.CommitRecord) else record.trained.step
        report = reports.ReportFiles(tmp_path / "ps", time.time, ledger=True)
        membership = ROLLBACK.record.membership if ROLLBACK in done else None
        state = types.SimpleNamespace(membership=membership, step=step, empty_step=0)
        report.catch_up(types.SimpleNamespace(state=state), records)
        yield report
        report._steps.close()
        report._recorder.close()

    (tmp_path / "ps").mkdir()
    with scheduler([]) as report:
        for effect in HISTORY[:killed]:
            report.observe(effect)
    done = (
        HISTORY[: killed + durable] if isinstance((HISTORY[killed:] or [None])[0], effects.Append) else HISTORY[:killed]
    )
    with scheduler(done) as report:
        # A step that was committed is not committed again.
        for effect in HISTORY[len(done) :]:
            report.observe(effect)
    entries = ledger.read(tmp_path)
    assert ledger.check(entries, num_examples=16) == 1
    assert [entry.step for entry in entries] == [1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize(("step", "restore_term", "is_whole"), [(3, 1, True), (2, 1, False), (2, 2, True)])
def test_steps_that_were_reported_and_are_not_in_the_log_are_noticed(
    tmp_path, open_report, step, restore_term, is_whole
):
    first = open_report()
    first.observe(effects.Append(JOINED))
    for made in (1, 2, 3):
        first.observe(effects.Committed(made, 6, ()))
    membership = messages.Membership(restore_term, (), (), restore_term, "")
    state = types.SimpleNamespace(membership=membership, step=step, empty_step=0)
    with contextlib.nullcontext() if is_whole else pytest.raises(log_frames.DamagedLogError, match="step 3 was made"):
        open_report().catch_up(types.SimpleNamespace(state=state), [])


def test_warnings_and_returns_to_a_saved_cut_are_reported(tmp_path, open_report):
    report = open_report()
    member = messages.Member(0, 1, 0)
    places = [((member,), 0), ((), 2), ((messages.Member(0, 2, 0),), 2)]
    for term, (members, restore_term) in enumerate(places, 1):
        record = journal.MembershipRecord(messages.Membership(term, members, (), restore_term, ""), 0, (), None)
        report.observe(effects.Append(record))
    report.observe(effects.Warn("Shard 0 was lost."))
    report.observe(effects.Fail("There is no saved cut."))  # the crew shows it
    found = [{name: value for name, value in row.items() if name != "time"} for row in rows(tmp_path)]
    assert found == [
        {"step": 0, "workers": {}, "returned": True},
        {"step": 0, "workers": {"0": 2}},
        {"step": 0, "warning": "Shard 0 was lost."},
    ]
