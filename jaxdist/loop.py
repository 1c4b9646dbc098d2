"""The training loop: take a batch, dispatch a step, let the hooks look, ask whether to stop.

The loop waits for nothing it need not. A step is dispatched and the next batch fetched while the devices work; the one
value read back at every step is the non-finite flag, and it is read one step late, when it has long been computed.
"""

import dataclasses
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol, TypeAlias

import jax
import numpy as np

from jaxdist import stop as stop_rules
from jaxdist.metrics import Batch
from jaxdist.record import StepTimes, Stopwatch
from jaxdist.state import TrainState
from jaxdist.step import NONFINITE_LEAF, Metrics, Step


class DataPosition(Protocol):
    """Where training stands in the data once a batch was trained on; counts are in global examples."""

    @property
    def epoch(self) -> int:
        """The epoch, from 0."""

    @property
    def position(self) -> int:
        """Examples of the epoch that were trained on."""

    @property
    def num_examples(self) -> int:
        """Examples of a whole epoch."""


@dataclasses.dataclass(frozen=True)
class StepInfo:
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


@dataclasses.dataclass(frozen=True)
class NonFinite:
    """A step whose loss or gradient was not finite; its update was not made.

    Attributes:
      step: number of the step.
      leaf: index in tree order of the first such gradient leaf, the number of leaves where only the loss is.
      batch: the step's batch.
    """

    step: int
    leaf: int
    batch: Batch


@dataclasses.dataclass(frozen=True)
class FitResult:
    """How training ended.

    Attributes:
      state: the state after the last step.
      end_reason: one of the run record's.
      position: where the data stand; None if no step was made.
      progress: the run so far.
      nonfinite: the step that was not finite, if that is why it ended.
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
      step: see `jaxdist.step`; donates the state.
      state: the state to start from; must not be used afterwards.
      batches: pairs of a global batch and the data position after it.
      stop: looked at after each step and its hooks, and before the first step of a resumed run.
      hooks: called in order after each step was dispatched.
      progress: what a resumed run goes on from; updated in place.
      stop_requested: called with the step's number after each step; True ends the run as preempted.
      stopwatch: account of the wall time; input, compile and compute are charged here.
      step_times: takes the duration of each step but the first, which compiles.

    Returns:
      The state after the last step, and why it was the last.
    """
    progress = stop_rules.Progress(step=int(state.step)) if progress is None else progress
    stopwatch = Stopwatch() if stopwatch is None else stopwatch
    iterator, position = iter(batches), None
    previous: tuple[int, Batch, jax.Array] | None = None
    account, last_time, seconds_before = "compile", time.monotonic(), progress.seconds
    start_time = last_time

    # A resumed run may have been over already: one step more would not be the run that was never stopped.
    reason = (stop(progress) if progress.step else None) or ""
    while not reason:
        with stopwatch.account("input"):
            item = next(iterator, None)
        if item is None:
            reason = "max_epochs"
            break
        batch, next_position = item
        with stopwatch.account(account):
            state, metrics = step(state, batch)
            bad = _nonfinite(previous)
        if bad:
            return FitResult(state, "nonfinite", position, progress, bad)
        position = next_position
        _advance(progress, position, seconds_before + time.monotonic() - start_time)
        info = StepInfo(progress.step, state, metrics, position, progress)
        for hook in hooks:
            hook(info)
        previous = (progress.step, batch, metrics[NONFINITE_LEAF])
        last_time = _record_time(step_times, last_time, skip=account == "compile")
        account = "compute"
        reason = stop(progress) or ("preempted" if stop_requested(progress.step) else "")

    with stopwatch.account("compute"):
        bad = _nonfinite(previous)
        jax.block_until_ready(state)
    return FitResult(state, "nonfinite" if bad else reason, position, progress, bad)


def _advance(progress: stop_rules.Progress, position: DataPosition, seconds: float) -> None:
    whole = position.position == position.num_examples
    progress.step += 1
    progress.epoch = position.epoch + whole
    progress.examples_seen = position.epoch * position.num_examples + position.position
    progress.seconds = seconds


def _nonfinite(previous: tuple[int, Batch, jax.Array] | None) -> NonFinite | None:
    """Read the flag of a step that was dispatched earlier; this is where the loop keeps pace with the devices."""
    if previous is None:
        return None
    step, batch, flag = previous
    leaf = int(np.asarray(flag.addressable_data(0)))
    return NonFinite(step, leaf, batch) if leaf >= 0 else None


def _record_time(step_times: StepTimes | None, last_time: float, *, skip: bool) -> float:
    now = time.monotonic()
    if step_times is not None and not skip:
        step_times.add(now - last_time)
    return now
