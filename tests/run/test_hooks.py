import dataclasses
import math
import types

import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxdist.run import hooks
from jaxdist.run.loop import StepInfo
from jaxdist.spmd.state import TrainState
from jaxdist.spmd.step import NONFINITE_LEAF
from jaxdist.stop import Progress


@dataclasses.dataclass(frozen=True)
class Place:
    position: int = 0
    num_examples: int = 8

    def to_json(self):
        return dataclasses.asdict(self)


class Books:
    """What the hooks see of a Bookkeeper."""

    def __init__(self, *, log_every=1, due=lambda: True, best=False, may_save=True):
        self.unsaved_best, self.may_save = best, lambda: may_save
        self.calls, self._log_every = [], log_every
        self.evaluations = self.saves = types.SimpleNamespace(due=due)
        self.display = types.SimpleNamespace(update=lambda *shown, epoch: self.calls.append(("show", *shown)))

    def logs(self, step):
        return step == 1 or step % self._log_every == 0

    def log(self, step, metrics, stamped):
        self.calls.append((step, dict(metrics), stamped["examples_seen"]))

    def evaluate(self, state):
        self.calls.append(("evaluate", state))

    def save(self, state, place):
        self.calls.append(("save", state, place))


def state_of(step):
    return TrainState(step, (), None, (), None)


def make_info(step, *, loss=0.0, flag=-1, position=None, progress=None):
    metrics = {"loss": jnp.float32(loss), NONFINITE_LEAF: jnp.int32(flag)}
    progress = progress or Progress(step=step)
    progress.step = step
    return StepInfo(step, state_of(step), metrics, position or Place(), progress)


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
    books = Books(log_every=3)
    log, lengths = hooks.LogMetrics(books), []
    for step in range(1, 8):
        log(make_info(step, loss=step, progress=Progress(examples_seen=8 * step)))
        lengths.append(len(books.calls))
    assert lengths == [0, 1, 1, 2, 2, 2, 3]
    assert books.calls == [(step, {"loss": float(step)}, 8 * step) for step in (1, 3, 6)]


def test_flushing_writes_what_is_pending_once():
    books = Books()
    log = hooks.LogMetrics(books)
    log.flush()
    log(make_info(1, loss=5.0))
    log.flush()
    log.flush()
    assert books.calls == [(1, {"loss": 5.0}, 0)]


def test_only_the_steps_that_are_logged_are_read_back():
    log = hooks.LogMetrics(Books(log_every=5))
    for step in (2, 3, 4):
        log(StepInfo(step, None, {"loss": Unreadable()}, Place(), Progress(step=step)))


class Unreadable:
    def addressable_data(self, index):
        raise AssertionError("a step that is not logged was waited for")


def test_fetch_gives_numbers_without_the_loops_own_flag():
    values = hooks.fetch({"loss": jnp.float32(0.5), "count": jnp.int32(3), NONFINITE_LEAF: jnp.int32(-1)})
    assert values == {"loss": 0.5, "count": 3.0}
    assert all(type(value) is float for value in values.values())


@pytest.mark.parametrize("due", [True, False])
def test_evaluating_and_saving_happen_when_they_are_due(due):
    books = Books(due=lambda: due)
    info = make_info(3, position=Place(3))
    hooks.evaluate_when_due(books)(info)
    hooks.save_when_due(books, agreed=float)(info)
    assert books.calls == ([("evaluate", state_of(3)), ("save", state_of(3), Place(3))] if due else [])


@pytest.mark.parametrize("best", [True, False])
def test_a_save_that_would_cost_too_much_is_left_out_unless_the_state_is_the_best(best):
    books = Books(best=best, may_save=False)
    hooks.save_when_due(books, agreed=float)(make_info(3, position=Place(3)))
    assert books.calls == ([("save", state_of(3), Place(3))] if best else [])


def test_process_0_decides_which_saves_cost_too_much():
    books = Books()
    hooks.save_when_due(books, agreed=lambda number: 0.0)(make_info(3, position=Place(3)))
    assert books.calls == []


def test_the_best_state_is_saved_at_once():
    books = Books(due=lambda: False, best=True)
    hooks.save_when_due(books, agreed=float)(make_info(3, position=Place(3)))
    assert books.calls == [("save", state_of(3), Place(3))]


def test_a_step_that_was_not_finite_is_neither_evaluated_nor_saved():
    """Its update was not made; a checkpoint of it would resume behind the batch that was not learnt from."""
    books = Books(best=True)
    info = make_info(3, loss=math.nan, flag=0)
    hooks.evaluate_when_due(books)(info)
    hooks.save_when_due(books, agreed=float)(info)
    assert books.calls == []


def test_the_display_gets_the_latest_metrics():
    books = Books()
    hooks.show_progress(books)(make_info(5, progress=Progress(metrics={"train/loss": 2.0})))
    assert books.calls == [("show", 5, {"train/loss": 2.0})]
