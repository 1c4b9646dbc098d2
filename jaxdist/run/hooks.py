"""What happens every n steps besides training: logging, progress, evaluation, checkpoints, checks.

A hook is a function of StepInfo. None of these decides when training ends: they record, and the stop rules read.
"""

from collections.abc import Callable

import numpy as np

from jaxdist.guards import nonfinite
from jaxdist.run.bookkeeping import Bookkeeper, stamp
from jaxdist.run.loop import Hook, StepInfo
from jaxdist.spmd.step import EMPTY_BATCH, NONFINITE_LEAF, STEP_HASHES, Metrics


def every(num_steps: int, hook: Hook) -> Hook:
    """Return `hook` called at the steps that are multiples of `num_steps` only."""

    def due(info: StepInfo) -> None:
        if info.step % num_steps == 0:
            hook(info)

    return due


class LogMetrics:
    """Writes the training metrics of every n-th step, and of the first; reads them one step later."""

    def __init__(self, books: Bookkeeper) -> None:
        self._books = books
        self._pending: tuple[int, Metrics, dict[str, float]] | None = None

    def __call__(self, info: StepInfo) -> None:
        """Write what is pending, and note this step's metrics if they are due."""
        self.flush()
        if self._books.logs(info.step):
            self._pending = (info.step, info.metrics, stamp(info.progress))

    def flush(self) -> None:
        """Write what is pending; waits for that step."""
        if self._pending is None:
            return
        (step, metrics, stamped), self._pending = self._pending, None
        self._books.log(step, fetch(metrics), stamped)


def show_progress(books: Bookkeeper) -> Hook:
    """Return the hook that keeps the display up to date."""
    return lambda info: books.display.update(info.step, info.progress.metrics, epoch=info.progress.epoch)


def evaluate_when_due(books: Bookkeeper) -> Hook:
    """Return the hook that evaluates when the experiment says so."""

    def evaluate(info: StepInfo) -> None:
        if books.evaluations.due() and _was_made(info):
            books.evaluate(info.state)

    return evaluate


def save_when_due(books: Bookkeeper, *, agreed: Callable[[float], float]) -> Hook:
    """Return the hook that saves a checkpoint when it is time, or the state is the best so far.

    Where finite gradients became params that are not finite, none is saved; the next step tells.

    `agreed` makes one number of what the processes see; see `agreement.Agreement.number`.
    """

    def save(info: StepInfo) -> None:
        affordable = bool(agreed(float(books.may_save())))
        due = (books.saves.due() and affordable) or books.unsaved_best
        if due and _was_made(info) and not nonfinite.leaves_with_nan(info.state.params):
            books.save(info.state, info.position)

    return save


def _was_made(info: StepInfo) -> bool:
    """Return whether the loss and gradient of a step, and of those before it, were finite; waits for the step.

    Where one was not, the loop ends a few steps later; evaluations and checkpoints in between would count steps
    that were not taken.
    """
    return int(info.metrics[NONFINITE_LEAF].addressable_data(0)) < 0


def fetch(metrics: Metrics) -> dict[str, float]:
    """Return a step's metrics as numbers, without the loop's own flag and the hashes; waits for the step.

    A batch in which no example counts has no means: values that would be NaN are left out.
    """
    # One by one: jax.device_get first asks each to be copied, which takes five times as long as copying scalars.
    found = {name: np.asarray(value.addressable_data(0)) for name, value in metrics.items() if name != STEP_HASHES}
    empty = found.pop(NONFINITE_LEAF, None) == EMPTY_BATCH
    return {name: float(value) for name, value in found.items() if not (empty and np.isnan(value))}
