"""How often snapshots are taken; deadlines and pauses, measured by a clock that is never set."""

import contextlib
import dataclasses
import itertools
import time
import types

import jax
import numpy as np
import pytest
import tiny_experiment
from hypothesis import given
from hypothesis import strategies as st
from small_problem import counted_compiles

from jaxdist.config.experiment import Recovery
from jaxdist.launch.supervising import board, joined, restart_events, supervisor
from jaxdist.launch.supervising.standby import reserve
from jaxdist.run import components, recovery


@pytest.mark.parametrize("jump", [-1e9, 1e9])
def test_a_wall_clock_that_is_set_neither_ends_a_job_nor_lets_it_run_on(monkeypatch, jump):
    now = time.time() + jump
    is_over = recovery.deadline(Recovery(deadline_seconds=3600.0), {})
    over = {supervisor.DEADLINE: str(time.monotonic() - 1.0)}
    monkeypatch.setattr(time, "time", lambda: now)
    assert not is_over()
    assert recovery.deadline(Recovery(deadline_seconds=3600.0), over)()
    assert 5.0 <= recovery.seconds_since_failure({supervisor.FAILED_AT: str(time.monotonic() - 5.0)}) < 3600.0


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


@pytest.mark.parametrize(
    ("on_disk", "in_memory", "found"),
    [
        (None, None, None),
        (3, None, ("disk", None)),
        (None, 2, ("memory", 2)),
        (3, 2, ("disk", None)),
        (3, 3, ("memory", 3)),
        (3, 4, ("memory", 4)),
    ],
)
def test_the_newest_state_is_restored_and_of_two_of_one_step_that_in_memory(on_disk, in_memory, found):
    def saved(where, newest):
        return types.SimpleNamespace(latest_step=lambda: newest, restore=lambda template, step=None: (where, step))

    assert recovery.restore_newest(None, saved("disk", on_disk), saved("memory", in_memory)) == found


def test_a_change_of_the_processes_is_asked_for_by_a_file(tmp_path, monkeypatch):
    assert not recovery.change_due({})()
    environment = {supervisor.MEMORY: str(tmp_path)}
    due = recovery.change_due(environment)
    assert not due()
    still = restart_events.Standstill(tmp_path)
    still.ask()
    assert due()
    monkeypatch.setenv(supervisor.MEMORY, str(tmp_path))
    before = time.monotonic()
    recovery.note_end_for_change()
    ended = time.monotonic()
    still.note_end(1)
    assert before <= float(still.environment()[restart_events.LOST_SINCE]) <= ended
    still.withdraw()
    assert not due()


def test_the_first_new_step_tells_what_a_standstill_cost(tmp_path):
    assert recovery.tell_recovery(tmp_path, {}) is None
    since = {restart_events.LOST_SINCE: str(time.monotonic() - 5.0), restart_events.REACHED: "7"}
    tell = recovery.tell_recovery(tmp_path, since)
    for step in (6, 7, 8, 9):
        tell(types.SimpleNamespace(step=step))
    (event,) = restart_events.read_events(tmp_path)
    assert (event["event"], event["step"]) == ("recovered", 8)
    assert 5.0 <= event["seconds"] < 3600.0


def test_a_standstill_lasts_until_new_steps_are_made(tmp_path):
    still = restart_events.Standstill(tmp_path)
    assert still.environment() == {}
    for step in (3, 3, 2, 4):  # the second and third attempt made no new step
        writer = board.ReportWriter(tmp_path, 0)
        writer.write(step, "compute")
        writer.close()
        before = still.environment().get(restart_events.LOST_SINCE)
        still.note_end(1)
        assert (still.environment()[restart_events.LOST_SINCE] == before) == (before is not None and step < 4)
    assert still.reached == 4


def test_process_0_names_its_modules_once(tmp_path, monkeypatch):
    assert recovery.tell_modules() is None
    monkeypatch.setenv(supervisor.MEMORY, str(tmp_path))
    tell = recovery.tell_modules()
    for step in range(2):
        tell(types.SimpleNamespace(step=step))
    assert not (tmp_path / joined.MODULES_NAME).exists()
    tell(types.SimpleNamespace(step=2))
    assert {"jax", "jaxdist.run.recovery"} <= set((tmp_path / joined.MODULES_NAME).read_text().split())
    assert recovery.tell_modules() is None


def test_a_job_that_made_steps_is_not_checked_again():
    assert not recovery.has_made_steps({})
    assert not recovery.has_made_steps({restart_events.REACHED: "0"})
    assert recovery.has_made_steps({restart_events.REACHED: "3"})


@pytest.mark.parametrize(("reached", "made"), [(None, False), ("0", False), ("1", True), ("7", True)])
def test_a_job_has_made_steps_once_its_supervisor_says_so(reached, made):
    environment = {} if reached is None else {restart_events.REACHED: reached}
    assert recovery.has_made_steps(environment) == made


@pytest.mark.parametrize("reduction", ["mean", "canonical"])
def test_after_a_rehearsal_steps_and_evaluations_compile_nothing(reduction):
    experiment = dataclasses.replace(tiny_experiment.get_config(), reduction=reduction)
    parts = components.put_together(experiment, devices=jax.devices()[:2])
    state = parts.create_state()
    with contextlib.closing(parts.batches()) as batches:
        batch, _ = next(batches)
    recovery.rehearse(parts)
    with counted_compiles() as compiles:
        state, _ = parts.step(state, batch)
        assert parts.evaluate(state)["loss"] > 0
    assert not compiles


@pytest.mark.parametrize("stages", [0, 1, 3])
def test_a_rehearsal_ends_when_the_job_waits_for_its_processes(stages):
    done: list[str] = []

    def note(name, result=None):
        return lambda *_: (done.append(name), result)[1]

    parts = types.SimpleNamespace(
        abstract_state={},
        batches=lambda: (item for item in [(None, None)]),
        step=note("step", ({}, {})),
        evaluate_one_batch=note("evaluation"),
        learning_rate=note("rate"),
    )
    recovery.rehearse(parts, lambda: len(done) >= stages)
    assert done == ["step", "step", "evaluation", "rate"][:stages]


def test_a_reserve_is_asked_for_with_the_first_new_step_after_a_failure(tmp_path, monkeypatch):
    monkeypatch.setenv(supervisor.MEMORY, str(tmp_path))
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()[:1]), ("data",))
    wanted = tmp_path / reserve.WANTED_NAME
    for reached, steps, expected in [(None, (8, 9, 10), 10), ("9", (8, 9, 10, 11), 10)]:
        wanted.unlink(missing_ok=True)
        if reached:
            monkeypatch.setenv(restart_events.REACHED, reached)
        ask = recovery.ask_for_reserve(Recovery(), mesh)
        for step in steps:
            assert wanted.exists() == (step > expected)
            ask(types.SimpleNamespace(step=step))
        assert wanted.exists()
