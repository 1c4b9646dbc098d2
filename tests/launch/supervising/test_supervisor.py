"""Whether and how to continue after a failure, without processes."""

import json
import os
import subprocess
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxdist.config.experiment import Recovery
from jaxdist.launch.supervising import supervisor
from jaxdist.launch.supervising.supervisor import Attempt, End, Restart
from jaxdist.rundir import lock

KILLED = 137


def failed(saved_step, **changes):
    return Attempt(**{"num_processes": 4, "exit_status": KILLED, "saved_step": saved_step} | changes)


def test_after_progress_it_goes_on_at_once():
    assert supervisor.decide([failed(7)], Recovery()) == Restart(0.0, 4)
    assert supervisor.decide([failed(7), failed(8)], Recovery()) == Restart(0.0, 4)


def test_without_progress_it_backs_off_and_then_gives_up(monkeypatch):
    monkeypatch.setattr(supervisor, "FIRST_DELAY_SECONDS", 2.0)
    monkeypatch.setattr(supervisor, "LONGEST_DELAY_SECONDS", 7.0)
    settings = Recovery(max_fruitless=5)
    attempts = [failed(7)]
    delays = []
    for _ in range(4):
        attempts.append(failed(7))
        delays.append(supervisor.decide(attempts, settings).delay_seconds)
    assert delays == [2.0, 4.0, 7.0, 7.0]
    end = supervisor.decide([*attempts, failed(7)], settings)
    assert end.exit_status == KILLED
    assert "5 attempts in a row failed" in end.reason
    assert "newest saved step is 7" in end.reason


def test_a_step_of_an_earlier_job_is_no_progress_of_this_one():
    assert supervisor.decide([failed(7)], Recovery(), start_step=7) == Restart(1.0, 4)


@pytest.mark.parametrize(
    "last",
    [
        failed(3, exit_status=0),
        failed(3, exit_status=2),
        failed(3, exit_status=75, asked_to_stop=True),
        failed(3, exit_status=130, asked_to_stop=True),
        failed(3, exit_status=1, end_reason="nonfinite"),
    ],
)
def test_a_job_that_ended_by_its_own_rules_or_on_request_is_over(last):
    assert supervisor.decide([last], Recovery()) == End(last.exit_status)


@pytest.mark.parametrize("end_reason", [None, "hang", "error", "preempted"])
def test_a_crash_and_a_hang_are_tried_again(end_reason):
    assert isinstance(supervisor.decide([failed(3, exit_status=75, end_reason=end_reason)], Recovery()), Restart)


def test_after_two_fruitless_attempts_it_goes_on_with_half_the_processes_if_allowed():
    twice = [failed(3), failed(3), failed(3)]
    assert supervisor.decide(twice, Recovery()).__class__ is Restart
    assert supervisor.decide(twice, Recovery()).num_processes == 4
    settings = Recovery(min_processes=2, max_fruitless=9)
    assert supervisor.decide(twice[:2], settings).num_processes == 4
    assert supervisor.decide(twice, settings).num_processes == 2
    fewer = [*twice, failed(3, num_processes=2)]
    assert supervisor.decide(fewer, settings).num_processes == 2


@given(
    saved=st.lists(st.integers(0, 5), min_size=1, max_size=30).map(lambda steps: sorted(steps)),
    max_fruitless=st.integers(1, 4),
)
def test_attempts_are_bounded_by_the_steps_they_make(saved, max_fruitless):
    remaining = iter([*saved, *[saved[-1]] * max_fruitless])
    made, slept, said = [], [], []

    def attempt(number, processes):
        made.append(number)
        return failed(next(remaining))

    settings = Recovery(max_fruitless=max_fruitless)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(supervisor, "_sleep", lambda seconds, stopped: slept.append(seconds))
        status = supervisor.supervise(attempt, num_processes=4, settings=settings, say=said.append)
    assert status == KILLED
    assert made == list(range(len(made)))
    assert len(made) <= (len(set(saved)) + 1) * max_fruitless
    assert len(slept) == len(made) - 1
    assert f"{max_fruitless} attempts in a row" in said[-1]


def test_a_run_that_had_ended_is_done_whatever_killed_a_process_after_that():
    for reason in ("max_steps", "target_reached", "patience"):
        assert supervisor.decide([failed(3, end_reason=reason)], Recovery()) == End(0)


KILLED_OWNER = """
import os, pathlib, signal, sys
from jaxdist.config.experiment import Recovery
from jaxdist.launch.supervising import supervisor
with supervisor.memory_directory(pathlib.Path(sys.argv[2]), root=pathlib.Path(sys.argv[1])):
    os.kill(os.getpid(), signal.SIGKILL)
"""


def leave_behind(root, run_dir):
    subprocess.run([sys.executable, "-c", KILLED_OWNER, str(root), str(run_dir)], timeout=60, check=False)


def test_memory_of_a_killed_job_is_found_by_its_run_alone_and_stays_for_it(tmp_path):
    root, run_dir, other = tmp_path / "root", tmp_path / "run", tmp_path / "other"
    for path in (root, run_dir, other):
        path.mkdir()
    leave_behind(root, run_dir)
    (left,) = root.iterdir()
    (root / "another").mkdir()
    assert list(supervisor.left_behind(other, root=root)) == []
    assert list(supervisor.left_behind(run_dir, root=root)) == [left]
    with supervisor.memory_directory(run_dir, root=root) as memory:
        assert memory.stat().st_mode & 0o777 == 0o700
        assert list(supervisor.left_behind(run_dir, root=root)) == [left], "its own is in use"
        assert memory.exists()
    run_dir.rmdir()
    assert list(supervisor.left_behind(other, root=root)) == []
    assert [path.name for path in root.iterdir()] == ["another"], "no run can use what is left"


def test_what_another_run_left_in_memory_is_kept_for_a_day_whatever_the_clock_says(tmp_path, monkeypatch):
    root, run_dir = tmp_path / "root", tmp_path / "run"
    root.mkdir()
    run_dir.mkdir()
    leave_behind(root, run_dir)
    (left,) = root.iterdir()
    os.utime(left, (0, 0))  # as if the wall clock had been set since
    since_boot = [time.clock_gettime(time.CLOCK_BOOTTIME)]
    monkeypatch.setattr(time, "clock_gettime", lambda clock: since_boot[0])
    for hours, kept in ((0, True), (23.9, True), (0.2, False)):
        since_boot[0] += hours * 3600.0
        assert list(supervisor.left_behind(tmp_path / "other", root=root)) == []
        assert left.exists() is kept


def test_jobs_that_start_at_the_same_moment_leave_each_other_alone(tmp_path, monkeypatch):
    """At each moment of one job's start, another one starts and cleans up."""
    run_dir, checked = tmp_path / "gone", []

    def intruding(name):
        original = getattr(os, name)

        def call(*args, **kwargs):
            result = original(*args, **kwargs)
            if not checked or checked[-1] != "in":
                checked.append("in")
                list(supervisor.left_behind(tmp_path / "other", root=tmp_path))
                checked.append(name)
            return result

        return call

    for name in ("open", "mkdir", "rename", "symlink", "pwrite", "ftruncate", "close"):
        monkeypatch.setattr(os, name, intruding(name))
    with supervisor.memory_directory(run_dir, root=tmp_path) as memory:
        list(supervisor.left_behind(tmp_path / "other", root=tmp_path))
        assert memory.exists()
    assert {"open", "mkdir", "rename"} <= set(checked)


WORKER = """
import json, os, pathlib, signal, sys
run_dir = pathlib.Path(sys.argv[1])
memory = pathlib.Path(os.environ["JAXDIST_MEMORY"])
count = int((run_dir / "count").read_text()) if (run_dir / "count").exists() else 0
with open(run_dir / "seen", "a") as file:
    place, failed = os.environ["JAXDIST_PROCESS_ID"], "JAXDIST_FAILED_AT" in os.environ
    file.write(json.dumps([place, sys.argv[2:], failed, os.environ["JAXDIST_COORDINATOR"]]) + "\\n")
(run_dir / "run.json").touch()
(run_dir / "count").write_text(str(count + 1))
(memory / "kept").touch()
if count < 2:
    os.kill(os.getpid(), signal.SIGKILL)
assert (memory / "kept").exists()
"""


def test_a_job_is_started_again_until_it_ends_well(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(supervisor, "_changed_at", lambda run_dir: 0)
    count = tmp_path / "count"
    job = supervisor.Job(
        command=[sys.executable, "-c", WORKER, str(tmp_path)],
        run_dir=tmp_path,
        saved_step=lambda memory: int(count.read_text()) if count.exists() else 0,
    )
    assert supervisor.run(job, num_processes=1, settings=Recovery()) == 0
    seen = [json.loads(line) for line in (tmp_path / "seen").read_text().splitlines()]
    assert [each[:3] for each in seen] == [["0", [], False], ["0", ["--resume"], True], ["0", ["--resume"], True]]
    assert len({each[3] for each in seen}) == 3, "each attempt has a coordinator address of its own"
    events = [json.loads(line) for line in (tmp_path / supervisor.EVENTS_NAME).read_text().splitlines()]
    assert [(each["event"], each.get("status")) for each in events] == [
        ("start", None), ("end", KILLED), ("start", None), ("end", KILLED), ("start", None), ("end", 0),
    ]  # fmt: skip
    assert "The job ended with status 137; it continues from step 2." in capfd.readouterr().err
    assert not lock.is_locked(tmp_path)


def test_two_jobs_cannot_share_a_run_directory(tmp_path):
    job = supervisor.Job(command=["true"], run_dir=tmp_path, saved_step=lambda memory: 0)
    with lock.locked(tmp_path, purpose="the first"), pytest.raises(lock.LockedError, match="the first"):
        supervisor.run(job, num_processes=1, settings=Recovery())
