"""A parameter-server run under fire, without training: whom a strike is for, and when the run has recovered."""

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import types

import pytest

from jaxdist.launch.supervising import stopped
from jaxdist.launch.supervising.chaos import strikes
from jaxdist.paramserver.processes import run_folder
from jaxdist.paramserver.run import served_job

NAMES = ["scheduler", "server/0/a", "worker/0"]


class Run:
    """A run directory whose processes sleep."""

    def __init__(self, run_dir):
        self.folder = run_dir / run_folder.DIRECTORY_NAME
        self.folder.mkdir()
        self.running = {}
        self.job = served_job.ServedJob(run_dir, NAMES)

    def start(self, name):
        sleep = [sys.executable, "-c", "import time; time.sleep(60)", name, str(self.folder / run_folder.SPEC_NAME)]
        process = self.running[name] = subprocess.Popen(sleep)
        while name not in pathlib.Path(f"/proc/{process.pid}/cmdline").read_text():  # not yet in exec
            pass

    def write(self, *rows, end="\n"):
        with (self.folder / run_folder.STEPS_NAME).open("a") as file:
            file.write("\n".join(map(json.dumps, rows)) + end)


@pytest.fixture
def run(tmp_path):
    made = Run(tmp_path)
    for name in NAMES[1:]:
        made.start(name)
    yield made
    for process in made.running.values():
        process.kill()
        process.wait()


def test_a_strike_is_due_at_its_step_and_for_a_process_that_runs(run):
    kill = strikes.Strike("kill", 0, 5)
    assert run.job.target(kill) is None
    run.write({"step": 4}, {"step": 5}, end="")
    assert run.job.target(kill) is None  # the line is not whole
    run.write(end="\n")
    assert run.job.target(kill).process_id == run.running["server/0/a"].pid, "the scheduler does not run"
    assert run.job.target(strikes.Strike("kill", 2, 5)).process_id == run.running["worker/0"].pid


def test_a_run_has_recovered_with_a_step_that_began_after_the_strike(run):
    run.write({"step": 5})
    course = run.job.target(strikes.Strike("kill", 2, 5)).follow()
    assert next(course) is None
    run.write({"step": 6})
    assert next(course) is None
    run.write({"step": 3}, {"step": 6})  # shards that returned to a cut make steps again
    assert next(course) is None
    run.write({"step": 7})
    with contextlib.suppress(StopIteration):
        hit = next(course) or next(course)
    assert (hit.struck, hit.stages) == ("worker/0", {})
    assert hit.seconds > 0


def test_a_process_that_was_stopped_continues_after_a_while(run, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(served_job, "time", types.SimpleNamespace(monotonic=lambda: clock[0]))
    run.write({"step": 5})
    target = run.job.target(strike := strikes.Strike("stop", 2, 5))
    strikes.deliver(strike, target.process_id)
    os.waitpid(target.process_id, os.WUNTRACED)
    course = target.follow()
    assert next(course) is None
    run.write({"step": 7})
    clock[0] = 1.0
    assert next(course) is None
    assert stopped.is_stopped(target.process_id)
    clock[0] = served_job.HOLD_SECONDS
    assert next(course) is None
    while stopped.is_stopped(target.process_id):
        pass
    assert next(course).seconds == 1.0
    run.running["worker/0"].send_signal(signal.SIGKILL)
    served_job._release(strike, 2**22 + 1)  # it is gone


def test_workers_that_joined_and_left_are_counted(run):
    assert not run.job.has_size(2)
    run.write({"step": 5, "workers": {"0": 1, "2": 4}})
    assert run.job.has_size(2)


def test_a_run_is_held_until_those_who_join_are_about_to(run):
    run.start("scheduler")
    scheduler = run.running["scheduler"].pid
    holding = run.job.hold(1)
    assert not next(holding), "it has only started"
    os.waitpid(scheduler, os.WUNTRACED)
    assert stopped.is_stopped(scheduler)
    run_folder.next_boot(run.folder, "worker/0")
    assert next(holding)
    assert not next(run.job.hold(2))
    holding.close()
    while stopped.is_stopped(scheduler):
        pass


def test_an_early_strike_is_due_at_its_step_at_the_latest(run):
    early = strikes.Strike("kill", 2, 5, early_seconds=600.0)
    run.write({"step": 4})
    assert run.job.target(early) is None
    run.write({"step": 5})
    assert run.job.target(early) is not None
