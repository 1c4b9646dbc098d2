import dataclasses
import math

import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxdist.run import hooks
from jaxdist.run.loop import StepInfo
from jaxdist.run.stopwatch import Stopwatch
from jaxdist.spmd.step import NONFINITE_LEAF
from jaxdist.stop import Progress


@dataclasses.dataclass(frozen=True)
class Place:
    position: int = 0
    num_examples: int = 8

    def to_json(self):
        return dataclasses.asdict(self)


class Rows:
    """A writer that keeps what it is given."""

    def __init__(self):
        self.rows = []

    def write(self, step, metrics):
        self.rows.append((step, dict(metrics)))

    def close(self):
        pass


def make_info(step, *, loss=0.0, flag=-1, position=None, progress=None):
    metrics = {"loss": jnp.float32(loss), NONFINITE_LEAF: jnp.int32(flag)}
    progress = progress or Progress(step=step)
    progress.step = step
    return StepInfo(step, f"state {step}", metrics, position or Place(), progress)


@given(num_steps=st.integers(1, 7))
def test_every_calls_at_the_multiples(num_steps):
    called = []
    hook = hooks.every(num_steps, lambda info: called.append(info.step))
    for step in range(1, 30):
        hook(make_info_once(step))
    assert called == [step for step in range(1, 30) if step % num_steps == 0]


def make_info_once(step):
    return StepInfo(step, None, {}, Place(), Progress(step=step))


def test_metrics_are_written_one_step_late_and_the_first_always():
    rows = Rows()
    log = hooks.LogMetrics([rows], every=3, extra=lambda step: {"learning_rate": step / 100})
    progress, lengths = Progress(), []
    for step in range(1, 8):
        log(make_info(step, loss=step, progress=progress))
        lengths.append(len(rows.rows))
    assert lengths == [0, 1, 1, 2, 2, 2, 3]
    assert [step for step, _ in rows.rows] == [1, 3, 6]
    assert rows.rows[1] == (3, {"train/loss": 3.0, "train/learning_rate": 0.03})
    assert progress.metrics == {"train/loss": 6.0, "train/learning_rate": 0.06}


def test_flushing_writes_what_is_pending_once():
    rows = Rows()
    log = hooks.LogMetrics([rows], every=1, extra=lambda step: {})
    log.flush()
    log(make_info(1, loss=5.0))
    log.flush()
    log.flush()
    assert rows.rows == [(1, {"train/loss": 5.0})]


def test_only_the_steps_that_are_logged_are_read_back():
    log = hooks.LogMetrics([Rows()], every=5, extra=lambda step: {})
    for step in (2, 3, 4):
        log(StepInfo(step, None, {"loss": Unreadable()}, Place(), Progress(step=step)))


class Unreadable:
    def addressable_data(self, index):
        raise AssertionError("a step that is not logged was waited for")


def test_fetch_gives_numbers_without_the_loops_own_flag():
    values = hooks.fetch({"loss": jnp.float32(0.5), "count": jnp.int32(3), NONFINITE_LEAF: jnp.int32(-1)})
    assert values == {"loss": 0.5, "count": 3.0}
    assert all(type(value) is float for value in values.values())


@pytest.mark.parametrize(
    ("when", "expected"),
    [
        ({"every_steps": 3}, [3, 6, 9, 12]),
        ({"every_steps": 3, "every_epochs": 2}, [3, 6, 9, 12]),
        ({}, [4, 8, 12]),
        ({"every_epochs": 2}, [8]),
    ],
)
def test_evaluation_is_due_by_steps_or_else_at_the_end_of_epochs(when, expected):
    """Epochs of 4 steps."""
    progress, rows = Progress(), Rows()
    evaluate = hooks.Evaluate(lambda state: {"accuracy": 0.5}, [rows], Stopwatch(), **when)
    for step in range(1, 13):
        progress.epoch = step // 4
        evaluate(make_info(step, position=Place((step - 1) % 4 * 2 + 2), progress=progress))
    assert [step for step, _ in rows.rows] == expected
    assert progress.history == {"eval/accuracy": [0.5] * len(expected)}
    assert progress.last_evaluation == expected[-1]


def test_an_evaluation_is_of_the_state_after_the_step_and_its_time_is_accounted():
    clock, states = [0.0], []

    def evaluate(state):
        states.append(state)
        clock[0] += 2.0
        return {"accuracy": 0.25}

    stopwatch = Stopwatch(clock=lambda: clock[0])
    info = make_info(4, position=Place(8))
    info.progress.epoch = 1
    hooks.Evaluate(evaluate, [], stopwatch)(info)
    assert states == ["state 4"]
    assert stopwatch.seconds()["eval"] == 2.0
    assert info.progress.metrics == {"eval/accuracy": 0.25}


@dataclasses.dataclass
class Saved:
    calls: list = dataclasses.field(default_factory=list)

    def __call__(self, step, state, data_state, metrics):
        self.calls.append((step, state, data_state, dict(metrics)))


def make_save(saved, **options):
    return hooks.Save(saved, Stopwatch(), every_steps=3, **options)


def test_saving_keeps_state_position_and_progress():
    saved = Saved()
    save = make_save(saved)
    for step in range(1, 8):
        save(make_info(step, position=Place(step), progress=Progress(metrics={"m": 1.0})))
    assert [call[0] for call in saved.calls] == [3, 6]
    _, state, data_state, metrics = saved.calls[1]
    assert (state, metrics) == ("state 6", {"m": 1.0})
    assert data_state["position"] == Place(6).to_json()
    assert Progress.from_json(data_state["progress"]) == Progress(step=6, metrics={"m": 1.0})


def test_what_is_pending_is_written_before_and_the_record_after():
    order = []
    saved = Saved()
    save = hooks.Save(
        lambda *args: order.append("save"),
        Stopwatch(),
        every_steps=1,
        before=[lambda: order.append("before")],
        after=[lambda progress: order.append(progress.step)],
    )
    save(make_info(2))
    assert order == ["before", "save", 2]
    assert saved.calls == []


def test_a_step_is_saved_once():
    saved = Saved()
    save = make_save(saved)
    info = make_info(3)
    save(info)
    save.run(info.state, info.position, info.progress)
    assert len(saved.calls) == 1
    info.progress.step = 4
    save.run(info.state, info.position, info.progress)
    assert [call[0] for call in saved.calls] == [3, 4]


def test_a_step_that_was_not_finite_is_not_saved():
    """Its update was not made; a checkpoint of it would resume behind the batch that nobody learnt from."""
    saved = Saved()
    save = make_save(saved)
    save(make_info(3, loss=math.nan, flag=0))
    assert saved.calls == []


def test_a_failed_save_is_raised_in_the_loop():
    def fail(*args):
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        make_save(fail)(make_info(3))


def test_the_display_gets_the_latest_metrics():
    shown = []

    class Display:
        def update(self, step, metrics):
            shown.append((step, metrics))

    hook = hooks.show_progress(Display())
    hook(make_info(5, progress=Progress(metrics={"train/loss": 2.0})))
    assert shown == [(5, {"train/loss": 2.0})]
