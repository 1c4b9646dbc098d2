import dataclasses
import errno
import json

import jax.numpy as jnp
import numpy as np
import pytest
import tiny_experiment
from hypothesis import given
from hypothesis import strategies as st

from jaxdist.config import overrides
from jaxdist.run import bookkeeping, components
from jaxdist.run.custom import user_hooks
from jaxdist.run.stopwatch import Stopwatch
from jaxdist.run.warm_start import beginning
from jaxdist.rundir import record
from jaxdist.stop import Progress


@dataclasses.dataclass
class Place:
    position: int = 0

    def to_json(self):
        return {"position": self.position}


class Checkpoints:
    """A checkpointer in memory; `waited` counts the calls of wait."""

    def __init__(self, latest=None):
        self.saved, self._latest, self.waited = [], latest, 0

    def latest_step(self):
        return self.saved[-1][0] if self.saved else self._latest

    def save(self, step, state, data_state, metrics):
        self.saved.append((step, state, data_state, dict(metrics)))

    def wait(self):
        self.waited += 1


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def make_books(
    run_dir, *assignments, progress=None, checkpoints=None, stopwatch=None, earlier=None, evaluate=None, rate=None
):
    experiment = overrides.override(tiny_experiment.get_config(), ["writers=()", *assignments])
    run_dir.mkdir(exist_ok=True)
    facts = bookkeeping.Facts(
        experiment=experiment,
        identity=components.Identity("tiny", "model", "data", 0),
        run_dir=run_dir,
        strategy="data-parallel",
        num_devices=2,
        num_processes=1,
        fields={},
        steps_per_epoch=4,
        learning_rate=rate,
        command="a command",
        silent=True,
        earlier=earlier,
    )
    return bookkeeping.Bookkeeper(
        facts, checkpoints or Checkpoints(), progress or Progress(), stopwatch or Stopwatch(), evaluate=evaluate
    )


def rows(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@given(
    period=st.integers(1, 6),
    by_steps=st.booleans(),
    start=st.integers(0, 20),
    jumps=st.lists(st.integers(1, 9), max_size=20),
)
def test_something_is_due_once_where_multiples_were_passed_whether_each_step_was_looked_at_or_not(
    period, by_steps, start, jumps
):
    """Epochs of 3 steps of 2 examples; the last has 1."""
    progress = Progress()

    def go_to(step):
        progress.advance(step, step // 3 * 5 + step % 3 * 2, num_examples=5)

    go_to(start)
    every = {"every_steps": period} if by_steps else {"every_epochs": period}
    schedule, step, steps_per_period = bookkeeping.Due(progress, **every), start, period * (1 if by_steps else 3)
    for jump in jumps:
        go_to(step + jump)
        passed = any(each % steps_per_period == 0 for each in range(step + 1, step + jump + 1))
        assert schedule.due() == passed
        assert not schedule.due()
        step += jump


def test_training_metrics_are_written_with_their_learning_rate_the_first_step_always(tmp_path):
    books = make_books(tmp_path / "run", "log_every=3", "writers=jsonl", rate=lambda step: step / 100)
    with books.shown():
        for step in range(1, 7):
            books.progress.advance(step, 8 * step, 100)
            books.progress.seconds = step / 8
            if books.logs(step):
                books.log(step, {"loss": float(step)}, bookkeeping.stamp(books.progress))
    assert rows(tmp_path / "run") == [
        {
            "step": step,
            "examples_seen": 8 * step,
            "seconds": step / 8,
            "train/loss": float(step),
            "train/learning_rate": step / 100,
        }
        for step in (1, 3, 6)
    ]
    assert books.progress.metrics == {"train/loss": 3.0, "train/learning_rate": 0.03}
    assert books.progress.newest_metrics() == {"train/loss": 6.0, "train/learning_rate": 0.06}


def test_a_loss_on_held_out_examples_that_is_not_finite_is_explained_once(tmp_path, capsys):
    found = {"day/loss": 1.0, "night/loss": float("nan"), "night/perplexity": float("inf")}
    books = make_books(tmp_path / "run", evaluate=lambda state: found)
    for step in (1, 2):
        books.progress.step = step
        books.evaluate("state")
    shown = capsys.readouterr().err
    assert "eval/night/loss is nan at step 1" in shown
    assert shown.count("is nan") == 1


def test_a_step_is_evaluated_once_and_its_time_accounted(tmp_path):
    clock, states = Clock(), []

    def evaluate(state):
        states.append(state)
        clock.now += 2.0
        return {"accuracy": 0.25}

    books = make_books(tmp_path / "run", "writers=jsonl", evaluate=evaluate, stopwatch=Stopwatch(clock=clock))
    books.progress.advance(4, 32, 8)
    with books.shown():
        books.evaluate("state")
        books.evaluate("state")
    assert states == ["state"]
    assert books.make_record(None).time_seconds["eval"] == 2.0
    assert (books.progress.last_evaluation, books.progress.history) == (4, {"eval/accuracy": [0.25]})
    assert rows(tmp_path / "run") == [{"step": 4, "examples_seen": 32, "seconds": 0.0, "eval/accuracy": 0.25}]


def test_a_checkpoint_holds_state_position_and_progress_and_is_made_once(tmp_path):
    kept = Checkpoints()
    books = make_books(tmp_path / "run", checkpoints=kept)
    order = []
    books.before_save = lambda: order.append(len(kept.saved))
    books.progress.advance(6, 48, 8)
    books.progress.metrics["eval/accuracy"] = 0.5  # of an earlier step
    books.log(6, {"loss": 1.0}, bookkeeping.stamp(books.progress))
    books.save("state", Place(6), beyond=[9])
    books.save("state", Place(6))
    ((step, state, data_state, metrics),) = kept.saved
    assert (step, state, metrics, order) == (6, "state", {"train/loss": 1.0}, [0])
    assert data_state["position"] == {"position": 6}
    assert data_state["beyond"] == [9]
    assert Progress.from_json(data_state["progress"]) == books.progress
    assert record.RunRecord.read(tmp_path / "run").step == 6


def test_the_step_an_attempt_resumes_from_is_not_saved_again_but_a_newer_one_from_memory_is(tmp_path):
    kept, progress = Checkpoints(latest=4), Progress(step=4)
    books = make_books(tmp_path / "run", checkpoints=kept, progress=progress)
    books.save("state", Place())
    assert kept.saved == []
    progress.step = 5
    books.save("state", Place())
    assert [step for step, *_ in kept.saved] == [5]


def test_examples_per_second_counts_the_time_the_loop_waited_for_its_input(tmp_path):
    clock = Clock()
    watch = Stopwatch(clock=clock)
    books = make_books(tmp_path / "run", stopwatch=watch)
    for account, seconds in {"compile": 50.0, "input": 3.0, "compute": 1.0, "eval": 20.0}.items():
        with watch.account(account):
            clock.now += seconds
    books.progress.advance(2, 32, 100)
    assert books.make_record(None).examples_per_second == 8.0
    assert (
        make_books(tmp_path / "other", stopwatch=Stopwatch(clock=clock)).make_record(None).examples_per_second is None
    )


def test_restarts_are_the_attempts_before_and_the_processes_started_again(tmp_path):
    first = make_books(tmp_path / "run").make_record("preempted")
    assert first.restarts == 0
    second = make_books(tmp_path / "run", earlier=first)
    assert second.make_record(None).restarts == 1
    second.process_restarts = 3
    assert second.make_record(None).restarts == 4
    assert make_books(tmp_path / "run", earlier=second.make_record(None)).make_record(None).restarts == 5


def test_the_last_record_waits_for_the_checkpoint_and_has_the_hash_of_the_params(tmp_path, capsys):
    kept, params = Checkpoints(), {"w": jnp.arange(3.0)}
    books = make_books(tmp_path / "run", checkpoints=kept)
    with books.shown():
        made = books.finish("max_steps", params)
    assert kept.waited == 1
    assert made.params_sha256 == record.params_sha256({"w": np.arange(3.0, dtype=np.float32)})
    assert record.RunRecord.read(tmp_path / "run").end_reason == "max_steps"
    assert books.make_record(None).params_sha256 is None


@pytest.mark.parametrize(("latest", "shown"), [(None, "none was saved"), (7, "checkpoints (step 7)")])
def test_the_end_of_a_run_says_which_checkpoint_there_is(tmp_path, monkeypatch, latest, shown):
    books, summaries = make_books(tmp_path / "run", checkpoints=Checkpoints(latest)), []
    monkeypatch.setattr(books.display, "finish", summaries.append)
    books.finish("max_steps", None)
    assert summaries[0]["checkpoint"].endswith(shown)


@pytest.mark.parametrize(("latest", "kept"), [(None, "No checkpoint was saved yet."), (7, "step 7 is kept")])
def test_the_report_on_a_step_that_is_not_finite_says_what_is_kept(tmp_path, capsys, latest, kept):
    make_books(tmp_path / "run", checkpoints=Checkpoints(latest)).report_nonfinite("Because.")
    text = (tmp_path / "run" / "nonfinite.txt").read_text()
    assert text == capsys.readouterr().err
    assert text.startswith("Because.\n")
    assert kept in text


def test_the_total_of_the_display_follows_another_batch_size(tmp_path, monkeypatch):
    found = []
    monkeypatch.setattr(bookkeeping, "make_display", lambda bounds, **_: found.append(bounds) or bookkeeping.Silent())
    # After 24 steps that came to as many examples as 6 of the present batch size.
    progress = Progress(step=24, schedule_offset=-18)
    books = make_books(tmp_path / "run", "stop.max_steps=none", "stop.max_epochs=5", progress=progress)
    with books.shown():
        assert found[0].last_step == 24 + (20 - 6)


def test_the_run_that_was_replaced_is_kept_until_there_is_a_checkpoint(tmp_path):
    class Slow(Checkpoints):
        """Writes in the background: a step counts once the next one is saved, or after `wait`."""

        def latest_step(self):
            done = self.saved if self.waited else self.saved[:-1]
            return done[-1][0] if done else None

    aside = tmp_path / "run" / "replaced"
    aside.mkdir(parents=True)
    books = make_books(tmp_path / "run", checkpoints=Slow())
    books.progress.step = 4
    books.save(None, Place(4))
    assert aside.exists()
    books.finish("preempted", None)
    assert not aside.exists()


def test_a_checkpoint_has_the_metrics_of_its_own_step_alone(tmp_path):
    checkpoints = Checkpoints()
    books = make_books(tmp_path / "run", checkpoints=checkpoints, evaluate=lambda state: {"accuracy": 0.9})
    for step, evaluated in ((2, True), (3, False), (4, True)):
        books.progress.step = step
        if evaluated:
            books.evaluate("state")
        books.save("state", Place(step))
    assert [(step, metrics) for step, _, _, metrics in checkpoints.saved] == [
        (2, {"eval/accuracy": 0.9}),
        (3, {}),
        (4, {"eval/accuracy": 0.9}),
    ]


def test_the_best_state_so_far_is_asked_for_and_one_that_is_as_good_is_not(tmp_path):
    values = iter([0.5, 0.7, 0.7, 0.6])
    books = make_books(
        tmp_path / "run", "checkpoints.best_metric=eval/accuracy", evaluate=lambda state: {"accuracy": next(values)}
    )
    asked = []
    for step in range(1, 5):
        books.progress.step = step
        books.evaluate("state")
        asked.append(books.unsaved_best)
    assert asked == [True, True, False, False]
    assert books.make_record(None).extra["best"] == {"metric": "eval/accuracy", "value": 0.7, "step": 2}


def test_a_watched_metric_of_training_is_looked_at_where_its_own_step_is_saved(tmp_path):
    books = make_books(tmp_path / "run", "checkpoints.best_metric=train/loss", "checkpoints.best_mode=min")
    for step, loss in ((1, 3.0), (2, None), (3, 5.0), (4, 2.0)):
        books.progress.advance(step, step, 100)
        if loss is not None:
            books.log(step, {"loss": loss}, {})
        books.save("state", Place())
        assert books.progress.best["step"] == (4 if step == 4 else 1)


class Heard:
    """A hook that keeps what it was told."""

    def __init__(self):
        self.calls = []

    def on_evaluation(self, info):
        self.calls.append(("on_evaluation", info.step, info.metrics))

    def on_checkpoint(self, info):
        self.calls.append(("on_checkpoint", info.step, info.metrics))


def test_hooks_hear_of_evaluations_and_checkpoints_each_once(tmp_path):
    books, heard = make_books(tmp_path / "run", evaluate=lambda state: {"accuracy": 0.5}), Heard()
    books.hooks = user_hooks.UserHooks((heard,), is_first=True)
    books.progress.step = 4
    books.log(4, {"loss": 2.0}, {})
    for _ in range(2):
        books.evaluate("state")
        books.save("state", Place())
    assert heard.calls == [
        ("on_evaluation", 4, {"eval/accuracy": 0.5}),
        ("on_checkpoint", 4, {"train/loss": 2.0, "eval/accuracy": 0.5}),
    ]


def test_a_full_disk_ends_no_run_that_has_a_record_and_its_last_record_is_not_left_out_silently(tmp_path, monkeypatch):
    def full(made, run_dir):
        raise OSError(errno.ENOSPC, "No space left on device")

    books = make_books(tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(record.RunRecord, "write", full)
        with pytest.raises(OSError, match="No space"):
            make_books(tmp_path / "other")  # a run without a record does not begin
        books.write_record(None)
        make_books(tmp_path / "run", earlier=books.make_record(None))
        with pytest.raises(OSError, match="No space"):
            books.write_record("max_steps")
        books.kept_for_supervisor = True
        books.write_record("preempted")
    books.progress.step = 9
    books.write_record(None)
    assert record.RunRecord.read(tmp_path / "run").step == 9


def test_what_a_run_began_with_and_when_is_kept_by_those_that_resume_it(tmp_path):
    began = beginning.WarmStart("runs/a", ("params/w",), (), (), "00")
    first = make_books(tmp_path / "run")
    assert first.make_record(None).extra["init_from"] is None
    first.attempt = dataclasses.replace(first.attempt, began_with=began)
    made = first.make_record(None)
    made.extra["started"] = "2026-01-01T00:00:00+00:00"
    resumed = make_books(tmp_path / "run", earlier=made).make_record(None)
    assert made.extra["init_from"] == resumed.extra["init_from"] == dataclasses.asdict(began)
    assert resumed.extra["started"] == made.extra["started"]


@pytest.mark.parametrize(
    ("end_reason", "value", "step", "is_kept"),
    [
        ("max_steps", 1.0, 6, True),
        ("preempted", 1.0, 6, False),
        ("max_steps", 2.0, 6, False),
        ("max_steps", 1.0, 7, False),
    ],
)
def test_an_attempt_that_trains_nothing_leaves_the_record_as_its_makers_wrote_it(
    tmp_path, end_reason, value, step, is_kept
):
    earlier = make_books(tmp_path / "run", progress=Progress(step=6)).write_record("max_steps", {"w": jnp.ones(3)})
    books = make_books(tmp_path / "run", "log_every=5", progress=Progress(step=6), earlier=earlier)
    books.attempt = dataclasses.replace(books.attempt, num_devices=5)
    books.progress.step = step
    made = books.write_record(end_reason, {"w": value * jnp.ones(3)})
    assert (made.num_devices, made.config.log_every) == ((2, 1) if is_kept else (5, 5))
    assert made.restarts == 1


@pytest.mark.parametrize("silent", [False, True])
def test_the_header_is_shown_first_unless_the_attempt_is_silent_and_the_display_is_closed(
    tmp_path, monkeypatch, capsys, silent
):
    class Shown(bookkeeping.Silent):
        closed = 0

        def close(self):
            self.closed += 1

    display, given = Shown(), []
    monkeypatch.setattr(bookkeeping, "make_display", lambda bounds, **options: given.append(options) or display)
    books = make_books(tmp_path / "run")
    books.attempt = dataclasses.replace(books.attempt, silent=silent, header=lambda: "a header")
    with books.shown():
        assert books.display is display
        assert not display.closed
    assert display.closed == 1
    assert given[0]["silent"] == silent
    assert capsys.readouterr().err == ("" if silent else "a header\n")
