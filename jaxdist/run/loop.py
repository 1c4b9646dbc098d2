"""The training loop: take a batch, dispatch a step, call the hooks, ask whether to stop.

The loop waits for nothing it need not. A step is dispatched and the next batch fetched while the devices work. The one
value read back is the non-finite flag, and only every few steps, of a step that was dispatched a while ago: by then it
has long been computed. Nothing is lost by that, since a step that is not finite marks the state, and later steps leave
a marked state as it is (see `step.apply_averages`).
"""

import dataclasses
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias

import jax
import numpy as np

from jaxdist import errors
from jaxdist import stop as stop_rules
from jaxdist.run.stopwatch import StepTimes, Stopwatch
from jaxdist.spmd.metrics import Batch
from jaxdist.spmd.state import TrainState
from jaxdist.spmd.step import EMPTY_BATCH, NONFINITE_LEAF, Metrics, Step, unmarked


class DataPosition(Protocol):
    """The place in the data after a batch was trained on; counts are in global examples."""

    @property
    def epoch(self) -> int:
        """The epoch, from 0."""

    @property
    def position(self) -> int:
        """Examples of the epoch that were trained on."""

    @property
    def num_examples(self) -> int:
        """Examples of a whole epoch."""


class StepInfo(NamedTuple):
    """What a hook sees after step `step` was dispatched.

    Attributes:
      step: number of the step, the first is 1.
      state: the state after it; the next step will donate it, so a hook must not keep it.
      metrics: its metrics, on the devices and perhaps not computed yet; reading them waits, so read them one step late.
      position: where the data stand after it.
      progress: the run so far; a hook that evaluates records its result there.
    """

    step: int
    state: TrainState
    metrics: Metrics
    position: Any
    progress: stop_rules.Progress


Hook: TypeAlias = Callable[[StepInfo], None]

LOOK_EVERY = 4
"""Steps between two looks at the non-finite flag, and steps that a look leaves on their way. The same on every process,
or one of them would dispatch a step that the others do not. Batches are kept until they were looked at."""


@dataclasses.dataclass(frozen=True)
class NonFinite:
    """A step whose loss or gradient was not finite; neither its update nor a later one was made.

    Attributes:
      step: number of the step.
      leaf: index in tree order of the first such gradient leaf, the number of leaves where only the loss is, one more
        where the loss is finite too and what the optimizer multiplies its updates by is not.
      batch: the step's batch.
    """

    step: int
    leaf: int
    batch: Batch


@dataclasses.dataclass(frozen=True)
class FitResult:
    """How training ended.

    Attributes:
      state: the state after the last step; the one before the step that was not finite, if that is why it ended.
      end_reason: one of the run record's.
      position: where the data stand with that state; None if no step was made.
      progress: the run until that state.
      nonfinite: the step that was not finite.
    """

    state: TrainState
    end_reason: str
    position: Any
    progress: stop_rules.Progress
    nonfinite: NonFinite | None = None


def fit(
    step: Step,
    state: TrainState,
    batches: Iterable[tuple[Batch, DataPosition]],
    *,
    stop: stop_rules.StopRule,
    hooks: Sequence[Hook] = (),
    progress: stop_rules.Progress | None = None,
    stop_requested: Callable[[int], bool] = lambda step: False,
    stopwatch: Stopwatch | None = None,
    step_times: StepTimes | None = None,
) -> FitResult:
    """Train until `stop` gives a reason, the data end, or a stop is requested.

    Args:
      step: see `jaxdist.spmd.step`; donates the state. Once its flag NONFINITE_LEAF is set it stays set, and the
        state stays as it is.
      state: the state to start from; must not be used afterwards.
      batches: pairs of a global batch and the data position after it.
      stop: looked at after each step and its hooks, and before the first step of a resumed run.
      hooks: called in order after each step was dispatched.
      progress: that of the run that is resumed, or new; updated in place.
      stop_requested: called with the step's number after each step; True ends the run as preempted.
      stopwatch: account of the wall time; input, compile and compute are charged here.
      step_times: takes the duration of each step but the first, which compiles.

    Returns:
      The state after the last step, and why it was the last.

    Raises:
      UserError: the first step cannot be traced; the message says where in the user's functions.
    """
    progress = stop_rules.Progress(step=int(state.step)) if progress is None else progress
    stopwatch = Stopwatch() if stopwatch is None else stopwatch
    waiting, compiling, stepping = (stopwatch.account(name) for name in ("input", "compile", "compute"))
    iterator, position = iter(batches), None
    unread, pace = _Unread(), _Pace(step_times)
    start_time, seconds_before = time.monotonic(), progress.seconds

    # A resumed run may already have ended: another step would differ from the run that was never stopped.
    reason = (stop(progress) if progress.step else None) or ""
    while not reason:
        with waiting:
            item = next(iterator, None)
        if item is None:
            reason = "max_epochs"
            break
        batch, next_position = item
        with stepping if pace.started else compiling:
            state, metrics = step(state, batch) if pace.started else _first(step, state, batch)
            unread.add(_Dispatched.after(progress, position, batch, metrics))
            bad = unread.look(progress, leave=LOOK_EVERY) if unread.count == 2 * LOOK_EVERY else None
        if bad:
            return _ended_nonfinite(bad, state, progress)
        position = next_position
        _advance(progress, position, seconds_before + time.monotonic() - start_time)
        info = StepInfo(progress.step, state, metrics, position, progress)
        for hook in hooks:
            hook(info)
        pace.step_dispatched()
        reason = stop(progress) or ("preempted" if stop_requested(progress.step) else "")

    with stepping:
        bad = unread.look(progress, leave=0)
        jax.block_until_ready(state)
    pace.settle()
    return _ended_nonfinite(bad, state, progress) if bad else FitResult(state, reason, position, progress)


def _first(step: Step, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
    """Make the first step. It is traced here, so this is where mistakes in the user's functions appear."""
    with errors.as_user_error():
        return step(state, batch)


def _advance(progress: stop_rules.Progress, position: DataPosition, seconds: float) -> None:
    seen = position.epoch * position.num_examples + position.position
    progress.advance(progress.step + 1, seen, position.num_examples)
    progress.seconds = seconds


class _Dispatched(NamedTuple):
    """A dispatched step, its flag, and the progress of the run before it."""

    step: int
    batch: Batch
    flag: jax.Array
    position: Any
    epoch: int
    examples_seen: int

    @classmethod
    def after(cls, progress: stop_rules.Progress, position: Any, batch: Batch, metrics: Metrics) -> "_Dispatched":
        flag = metrics[NONFINITE_LEAF]
        return cls(progress.step + 1, batch, flag, position, progress.epoch, progress.examples_seen)

    def leaf(self) -> int:
        """Return the value of the flag; waits for the step."""
        return int(np.asarray(self.flag.addressable_data(0)))


class _Unread:
    """The steps whose flag was not read yet, in order."""

    def __init__(self) -> None:
        self._steps: list[_Dispatched] = []

    @property
    def count(self) -> int:
        return len(self._steps)

    def add(self, dispatched: _Dispatched) -> None:
        self._steps.append(dispatched)

    def look(self, progress: stop_rules.Progress, *, leave: int) -> _Dispatched | None:
        """Wait for all but the newest `leave` steps; return the first of them that was not finite, else count those
        whose batch was empty.
        """
        end = len(self._steps) - leave
        looked, self._steps = self._steps[:end], self._steps[end:]
        # The last one first, for which alone there is anything to wait. Each is read once: with 5 us a step, this is
        # the largest part of the loop's own time.
        leaves = [each.leaf() for each in reversed(looked)][::-1]
        bad = next((each for each, leaf in zip(looked, leaves, strict=True) if leaf >= 0), None)
        if bad is None:
            progress.count_empty(leaves.count(EMPTY_BATCH))
        return bad


class _Pace:
    """Times the steps: over the steps between two looks, because the loop waits for the devices only then."""

    def __init__(self, step_times: StepTimes | None):
        self.started = False  # the first step compiles, and is not timed
        self._step_times, self._since, self._num_steps = step_times, 0.0, 0

    def step_dispatched(self) -> None:
        if not self.started:
            self.started, self._since = True, time.monotonic()
            return
        self._num_steps += 1
        if self._num_steps == LOOK_EVERY:
            self.settle()

    def settle(self) -> None:
        """Divide the time since the last call among the steps since then."""
        now = time.monotonic()
        if self._step_times is not None:
            for _ in range(self._num_steps):
                self._step_times.add((now - self._since) / self._num_steps)
        self._since, self._num_steps = now, 0


def _ended_nonfinite(bad: _Dispatched, state: TrainState, progress: stop_rules.Progress) -> FitResult:
    """Return the end of a run at the state before the bad step, with the progress and the position that go with it."""
    progress.step, progress.epoch, progress.examples_seen = bad.step - 1, bad.epoch, bad.examples_seen
    found = NonFinite(bad.step, bad.leaf(), bad.batch)
    return FitResult(unmarked(state), "nonfinite", bad.position, progress, found)
