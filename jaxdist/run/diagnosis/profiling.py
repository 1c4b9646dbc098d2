"""A trace of some steps by `jax.profiler`, to be opened in XProf, TensorBoard or Perfetto."""

import contextlib
import pathlib
import re
from types import TracebackType

import jax

from jaxdist.errors import UserError, say
from jaxdist.run.loop import StepInfo
from jaxdist.stop import Stop

FOLDER = "profile"
"""Where traces are written, in the run directory."""


def steps_of(text: str) -> range:
    """Return the steps that `FIRST:LAST` names, both included.

    Raises:
      UserError: it names none.
    """
    match = re.fullmatch(r"(\d+):(\d+)", text)
    steps = range(int(match[1]), int(match[2]) + 1) if match else range(0)
    if not steps or steps[0] < 1:
        raise UserError(
            f"--profile takes the first and the last step to trace, such as 20:25; got {text!r}. Step 1 compiles."
        )
    return steps


def check_reached(steps: range, stop: Stop) -> None:
    """Raise UserError where a run that ends by `stop` makes none of the steps to trace."""
    if stop.max_steps is not None and steps and steps[0] > stop.max_steps:
        raise UserError(
            f"--profile traces steps that the run makes; it ends after {stop.max_steps}, and the first to trace is "
            f"{steps[0]}. Name earlier steps."
        )


class Trace(contextlib.AbstractContextManager["Trace"]):
    """Traces the steps `steps` of a run; as a context manager it ends a trace that is under way.

    A step is traced from the end of the one before, which is waited for, until it is finished itself. Steps in between
    are dispatched as always, so the trace shows how they overlap.
    """

    def __init__(self, steps: range, run_dir: pathlib.Path):
        self._steps, self._folder = steps, run_dir / FOLDER
        self._running, self._done = False, not steps

    def begin(self, step: int) -> None:
        """Start the trace if `step`, which is next, is the first to be traced (or later: a run may resume within)."""
        if step in self._steps and not (self._running or self._done):
            jax.profiler.start_trace(self._folder)
            self._running = True

    def step(self, number: int) -> contextlib.AbstractContextManager[object]:
        """Return the context in which step `number` is dispatched; the trace then knows it by its number."""
        if not self._running:
            return contextlib.nullcontext()
        return jax.profiler.StepTraceAnnotation("step", step_num=number)

    def __call__(self, info: StepInfo) -> None:
        """Hook: start and end the trace at the right steps."""
        if self._done:
            return
        if self._running and info.step >= self._steps[-1]:
            jax.block_until_ready(info.state)
            self._stop()
        elif info.step + 1 == self._steps[0]:
            jax.block_until_ready(info.state)
            self.begin(info.step + 1)

    def _stop(self) -> None:
        jax.profiler.stop_trace()
        self._running, self._done = False, True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._running:
            self._stop()
        elif not self._done and error is None:
            say(f"Nothing was traced: the run made no step of {self._steps[0]} to {self._steps[-1]}.")
