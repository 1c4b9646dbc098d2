"""Progress: a bar on a terminal, lines in a file, nothing when silent; the time left by the bound that comes first."""

import contextlib
import io
import os
import pathlib
import pty
import subprocess
import sys

import jax.numpy as jnp
import pytest
import rich.console
from hypothesis import given
from hypothesis import strategies as st

from jaxdist import stop
from jaxdist.run import progress_display


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


def make_pace(clock, **bounds):
    return progress_display.Pace(progress_display.Bounds(**bounds), global_batch_size=32, clock=clock)


def run(shown, clock, steps, seconds_per_step=1.0):
    for step in steps:
        clock.now += seconds_per_step
        shown.update(step, {"train/loss": 1 / step, "train/accuracy": jnp.float32(0.5), "learning_rate": 0.1})


def test_lines_come_by_the_clock_and_the_last_one_with_the_summary():
    clock, stream = Clock(), io.StringIO()
    lines = progress_display.Lines(make_pace(clock, last_step=25), stream, every_seconds=10)
    with contextlib.closing(lines):
        run(lines, clock, range(1, 26))
        lines.finish({"ended": "max_steps", "run record": "runs/a/run.json"})
    assert stream.getvalue().splitlines() == [
        "step 1/25  loss 1  accuracy 0.5  learning_rate 0.1",
        "step 11/25  32 examples/s  0:14 left  loss 0.09091  accuracy 0.5  learning_rate 0.1",
        "step 21/25  32 examples/s  0:04 left  loss 0.04762  accuracy 0.5  learning_rate 0.1",
        "step 25/25  32 examples/s  0:00 left  loss 0.04  accuracy 0.5  learning_rate 0.1",
        "ended       max_steps",
        "run record  runs/a/run.json",
    ]


def test_a_log_file_has_a_line_an_epoch_and_at_most_one_a_second():
    clock, stream = Clock(), io.StringIO()
    lines = progress_display.Lines(make_pace(clock, last_step=100), stream, every_seconds=10)
    for step in range(1, 41):
        clock.now += 0.25
        lines.update(step, {"eval/accuracy": step / 100}, epoch=step // 8)
    shown = stream.getvalue().splitlines()
    assert [line.split("  ")[:2] for line in shown[1:]] == [[f"step {8 * n}/100", f"epoch {n}"] for n in range(1, 6)]
    for step in range(41, 51):
        clock.now += 0.01
        lines.update(step, epoch=step - 30)
    assert len(stream.getvalue().splitlines()) == len(shown)


def test_the_first_steps_compile_does_not_count_in_the_pace():
    clock = Clock()
    pace = make_pace(clock, last_step=100)
    clock.now += 60.0
    pace.sample(1)
    assert pace.seconds_left is None
    clock.now += 2.0
    pace.sample(5)
    assert pace.steps_per_second == 2.0
    assert pace.examples_per_second == 64.0
    assert pace.seconds_left == 47.5


def test_a_run_that_goes_back_to_the_step_before_a_bad_one_has_no_negative_pace():
    clock, stream = Clock(), io.StringIO()
    lines = progress_display.Lines(make_pace(clock, last_step=100), stream, every_seconds=0.0)
    for step in (1, 2, 0):
        clock.now += 1.0
        lines.update(step)
    shown = [line.rstrip() for line in stream.getvalue().splitlines()]
    assert "examples/s" in shown[1]
    assert shown[2] == "step 0/100"


def test_a_resumed_run_has_used_some_of_its_time():
    clock = Clock()
    bounds = progress_display.Bounds(max_seconds=100.0)
    pace = progress_display.Pace(bounds, global_batch_size=1, carried_seconds=60.0, clock=clock)
    clock.now += 5.0
    assert pace.seconds_left == pytest.approx(35.0)
    assert pace.fraction == pytest.approx(0.65)


@given(
    max_steps=st.none() | st.integers(1, 100),
    max_epochs=st.none() | st.integers(1, 10),
    max_seconds=st.none() | st.floats(0.1, 100),
    step=st.integers(0, 100),
    elapsed=st.floats(0, 100),
    pace=st.none() | st.floats(0.1, 10),
)
def test_the_bound_that_comes_first_counts(max_steps, max_epochs, max_seconds, step, elapsed, pace):
    limits = stop.Stop(max_steps=max_steps, max_epochs=max_epochs, max_seconds=max_seconds)
    bounds = progress_display.Bounds(last_step=limits.last_step(7), max_seconds=max_seconds)
    left, fraction = bounds.seconds_left(step, elapsed, pace), bounds.fraction(step, elapsed)
    by_seconds = None if max_seconds is None else max_seconds - elapsed
    by_steps = [(end - step) / pace for end in (max_steps, max_epochs and max_epochs * 7) if end and pace]
    known = [by_seconds, *by_steps] if by_seconds is not None else by_steps
    assert left == (pytest.approx(max(min(known), 0.0)) if known else None)
    assert (fraction is None) == (max_steps is None and max_epochs is None and max_seconds is None)
    assert fraction is None or 0 <= fraction <= 1


def terminal(width=120):
    return rich.console.Console(file=io.StringIO(), force_terminal=True, width=width, legacy_windows=False)


def test_the_bar_shows_step_pace_loss_accuracy_and_time_left():
    clock, console = Clock(), terminal()
    with contextlib.closing(progress_display.Bar(make_pace(clock, last_step=50), console)) as bar:
        assert "step 0/50  compiling" in console.file.getvalue()
        run(bar, clock, range(1, 21))
        bar.update(20, {"eval/accuracy": 0.985})
        bar.finish({"ended": "target_reached"})
    last = console.file.getvalue().splitlines()[-2]
    assert "step 20/50  32 examples/s  0:30 left  loss 0.05  accuracy 0.5  eval/accuracy 0.985" in last
    assert "learning_rate" not in last
    assert console.file.getvalue().endswith("ended  target_reached\n")


def test_without_a_bound_the_bar_promises_nothing():
    clock, console = Clock(), terminal()
    with contextlib.closing(progress_display.Bar(make_pace(clock), console)) as bar:
        run(bar, clock, range(1, 4))
    assert "step 3  32 examples/s  loss 0.3333" in console.file.getvalue()
    assert " left" not in console.file.getvalue()


class Untouchable:
    """A metric still being computed: the display may not wait for it."""

    def __float__(self):
        raise AssertionError("fetched")


def test_metrics_are_fetched_only_when_a_redraw_is_due():
    clock, console = Clock(), terminal()
    bar = progress_display.Bar(make_pace(clock), console, every_seconds=5)
    lines = progress_display.Lines(make_pace(clock), io.StringIO(), every_seconds=5)
    for shown in (bar, lines):
        shown.update(1, {"loss": 1.0})
        shown.update(2, {"loss": Untouchable()})
        shown.close()


def test_a_terminal_is_given_back_after_an_exception():
    console, before = terminal(), (sys.stdout, sys.stderr)

    def fail():
        with contextlib.closing(progress_display.Bar(make_pace(Clock()), console)) as bar:
            bar.update(1, {"loss": 1.0})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    written = console.file.getvalue()
    assert written.removesuffix("\x1b[?25h").endswith("\n")
    assert written.rindex("\x1b[?25h") > written.rindex("\x1b[?25l")
    assert (sys.stdout, sys.stderr) == before
    # A process that is killed also leaves the terminal with a cursor.
    assert written.index("\x1b[?25h") < written.index("step 1")


def test_silence():
    silent = progress_display.make_display(progress_display.Bounds(), global_batch_size=1, silent=True, stream=None)
    silent.update(1, {"loss": Untouchable()})
    silent.finish({"ended": "max_steps"})
    silent.close()


@pytest.mark.parametrize("force_color", [False, True])
def test_a_log_file_gets_lines(monkeypatch, force_color):
    if force_color:
        monkeypatch.setenv("FORCE_COLOR", "1")
    shown = progress_display.make_display(progress_display.Bounds(), global_batch_size=1, stream=io.StringIO())
    assert isinstance(shown, progress_display.Lines)


SCRIPT = """
import contextlib
from jaxdist.run import progress_display as progress
with contextlib.closing(progress.make_display(progress.Bounds(last_step=2), global_batch_size=1)) as shown:
    print("kept apart", flush=True)
    shown.update(1, {"loss": 0.5})
    shown.finish({"ended": "max_steps"})
"""


def test_a_real_terminal_gets_the_bar_and_standard_output_stays_free(tmp_path):
    ours, theirs = pty.openpty()
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        stdout=subprocess.PIPE,
        stderr=theirs,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "100"},
        cwd=pathlib.Path(__file__).parents[2],
        timeout=200,
        check=True,
    )
    os.close(theirs)
    shown = os.read(ours, 65536).decode()
    os.close(ours)
    assert done.stdout == b"kept apart\n"
    assert "step 1/2  loss 0.5" in shown
    assert "ended  max_steps" in shown


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (7.4, "0:07"), (725, "12:05"), (3723, "1:02:03")])
def test_durations(seconds, text):
    assert progress_display.format_seconds(seconds) == text


def deciding(*values, **rules):
    return progress_display.deciding(
        stop.Stop(**{"target": 0.9, **rules}), stop.Progress(history={"eval/accuracy": list(values)})
    )


def test_the_deciding_metric_comes_with_the_best_value_and_the_patience_left():
    assert progress_display.deciding(stop.Stop(max_steps=3), stop.Progress()) is None
    assert deciding().standing() == ""
    assert deciding(0.5, 0.75, 0.7).standing() == "(best 0.75)"
    assert deciding(0.5, 0.75, 0.7, float("nan"), patience=5).standing() == "(best 0.75, patience 3)"
    assert deciding(0.5, 0.75, 0.7, patience=5, mode="min").standing() == "(best 0.5, patience 3)"


@pytest.mark.parametrize("width", [70, 80, 120])
def test_the_deciding_metric_is_never_cut_off(width):
    clock, console = Clock(), terminal(width)
    watched = deciding(0.5, 0.75, 0.7, patience=5)
    with contextlib.closing(progress_display.Bar(make_pace(clock, last_step=5000), console, deciding=watched)) as bar:
        run(bar, clock, range(1, 30))
        bar.update(30, {"eval/loss": 0.25, "eval/accuracy": 0.7})
        clock.now += 1.0
        bar.update(31, {"eval/other/accuracy": 0.5, "train/a_rather_long_name/loss": 0.5})
        last = console.file.getvalue().splitlines()[-1]
    assert "eval/accuracy 0.7 (best 0.75, patience 4)" in last
    assert ("examples/s" in last) == (width == 120)
    assert "…" not in last


@given(st.lists(st.text("ab", min_size=1, max_size=9), min_size=1, max_size=6, unique=True), st.integers(1, 60))
def test_a_line_is_cut_by_whole_parts_that_need_not_be_kept(parts, width):
    line = progress_display.fitting(parts, width, keep=parts[:1]).split("  ")
    assert line[0] == parts[0]
    assert line == [part for part in parts if part in line]
    assert len("  ".join(line)) <= width or line == parts[:1]


def test_the_counts_of_a_confusion_matrix_are_in_no_line():
    clock, stream = Clock(), io.StringIO()
    metrics = {"eval/loss": 0.5, "eval/confusion_0_1": 3.0, "eval/night/confusion_0_1": 3.0}
    with contextlib.closing(progress_display.Lines(make_pace(clock), stream)) as lines:
        lines.update(1, metrics)
    assert "eval/loss 0.5" in stream.getvalue()
    assert "confusion" not in stream.getvalue()
    watched = progress_display.Deciding("eval/confusion_0_1", stop.Stop(max_steps=9), lambda: [3.0])
    with contextlib.closing(progress_display.Lines(make_pace(clock), stream, deciding=watched)) as lines:
        lines.update(1, metrics)
    assert "eval/confusion_0_1 3 (best 3)" in stream.getvalue()


def test_the_last_line_is_said_once_with_what_came_after_the_last_update():
    clock, stream = Clock(), io.StringIO()
    with contextlib.closing(progress_display.Lines(make_pace(clock), stream)) as lines:
        for step, metrics in ((1, {"loss": 1.0}), (1, {"loss": 1.0}), (2, {"loss": 0.5})):
            lines.update(step, metrics)
        assert stream.getvalue().count("\n") == 1
        lines.update(2, {"loss": 0.5, "eval/loss": 0.25})
        lines.finish({})
    assert [line.split()[1] for line in stream.getvalue().splitlines() if line] == ["1", "2"]
    assert "eval/loss 0.25" in stream.getvalue().splitlines()[1]


@pytest.mark.parametrize(("later", "said"), [(0.5, 1), (0.25, 2)])
def test_a_line_that_was_said_is_said_again_only_where_a_value_is_another(later, said):
    clock, stream, loss = Clock(), io.StringIO(), 0.5
    with contextlib.closing(progress_display.Lines(make_pace(clock), stream)) as lines:
        lines.update(7, {"eval/loss": loss})
        lines.update(7, {"eval/loss": loss if later == loss else later})
        lines.finish({})
    assert stream.getvalue().count("step 7") == said
