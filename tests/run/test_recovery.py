"""How often snapshots are taken; deadlines and pauses, measured by a clock that is never set."""

import itertools
import time
import types

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxdist.config.experiment import Recovery
from jaxdist.launch.supervising import restart_events, supervisor
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
    events = restart_events.Events(tmp_path)
    events.note("end")
    assert recovery.seconds_since_failure({supervisor.FAILED_AT: str(events.failed_at)}) < 60.0


@given(
    cost=st.floats(0, 100),
    step_seconds=st.floats(1e-4, 10),
    known_after=st.integers(1, 20),
    share=st.sampled_from([0.01, 0.02, 0.5]),
    start=st.integers(0, 10_000),
)
def test_snapshots_cost_no_more_than_their_share_and_no_run_goes_without(cost, step_seconds, known_after, share, start):
    taken, now = [], start

    def take(info):
        taken.append(info.step)

    paced = recovery.Paced(
        take,
        cost_seconds=lambda: cost,
        step_seconds=lambda: step_seconds if now - start >= known_after else None,
        agreed=lambda number: number,
        share=share,
    )
    for now in range(start + 1, start + 3001):
        paced(types.SimpleNamespace(step=now))
    assert taken[:known_after] == list(range(start + 1, start + known_after + 1))
    gaps = {after - before for before, after in itertools.pairwise(taken[known_after - 1 :])}
    assert len(gaps) == 1
    gap = gaps.pop()
    assert gap <= recovery.MOST_STEPS
    assert cost <= share * gap * step_seconds * (1 + 1e-9) or gap == recovery.MOST_STEPS
    assert gap == 1 or cost > share * (gap - 1) * step_seconds * (1 - 1e-9)
