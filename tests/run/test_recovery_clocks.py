"""Deadlines and pauses are measured by a clock that is never set."""

import time

import pytest

from jaxdist.config.experiment import Recovery
from jaxdist.launch.supervising import supervisor
from jaxdist.run import recovery


@pytest.mark.parametrize("jump", [-1e9, 1e9])
def test_a_wall_clock_that_is_set_neither_ends_a_job_nor_lets_it_run_on(monkeypatch, jump):
    now = time.time() + jump
    is_over = recovery.deadline(Recovery(deadline_seconds=3600.0), {})
    over = {supervisor.DEADLINE: str(time.monotonic() - 1.0)}
    monkeypatch.setattr(time, "time", lambda: now)
    assert not is_over()
    assert recovery.deadline(Recovery(deadline_seconds=3600.0), over)()
    assert recovery.seconds_since_failure({supervisor.FAILED_AT: str(time.monotonic() - 5.0)}) == pytest.approx(
        5, abs=2
    )


def test_the_supervisor_and_its_processes_use_one_clock(tmp_path):
    events = supervisor.Events(tmp_path)
    events.note("end")
    assert recovery.seconds_since_failure({supervisor.FAILED_AT: str(events.failed_at)}) < 60.0
