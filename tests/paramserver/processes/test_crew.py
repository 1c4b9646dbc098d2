"""The crew of one machine: who is started again, and when."""

import pytest

from jaxdist.errors import RunFailedError
from jaxdist.paramserver.processes import crew


class Child:
    def __init__(self, status):
        self.status = status

    def poll(self):
        return self.status


def crew_of(tmp_path, monkeypatch, **children):
    made = crew.LocalCrew([], tmp_path, "")
    made._children = {name.replace("_", "/"): Child(status) for name, status in children.items()}
    started = []
    monkeypatch.setattr(made, "_start", started.append)
    return made, started


def test_a_process_that_died_is_started_again(tmp_path, monkeypatch):
    made, started = crew_of(tmp_path, monkeypatch, worker_0=-9, worker_1=None)
    made.look_after()
    assert started == ["worker/0"]
    assert made.restarts == 1


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
