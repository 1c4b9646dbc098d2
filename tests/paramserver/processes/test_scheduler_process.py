"""The scheduler's process begins with its log, or with the snapshot that a run resumes from."""

import dataclasses
import json

import pytest
import stages

from jaxdist import errors
from jaxdist.paramserver.processes import process_world, reports, run_folder, scheduler_process
from jaxdist.paramserver.protocol import journal, messages
from jaxdist.paramserver.wire import encoding, log_frames

RESUME = journal.SavedCut("0000000004-start-1", 4, 3, messages.Trained(4, ()), ())


@pytest.fixture(autouse=True)
def close_files(monkeypatch):
    """Close after the test what a process keeps open until it ends."""
    opened = []

    class Log(process_world.Log):
        def __init__(self, path, *, outlives_machine):
            super().__init__(path, outlives_machine=outlives_machine)
            opened.append(self._file)

    class Report(reports.ReportFiles):
        def __init__(self, directory, clock, *, ledger):
            super().__init__(directory, clock, ledger=ledger)
            opened.append(self._steps)

    monkeypatch.setattr(scheduler_process, "Log", Log)
    monkeypatch.setattr(scheduler_process, "ReportFiles", Report)
    yield
    for file in opened:
        file.close()


def make(tmp_path, *, resume="", records=()):
    frames = log_frames.LogFrames()
    return make_from(tmp_path, b"".join(frames.frame(encoding.to_bytes(record)) for record in records), resume=resume)


def make_from(tmp_path, log, *, resume=""):
    """Return the state of a scheduler that finds these bytes as its log."""
    settings = dataclasses.asdict(stages.settings(durability="snapshot", snapshot_every=2))
    spec = run_folder.Spec("a", "x.py", [], settings, {}, str(tmp_path), resume, 1, "elementwise")
    spec.write(tmp_path / run_folder.SPEC_NAME)
    if resume:
        process_world.write_file(tmp_path / resume / "manifest", encoding.encode(RESUME))
    (tmp_path / run_folder.LOG_NAME).write_bytes(log)
    made, _, _ = scheduler_process.make_scheduler("scheduler", run_folder.Spec.read(tmp_path / run_folder.SPEC_NAME))
    return made.machine.machine.state


def test_a_fresh_run_begins_at_step_0(tmp_path):
    state = make(tmp_path)
    assert (state.step, state.incarnations, state.saved_cut[0]) == (0, 0, "")
    assert state.settings == stages.settings(durability="snapshot", snapshot_every=2)


def test_a_run_begins_at_the_snapshot_it_resumes_from(tmp_path):
    state = make(tmp_path, resume=RESUME.name)
    assert (state.step, state.incarnations, state.saved_cut) == (4, 3, (RESUME.name, RESUME.trained))


def test_after_a_restart_the_log_counts_and_the_step_it_ends_with_is_reported(tmp_path):
    push = messages.Contributor(0, 1, 1, messages.Lease(4, 0, 1, 0, 6))
    state = make(tmp_path, resume=RESUME.name, records=[STARTED, journal.CommitRecord(5, False, (push,))])
    assert state.step == 5
    (line,) = (tmp_path / run_folder.STEPS_NAME).read_text().splitlines()
    assert (json.loads(line)["step"], json.loads(line)["examples"]) == (5, 6)


STARTED = journal.MembershipRecord(messages.Membership(1, (), (), 1, RESUME.name), 3, (), RESUME.trained)
COMMITS = [
    journal.CommitRecord(step, False, (messages.Contributor(0, 1, step, messages.Lease(step - 1, 0, 1, 0, 6)),))
    for step in (5, 6)
]


def test_a_log_that_is_damaged_anywhere_is_named_and_no_other_state_is_taken_for_it(tmp_path):
    """Each byte is changed; each end is cut off: only a record that was not written to its end may be missing."""
    make(tmp_path, resume=RESUME.name, records=[STARTED, *COMMITS])
    log = (tmp_path / run_folder.LOG_NAME).read_bytes()
    for at in range(len(log)):
        damaged = bytearray(log)
        damaged[at] ^= 0x41
        for found in (bytes(damaged), log[:at]):
            # What is missing of the log is noticed by the steps that were reported.
            with pytest.raises(errors.UserError, match=r"scheduler\.log, is damaged\. .*--resume continues"):
                make_from(tmp_path, found, resume=RESUME.name)
    assert make_from(tmp_path, log, resume=RESUME.name).step == 6


def test_after_a_rollback_the_steps_before_it_do_not_count(tmp_path):
    make(tmp_path, resume=RESUME.name, records=[STARTED, *COMMITS])
    back = journal.MembershipRecord(messages.Membership(2, (), (), 2, RESUME.name), 3, (), RESUME.trained)
    assert make(tmp_path, resume=RESUME.name, records=[STARTED, *COMMITS, back]).step == 4
    assert make(tmp_path, resume=RESUME.name, records=[STARTED, *COMMITS, back, COMMITS[0]]).step == 5
    with pytest.raises(errors.UserError, match=r"It ends after step 4, and step 5 was made"):
        make(tmp_path, resume=RESUME.name, records=[STARTED, *COMMITS, back])
