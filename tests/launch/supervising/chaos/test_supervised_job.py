"""A supervised job under fire, without processes: whom a strike is for, and the stages of the recovery from it."""

import signal

import pytest

from jaxdist.launch.supervising import board, restart_events
from jaxdist.launch.supervising.chaos import strikes, supervised_job


def attempt(number, *, at=0.0, ids=(11, 12), memory="/memory"):
    return {"event": "start", "attempt": number, "memory": str(memory), "monotonic": at, "process_ids": list(ids)}


@pytest.fixture
def seen(monkeypatch):
    """What the job shows: its events, the reports of its processes, the verdict."""
    found = {"events": [], "reports": [None, None], "verdict": None, "now": 10.0, "sent": []}
    monkeypatch.setattr(restart_events, "read_events", lambda run_dir: found["events"])
    monkeypatch.setattr(board, "read", lambda memory, number: found["reports"][number])
    monkeypatch.setattr(board, "published", lambda memory: found["verdict"])
    monkeypatch.setattr(supervised_job.time, "monotonic", lambda: found["now"])
    monkeypatch.setattr(supervised_job.os, "kill", lambda *args: found["sent"].append(args))
    return found


class Report:
    def __init__(self, step, phase="compute"):
        self.step, self.phase = step, phase


def test_a_strike_is_due_at_the_step_of_its_process_or_at_its_time(seen, tmp_path):
    job = supervised_job.SupervisedJob(tmp_path)
    at_step, early = strikes.Strike("kill", 3, 5), strikes.Strike("kill", 0, 5, early_seconds=2.0)
    assert job.target(at_step) is None
    seen["events"] = [attempt(0, at=9.0)]
    assert job.target(at_step) is None
    assert job.target(early) is None
    seen["reports"], seen["now"] = [Report(9), Report(4)], 11.0
    assert job.target(at_step) is None, "process 3 of two is process 1"
    assert job.target(early).process_id == 11
    seen["reports"][1] = Report(5)
    assert job.target(at_step).process_id == 12
    assert job.target(strikes.Strike("kill", 0, 5, early_seconds=600.0)) is not None, "a short job ends before"


def test_a_job_has_recovered_when_a_later_attempt_makes_a_new_step(seen, tmp_path):
    job = supervised_job.SupervisedJob(tmp_path)
    seen.update(events=[attempt(0)], reports=[Report(7), Report(7)])
    course = job.target(strike := strikes.Strike("stop", 1, 5)).follow()
    assert next(course) is None
    seen.update(now=11.0, verdict={"culprits": [1]})
    assert next(course) is None
    seen.update(events=[attempt(0), {"event": "end"}], verdict=None)
    assert next(course) is None
    seen["events"] += [attempt(1, at=12.0)]
    seen.update(now=13.0, reports=[None, Report(0, "restart")])
    assert next(course) is None
    for now, reports in (
        (14.0, [Report(0, "restart"), Report(0, "restart")]),
        (16.0, [Report(0, "compile"), Report(0, "compile")]),
    ):
        seen.update(now=now, reports=reports)
        assert next(course) is None
    seen.update(now=17.0, reports=[Report(8), Report(7)])
    hit = next(found for found in course if found)
    assert hit.stages == {"detect": 2.0, "restart": 2.0, "restore": 2.0, "compile": 1.0}
    assert (hit.strike, hit.seconds, hit.verdict, hit.named) == (strike, 7.0, ((1,), 1.0), True)


def both(number):
    return [(11, number), (12, number)]


@pytest.mark.parametrize(("hang_seconds", "pause"), [(300.0, supervised_job.PAUSE_SECONDS), (2.0, 0.5)])
def test_a_job_that_is_held_makes_a_step_now_and_then_until_it_is_asked_to_end(seen, tmp_path, hang_seconds, pause):
    job = supervised_job.SupervisedJob(tmp_path, hang_seconds=hang_seconds)
    seen.update(events=[attempt(0, memory=tmp_path)], reports=[Report(7), Report(7)])
    holding = job.hold(4)
    assert not next(holding)
    assert seen["sent"] == both(signal.SIGSTOP)
    seen["now"] += pause
    assert not next(holding)
    assert seen["sent"] == both(signal.SIGSTOP) + both(signal.SIGCONT)
    seen["now"] += 60.0
    assert not next(holding), "it may compile for long"
    seen["reports"][0] = Report(8)
    assert not next(holding)
    assert seen["sent"][4:] == both(signal.SIGSTOP)
    (tmp_path / restart_events.CHANGE_NAME).touch()
    assert next(holding)
    assert seen["sent"][6:] == both(signal.SIGCONT)
    assert next(holding)


def test_a_job_that_is_let_go_or_begins_again_is_not_left_stopped(seen, tmp_path):
    job = supervised_job.SupervisedJob(tmp_path)
    seen.update(events=[attempt(0, memory=tmp_path)], reports=[Report(7), Report(7)])
    holding = job.hold(4)
    next(holding)
    holding.close()
    assert seen["sent"] == both(signal.SIGSTOP) + both(signal.SIGCONT)
    holding, seen["events"] = job.hold(4), []
    assert not next(holding), "between two attempts"
    seen["events"] = [attempt(1, ids=(1, 2, 3, 4), memory=tmp_path)]
    assert next(holding)


def test_a_change_is_made_when_a_step_is_made_on_the_new_number(seen, tmp_path):
    job = supervised_job.SupervisedJob(tmp_path)
    seen["events"] = [{**attempt(1, ids=(1, 2, 3, 4)), "cause": "join", "reached": 9}]
    assert not job.has_size(4)
    seen["events"].append({"event": "recovered", "seconds": 0.5})
    assert job.has_size(4)
    assert not job.has_size(2)
