"""Attempts follow each other until the job is over."""

import json
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxdist.config.experiment import Recovery
from jaxdist.launch.supervising import restart_events, supervisor
from jaxdist.launch.supervising.restart_policy import Attempt
from jaxdist.rundir import lock

KILLED = 137


def killed(saved_step):
    return Attempt(num_processes=4, exit_status=KILLED, saved_step=saved_step)


@given(
    saved=st.lists(st.integers(0, 5), min_size=1, max_size=30).map(lambda steps: sorted(steps)),
    max_fruitless=st.integers(1, 4),
)
def test_attempts_are_bounded_by_the_steps_they_make(saved, max_fruitless):
    remaining = iter([*saved, *[saved[-1]] * max_fruitless])
    made, slept, said = [], [], []

    def attempt(number, processes):
        made.append(number)
        return killed(next(remaining))

    settings = Recovery(max_fruitless=max_fruitless)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(supervisor, "_sleep", lambda seconds, stopped: slept.append(seconds))
        status = supervisor.supervise(attempt, num_processes=4, settings=settings, say=said.append)
    assert status == KILLED
    assert made == list(range(len(made)))
    assert len(made) <= (len(set(saved)) + 1) * max_fruitless
    assert len(slept) == len(made) - 1
    assert f"{max_fruitless} attempts in a row" in said[-1]


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
    events = [json.loads(line) for line in (tmp_path / restart_events.EVENTS_NAME).read_text().splitlines()]
    assert [(each["event"], each.get("status")) for each in events] == [
        ("start", None), ("end", KILLED), ("start", None), ("end", KILLED), ("start", None), ("end", 0),
    ]  # fmt: skip
    assert "The job ended with status 137; it continues from step 2." in capfd.readouterr().err
    assert not lock.is_locked(tmp_path)


def test_two_jobs_cannot_share_a_run_directory(tmp_path):
    job = supervisor.Job(command=["true"], run_dir=tmp_path, saved_step=lambda memory: 0)
    with lock.locked(tmp_path, purpose="the first"), pytest.raises(lock.LockedError, match="the first"):
        supervisor.run(job, num_processes=1, settings=Recovery())
