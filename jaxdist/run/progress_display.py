"""The display: what is shown of a run while it trains.

The one idea: `update` may be called at every step because it nearly always does nothing. It keeps the latest metrics as
they are (device arrays included) and turns them into text only when the next redraw is due. There is no thread.
"""

import collections
import dataclasses
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TextIO

import rich.console
import rich.progress

from jaxdist import stop
from jaxdist.rundir import confusion, writers

SHOWN = ("loss", "accuracy")
"""The metrics a bar has room for, by the last part of their name, besides the deciding one; lines show all of them."""
_EPOCH_SECONDS = 1.0
"""Least time between two lines of a log file."""
_WIDE, _NARROW = 20, 10
"""Columns of the bar, on a terminal of 100 columns or more, and on a smaller one."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bounds:
    """What is known about the end of a run; the first bound reached ends it. None: no such bound.

    Attributes:
      last_step: see `stop.Stop.last_step`.
      max_seconds: of training, over all attempts.
    """

    last_step: int | None = None
    max_seconds: float | None = None

    def seconds_left(self, step: int, elapsed_seconds: float, steps_per_second: float | None) -> float | None:
        """Return the time left by the bound that comes first, None when none is known or the pace is not."""
        left = [] if self.max_seconds is None else [self.max_seconds - elapsed_seconds]
        if self.last_step is not None and steps_per_second:
            left.append((self.last_step - step) / steps_per_second)
        return max(min(left), 0.0) if left else None

    def fraction(self, step: int, elapsed_seconds: float) -> float | None:
        """Return how much of the run is done, in [0, 1], by the bound that is nearest; None when none is known."""
        done = [] if self.max_seconds is None else [elapsed_seconds / max(self.max_seconds, 1e-9)]
        if self.last_step is not None:
            done.append(step / max(self.last_step, 1))
        return min(max(done), 1.0) if done else None


@dataclasses.dataclass(frozen=True)
class Deciding:
    """The metric that a stop rule looks at.

    Attributes:
      metric: its name.
      rule: what the stop rule says of it, with mode and patience.
      history: returns the values that the evaluations gave so far.
    """

    metric: str
    rule: stop.Stop
    history: Callable[[], Sequence[float]]

    def standing(self) -> str:
        """Return the best value so far, and the evaluations that may still pass without a better one; "" before any."""
        values = list(self.history())
        if not values:
            return ""
        best, age = stop.best_of(values, self.rule.mode)
        left = "" if self.rule.patience is None else f", patience {max(self.rule.patience - age, 0)}"
        return f"(best {writers.format_number(best)}{left})"


def deciding(rule: stop.Stop, progress: stop.Progress) -> Deciding | None:
    """Return the metric that decides when a run ends, None where none does."""
    if rule.target is None and rule.patience is None:
        return None
    return Deciding(rule.target_metric, rule, lambda: progress.history.get(rule.target_metric, []))


def make_display(
    bounds: Bounds,
    *,
    global_batch_size: int,
    start_step: int = 0,
    carried_seconds: float = 0.0,
    deciding: Deciding | None = None,
    silent: bool = False,
    stream: TextIO | None = None,
) -> "Silent | Lines | Bar":
    """Return a bar if the stream is a terminal, else plain lines; nothing at all when silent.

    `max_seconds` of the bounds counts from this call, less the seconds that a resumed run has used already. Examples a
    second are for people: a ragged last batch counts as a whole one. The deciding metric is always shown. A run is
    `silent` with --json, and on every process but process 0. Standard output stays free for results: without a stream,
    standard error is written to.
    """
    if silent:
        return Silent()
    stream = stream or sys.stderr
    pace = Pace(bounds, global_batch_size=global_batch_size, start_step=start_step, carried_seconds=carried_seconds)
    console = rich.console.Console(file=stream, highlight=False)
    # The stream is asked, because FORCE_COLOR would make rich take a log file for a terminal.
    if stream.isatty() and not console.is_dumb_terminal:
        return Bar(pace, console, deciding=deciding)
    return Lines(pace, stream, deciding=deciding)


class Pace:
    """The speed and the remaining time of a run, from the last `window` samples; the first step starts the count."""

    def __init__(
        self,
        bounds: Bounds,
        *,
        global_batch_size: int,
        start_step: int = 0,
        carried_seconds: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
        window: int = 100,
    ) -> None:
        self.clock = clock
        self.step = start_step
        self._bounds = bounds
        self._global_batch_size = global_batch_size
        self._start = clock() - carried_seconds
        self._samples: collections.deque[tuple[float, int]] = collections.deque(maxlen=window)

    def sample(self, step: int) -> None:
        """Note that `step` is finished now; one that is not finite takes the run back to the step before it."""
        if self._samples and step < self._samples[-1][1]:
            self._samples.clear()
        self.step = step
        self._samples.append((self.clock(), step))

    @property
    def elapsed_seconds(self) -> float:
        """Seconds since the start of the run, the carried ones included."""
        return self.clock() - self._start

    @property
    def steps_per_second(self) -> float | None:
        """Steps a second over the window, None before two samples."""
        if len(self._samples) < 2:
            return None
        (first_time, first_step), (last_time, last_step) = self._samples[0], self._samples[-1]
        return (last_step - first_step) / (last_time - first_time) if last_time > first_time else None

    @property
    def examples_per_second(self) -> float | None:
        """Examples a second over the window, None before two samples."""
        return None if self.steps_per_second is None else self.steps_per_second * self._global_batch_size

    @property
    def seconds_left(self) -> float | None:
        """See Bounds."""
        return self._bounds.seconds_left(self.step, self.elapsed_seconds, self.steps_per_second)

    @property
    def fraction(self) -> float | None:
        """See Bounds."""
        return self._bounds.fraction(self.step, self.elapsed_seconds)

    def texts(self) -> list[str]:
        """Return step, examples/s and time left, as far as they are known."""
        last_step = self._bounds.last_step
        parts = [f"step {self.step}" + ("" if last_step is None else f"/{last_step}")]
        if self.examples_per_second is not None:
            parts.append(f"{self.examples_per_second:,.0f} examples/s")
        if self.seconds_left is not None:
            parts.append(f"{format_seconds(self.seconds_left)} left")
        return parts


class Silent:
    """Shows nothing; what its methods say holds for every display. `contextlib.closing` closes one at any end."""

    def update(self, step: int, metrics: Mapping[str, Any] | None = None, *, epoch: int = 0) -> None:
        """Note that `step` and `epoch` are finished, and the latest metrics (whatever float() takes); redraw if due."""

    def finish(self, summary: Mapping[str, object]) -> None:
        """Close, then print how the run ended, one entry per line: end reason, path of the run record, and so on."""

    def close(self) -> None:
        """Restore the terminal. May be called twice."""


class Lines:
    """Plain lines for a log file: the first step's, one an epoch, one every `every_seconds`, and the last.

    Where epochs are short, they have a line a second at most.
    """

    def __init__(
        self, pace: Pace, stream: TextIO, *, every_seconds: float = 10.0, deciding: Deciding | None = None
    ) -> None:
        self._pace, self._deciding = pace, deciding
        self._stream = stream
        self._every_seconds = every_seconds
        self._due = self._epoch_due = -math.inf
        self._epoch = 0
        self._latest: dict[str, Any] = {}
        self._unsaid = False

    def update(self, step: int, metrics: Mapping[str, Any] | None = None, *, epoch: int = 0) -> None:
        """See Silent."""
        latest = {**self._latest, **(metrics or {})}
        self._unsaid = self._unsaid or step != self._pace.step or latest.keys() != self._latest.keys()
        self._unsaid = self._unsaid or any(value is not self._latest[name] for name, value in latest.items())
        self._latest, self._pace.step = latest, step
        now = self._pace.clock()
        ended, self._epoch = epoch > self._epoch, epoch
        if now >= self._due or (ended and now >= self._epoch_due):
            self._due, self._epoch_due = now + self._every_seconds, now + _EPOCH_SECONDS
            self._say()

    def finish(self, summary: Mapping[str, object]) -> None:
        """See Silent."""
        if self._unsaid:
            self._say()
        print(format_summary(summary), file=self._stream, flush=True)

    def close(self) -> None:
        """See Silent."""

    def _say(self) -> None:
        self._unsaid = False
        self._pace.sample(self._pace.step)
        metrics = _texts_of(self._latest, self._deciding)
        step, *pace = self._pace.texts()
        epochs = [f"epoch {self._epoch}"] if self._epoch else []
        print("  ".join([step, *epochs, *pace, *metrics]), file=self._stream, flush=True)


class Bar:
    """One line at the bottom of a terminal, redrawn in place; other output appears above it."""

    def __init__(
        self,
        pace: Pace,
        console: rich.console.Console,
        *,
        every_seconds: float = 0.1,
        deciding: Deciding | None = None,
    ) -> None:
        self._pace, self._deciding = pace, deciding
        bar_width = _WIDE if console.width >= 100 else _NARROW
        self._width = console.width - bar_width - 1
        self._every_seconds = every_seconds
        self._latest: dict[str, Any] = {}
        self._due = -math.inf
        self._bar = rich.progress.Progress(
            rich.progress.BarColumn(bar_width=bar_width),
            rich.progress.TextColumn("{task.description}", markup=False),
            console=console,
            auto_refresh=False,
            # What is printed to a standard output that is a file or a pipe must not appear on the terminal.
            redirect_stdout=sys.stdout.isatty(),
            redirect_stderr=sys.stderr.isatty(),
        )
        self._task = self._bar.add_task(f"{pace.texts()[0]}  compiling", total=None)
        self._bar.start()
        # rich hides the cursor until the end, but a process killed outright has no chance to show it again.
        console.show_cursor(True)

    def update(self, step: int, metrics: Mapping[str, Any] | None = None, *, epoch: int = 0) -> None:
        """See Silent."""
        self._latest.update(metrics or {})
        self._pace.step = step
        now = self._pace.clock()
        if now >= self._due:
            self._due = now + self._every_seconds
            self._draw()

    def finish(self, summary: Mapping[str, object]) -> None:
        """See Silent."""
        self._draw()
        self.close()
        self._bar.console.print(format_summary(summary), markup=False, soft_wrap=True)

    def close(self) -> None:
        """See Silent."""
        # Nothing is fetched from a device here: after an error or in a hang that may raise, or block.
        self._bar.stop()

    def _text(self) -> str:
        """Return the text next to the bar; where there is not enough room, only step and deciding metric."""
        decides = None if self._deciding is None else self._deciding.metric
        shown = {
            name: value for name, value in self._latest.items() if name == decides or name.rpartition("/")[2] in SHOWN
        }
        step, *pace = self._pace.texts()
        metrics = _texts_of(shown, self._deciding)
        first = metrics[:1] if decides in shown else []
        return fitting([step, *first, *pace, *metrics[len(first) :]], self._width, keep=[step, *first])

    def _draw(self) -> None:
        self._pace.sample(self._pace.step)
        text = self._text()
        fraction = self._pace.fraction
        total = None if fraction is None else 1.0
        self._bar.update(self._task, description=text, completed=fraction or 0.0, total=total, refresh=True)


def _texts_of(metrics: Mapping[str, Any], deciding: Deciding | None = None) -> list[str]:
    """Return `name value` for each metric but the counts of confusion matrices; the deciding one first, with how it
    stands.
    """
    shown = {
        name: value
        for name, value in metrics.items()
        if not confusion.is_entry(name) or (deciding and name == deciding.metric)
    }
    texts = {name: f"{name.removeprefix('train/')} {writers.format_number(value)}" for name, value in shown.items()}
    if deciding is None or deciding.metric not in texts:
        return list(texts.values())
    first = f"{texts.pop(deciding.metric)} {deciding.standing()}".rstrip()
    return [first, *texts.values()]


def fitting(parts: Sequence[str], width: int, *, keep: Sequence[str]) -> str:
    """Return `parts` on one line of at most `width` columns: those not in `keep` are dropped first, from the last.

    Where the rest is still too long, parts are dropped from the first on.
    """
    left = list(parts)
    for part in reversed(parts):
        if len("  ".join(left)) <= width:
            break
        if part not in keep:
            left.remove(part)
    while len(left) > 1 and len("  ".join(left)) > width:
        left.pop(0)
    return "  ".join(left)


def format_seconds(seconds: float) -> str:
    """Return a duration as people write it: 0:07, 12:05, 1:02:03."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def format_summary(summary: Mapping[str, object]) -> str:
    """Return an entry a line, the names padded to one width."""
    width = max(map(len, summary), default=0)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in summary.items())
