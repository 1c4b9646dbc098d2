"""What happens every n steps besides training: logging, progress, evaluation, checkpoints, checks.

A hook is a function of StepInfo. None of these decides when training ends: they record, and the stop rules read.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxdist.run.loop import Hook, StepInfo
from jaxdist.run.progress_display import Progress as ProgressDisplay
from jaxdist.run.stopwatch import Stopwatch
from jaxdist.rundir.writers import Writer
from jaxdist.spmd.state import TrainState
from jaxdist.spmd.step import EMPTY_BATCH, NONFINITE_LEAF, Metrics
from jaxdist.stop import Progress


def every(num_steps: int, hook: Hook) -> Hook:
    """Return `hook` called at the steps that are multiples of `num_steps` only."""

    def due(info: StepInfo) -> None:
        if info.step % num_steps == 0:
            hook(info)

    return due


class LogMetrics:
    """Writes the training metrics of every n-th step, and of the first, under `train/`; reads them one step late."""

    def __init__(self, writers: Sequence[Writer], *, every: int, extra: Callable[[int], Mapping[str, float]]):
        self._writers, self._every, self._extra = writers, every, extra
        self._pending: tuple[int, Metrics, Progress] | None = None

    def __call__(self, info: StepInfo) -> None:
        """Write what is pending, and note this step's metrics if they are due."""
        self.flush()
        if info.step == 1 or info.step % self._every == 0:
            self._pending = (info.step, info.metrics, info.progress)

    def flush(self) -> None:
        """Write what is pending; waits for that step."""
        if self._pending is None:
            return
        step, metrics, progress = self._pending
        self._pending = None
        values = fetch(metrics) | dict(self._extra(step))
        named = {f"train/{name}": value for name, value in values.items()}
        progress.metrics.update(named)
        for writer in self._writers:
            writer.write(step, named)


def show_progress(display: ProgressDisplay) -> Hook:
    """Return the hook that keeps a progress display up to date."""

    def show(info: StepInfo) -> None:
        display.update(info.step, info.progress.metrics)

    return show


class Evaluate:
    """Evaluates every n steps, or at the end of every n-th epoch, and writes the result under `eval/`."""

    def __init__(
        self,
        evaluate: Callable[[TrainState], Mapping[str, float]],
        writers: Sequence[Writer],
        stopwatch: Stopwatch,
        *,
        every_steps: int | None = None,
        every_epochs: int = 1,
    ):
        self._evaluate, self._writers, self._stopwatch = evaluate, writers, stopwatch
        self._every_steps, self._every_epochs = every_steps, every_epochs

    def __call__(self, info: StepInfo) -> None:
        """Evaluate if this step is due."""
        if self._due(info):
            self.run(info.state, info.progress)

    def run(self, state: TrainState, progress: Progress) -> None:
        """Evaluate now."""
        with self._stopwatch.account("eval"):
            metrics = {f"eval/{name}": value for name, value in self._evaluate(state).items()}
        progress.record_evaluation(metrics)
        for writer in self._writers:
            writer.write(progress.step, metrics)

    def _due(self, info: StepInfo) -> bool:
        if self._every_steps is not None:
            return info.step % self._every_steps == 0
        at_epoch_end = info.position.position == info.position.num_examples
        return at_epoch_end and info.progress.epoch % self._every_epochs == 0


class Save:
    """Saves a checkpoint every n steps: the state, the data position and the progress."""

    def __init__(
        self,
        save: Callable[[int, TrainState, dict[str, Any], Mapping[str, float]], None],
        stopwatch: Stopwatch,
        *,
        every_steps: int,
        before: Sequence[Callable[[], None]] = (),
        after: Sequence[Callable[[Progress], None]] = (),
    ):
        self._save, self._stopwatch, self._every_steps = save, stopwatch, every_steps
        self._before, self._after = before, after
        self.last_step: int | None = None

    def __call__(self, info: StepInfo) -> None:
        """Save if this step is due and was made.

        Where the loss or gradient was not finite, the loop ends a few steps later; a checkpoint made meanwhile would
        count the lost steps as done. Reading the flag waits for the step, which saving does anyway.
        """
        if info.step % self._every_steps == 0 and int(info.metrics[NONFINITE_LEAF].addressable_data(0)) < 0:
            self.run(info.state, info.position, info.progress)

    def run(self, state: TrainState, position: Any, progress: Progress) -> None:
        """Save now, unless this very step is saved already."""
        if self.last_step == progress.step:
            return
        self.last_step = progress.step
        for action in self._before:
            action()
        with self._stopwatch.account("checkpoint"):
            data_state = {"position": position.to_json(), "progress": progress.to_json()}
            self._save(progress.step, state, data_state, progress.metrics)
        for report in self._after:
            report(progress)


def fetch(metrics: Metrics) -> dict[str, float]:
    """Return a step's metrics as numbers, without the flag that is the loop's own; waits for the step.

    A batch in which nothing counted has no mean of anything: what would be NaN is left out.
    """
    found = jax.device_get({name: value.addressable_data(0) for name, value in metrics.items()})
    empty = found.pop(NONFINITE_LEAF, None) == EMPTY_BATCH
    return {name: float(value) for name, value in found.items() if not (empty and np.isnan(value))}
