"""The crew of one machine: which processes are started again, and which GPUs they use."""

import os
import signal
import subprocess
import sys

import pytest

from jaxdist.errors import RunFailedError
from jaxdist.paramserver.processes import crew, run_folder


class Child:
    pid = 0  # of no process

    def __init__(self, status):
        self.status = status

    def poll(self):
        return self.status

    def kill(self):
        self.status = -9

    def wait(self):
        return self.status


def crew_of(tmp_path, monkeypatch, **children):
    made = crew.LocalCrew([], tmp_path, "")
    made._children = {name.replace("_", "/"): Child(status) for name, status in children.items()}
    made._boots_before = dict.fromkeys(made._children, 0)
    made._stopped_for = dict.fromkeys(made._children, 0.0)
    started = []
    monkeypatch.setattr(made, "_start", started.append)
    return made, started


def test_a_process_that_died_is_started_again(tmp_path, monkeypatch):
    made, started = crew_of(tmp_path, monkeypatch, worker_0=-9, worker_1=None)
    boot = run_folder.next_boot(tmp_path, "worker/0")
    died = made.look_after()
    assert started == ["worker/0"]
    assert made.restarts == 1
    assert list(died) == ["worker/0"]
    assert died["worker/0"] >= boot


def test_a_scheduler_that_ended_the_run_is_not_started_again(tmp_path, monkeypatch):
    made, started = crew_of(tmp_path, monkeypatch, scheduler=0)
    with pytest.raises(RunFailedError):
        made.look_after()
    assert started == []


def test_a_process_that_dies_again_and_again_ends_the_run(tmp_path, monkeypatch):
    made, _ = crew_of(tmp_path, monkeypatch, worker_0=1)
    for _ in range(crew.MOST_DEATHS):
        made.look_after()
    with pytest.raises(RunFailedError, match="worker/0 died"):
        made.look_after()


def test_a_process_that_left_early_is_started_again(tmp_path, monkeypatch):
    made, started = crew_of(tmp_path, monkeypatch, worker_0=0)
    made.look_after()
    assert started == [], "it may have been told of the end before the observer knew of it"
    monkeypatch.setattr(crew, "_EARLY_SECONDS", -1.0)
    made.look_after()
    assert started == ["worker/0"]


def test_the_end_does_not_wait_for_a_process_that_only_starts(tmp_path, monkeypatch):
    made, _ = crew_of(tmp_path, monkeypatch, scheduler=0, worker_0=None, worker_1=None)
    run_folder.next_boot(tmp_path, "worker/0")
    joined, starting = made._children["worker/0"], made._children["worker/1"]
    monkeypatch.setattr(made, "all_ended", lambda: pytest.fail("it waits") if starting.status is None else True)
    monkeypatch.setattr(crew, "GRACE_SECONDS", 60.0)
    made.close(orderly=True)
    assert starting.status == joined.status == -9


def test_a_silent_process_is_ended_and_started_again_once(tmp_path, monkeypatch):
    made, started = crew_of(tmp_path, monkeypatch, server_0_a=None, worker_0=None)
    path = run_folder.silent_path(tmp_path, "server/0/a")
    path.parent.mkdir()
    path.touch()
    made.look_after()
    assert started == [], "it has no boot number yet, so the one before it is meant"
    assert not path.exists()
    run_folder.next_boot(tmp_path, "server/0/a")
    path.touch()
    made.look_after()
    assert started == ["server/0/a"]
    assert not path.exists()


def test_a_process_that_is_stopped_for_long_is_started_again(tmp_path, monkeypatch):
    """Whatever its role: the scheduler, whose silence no other process reports, too."""
    made, started = crew_of(tmp_path, monkeypatch, scheduler=None)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    made._children["scheduler"] = child
    child.send_signal(signal.SIGSTOP)
    os.waitpid(child.pid, os.WUNTRACED)
    made.look_after()
    assert started == [], "this process may have been stopped, too"
    made._stopped_for["scheduler"] = crew.STOPPED_SECONDS
    made.look_after()
    assert started == ["scheduler"]
    assert child.wait() == -signal.SIGKILL


@pytest.mark.parametrize(
    ("visible", "devices", "found"),
    [
        ("0,1,2,3", 1, ["0", "1"]),
        ("0,1,2,3", 2, ["0,1", "2,3"]),
        ("5,7", 1, ["5", "7"]),
        ("5", 1, ["5", "5"]),
        ("", 1, [None, None]),
    ],
)
def test_each_worker_of_a_machine_has_its_own_gpus(tmp_path, monkeypatch, visible, devices, found):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    spec = run_folder.Spec("attempt", "x.py", [], {}, {}, str(tmp_path), "", devices, "elementwise")
    spec.write(tmp_path / run_folder.SPEC_NAME)
    made = crew.LocalCrew(["scheduler", "worker/1", "server/0/a", "worker/4"], tmp_path, "secret")
    assert [made._accelerators(name).get("CUDA_VISIBLE_DEVICES") for name in ("worker/1", "worker/4")] == found
    assert made._accelerators("server/0/a") == {}


def test_gpus_are_counted_where_the_user_names_none(tmp_path):
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    assert crew.list_gpus({}, tmp_path) == ["0", "1"]


def test_the_end_by_an_error_is_told_without_the_warnings_before_it(tmp_path):
    """The observer has told these."""
    path = crew.log_path(tmp_path, "scheduler")
    path.parent.mkdir()
    path.write_text("scheduler: Server server/0/a is silent.\nscheduler: Shard 0 was lost.\n")
    assert str(crew.end_by_scheduler(tmp_path)) == "The scheduler ended the run.\nscheduler: Shard 0 was lost."
