"""The scheduler's process begins with its log, or with the snapshot that a run resumes from."""

import dataclasses
import json

import pytest
import stages

from jaxdist.paramserver.processes import process_world, reports, run_folder, scheduler_process
from jaxdist.paramserver.protocol import journal, messages
from jaxdist.paramserver.wire import encoding

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
        def __init__(self, directory, *, ledger):
            super().__init__(directory, ledger=ledger)
            opened.append(self._steps)

    monkeypatch.setattr(scheduler_process, "Log", Log)
    monkeypatch.setattr(scheduler_process, "ReportFiles", Report)
    yield
    for file in opened:
        file.close()


def make(tmp_path, *, resume="", records=()):
    settings = dataclasses.asdict(stages.settings(durability="snapshot", snapshot_every=2))
    spec = run_folder.Spec("a", "x.py", [], settings, {}, str(tmp_path), resume, 1, "elementwise")
    spec.write(tmp_path / run_folder.SPEC_NAME)
    if resume:
        process_world.write_file(tmp_path / resume / "manifest", encoding.encode(RESUME))
    log = b"".join(encoding.frame(encoding.to_bytes(record)) for record in records)
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
    started = journal.MembershipRecord(messages.Membership(1, (), (), 1, RESUME.name), 3, (), RESUME.trained)
    state = make(tmp_path, resume=RESUME.name, records=[started, journal.CommitRecord(5, False, (push,))])
    assert state.step == 5
    (line,) = (tmp_path / run_folder.STEPS_NAME).read_text().splitlines()
    assert (json.loads(line)["step"], json.loads(line)["examples"]) == (5, 6)
