"""The hooks of an experiment: when they are called, and what they are given.

A hook may keep what it is given: numbers, and copies in the host's memory, which are made when the hook asks for them.
It never gets the buffers of the state, since the next step donates them.
"""

import contextlib
import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import numpy as np

from jaxdist import errors
from jaxdist.config import hook_points
from jaxdist.rundir.rich_values import RichValue
from jaxdist.spmd.layout import host_value
from jaxdist.stop import Progress

Write: TypeAlias = Callable[[dict[str, float], dict[str, RichValue]], None]
_TAKEN = ("step", "examples_seen", "seconds")


@dataclasses.dataclass(kw_only=True)
class _Sources:
    """Where a HookInfo reads its values; empty once the hook has returned."""

    metrics: Callable[[], Mapping[str, float]] | None
    state: Any
    write: Write | None


class HookInfo:
    """The argument of a hook.

    Attributes:
      step: number of finished steps.
      epoch: number of finished epochs.
      examples_seen: number of true examples trained on.
      seconds: seconds of training, over all attempts.
      run_dir: the run directory; the hook may write files there.
      end_reason: why the run ended, in `on_end`; None before.
    """

    def __init__(
        self,
        progress: Progress,
        run_dir: pathlib.Path,
        *,
        metrics: Callable[[], Mapping[str, float]],
        state: Any,
        write: Write,
        end_reason: str | None = None,
    ) -> None:
        self.step, self.epoch = progress.step, progress.epoch
        self.examples_seen, self.seconds = progress.examples_seen, progress.seconds
        self.run_dir, self.end_reason = run_dir, end_reason
        self._sources = _Sources(metrics=metrics, state=state, write=write)
        self._read: dict[str, Any] = {}

    def __repr__(self) -> str:
        return f"HookInfo(step={self.step}, epoch={self.epoch}, end_reason={self.end_reason!r})"

    @property
    def metrics(self) -> dict[str, float]:
        """The metrics: in `on_step` those of the step, and reading them waits for it; in `on_evaluation` those of the
        evaluation; else the last value of each.
        """
        return self._once("metrics", lambda: dict(self._open("metrics")()))

    @property
    def params(self) -> Any:
        """A copy of the params, as NumPy arrays."""
        return self._once("params", lambda: _copy(self._state().params))

    @property
    def model_state(self) -> Any:
        """A copy of the model's state, such as running means, as NumPy arrays; None if the model has no state."""
        return self._once("model_state", lambda: _copy(self._state().model_state))

    @property
    def opt_state(self) -> Any:
        """A copy of the optimizer's state, as NumPy arrays."""
        return self._once("opt_state", lambda: _copy(self._state().opt_state))

    def log(self, metrics: Mapping[str, Any]) -> None:
        """Add metrics to the row of this step, with all writers of the experiment.

        An Image, Histogram, Table or Text is passed to the writers that take it, for example TensorBoard. No stop rule
        sees these metrics, since a hook runs on one process.
        """
        for name in metrics:
            if name in _TAKEN or name.startswith(("train/", "eval/")):
                raise ValueError(
                    f"A metric of a hook needs a name that the run does not use; got {name!r}. Choose another, such "
                    f"as 'mine/{name.rpartition('/')[2]}'."
                )
        rich = {name: value for name, value in metrics.items() if isinstance(value, RichValue)}
        numbers = {name: float(value) for name, value in metrics.items() if name not in rich}
        self._open("write")(numbers, rich)

    def close(self) -> None:
        """Release the state: what was not read until now can no longer be read."""
        self._sources = _Sources(metrics=None, state=None, write=None)

    def _once(self, name: str, read: Callable[[], Any]) -> Any:
        if name not in self._read:
            self._read[name] = read()
        return self._read[name]

    def _open(self, name: str) -> Any:
        found = getattr(self._sources, name)
        if found is None:
            raise ValueError(
                f"The values of step {self.step} can be read, and metrics logged, only while its hook runs. Read them "
                "in the hook and keep the result."
            )
        return found

    def _state(self) -> Any:
        state = self._open("state")
        if state is NO_STATE:
            raise ValueError(
                "The params of a step stay on the servers of a parameter-server run. Read them in on_evaluation, "
                "on_checkpoint or on_end."
            )
        return state


NO_STATE = object()
"""Stands for the state at a point where there is none."""


@dataclasses.dataclass(frozen=True)
class UserHooks:
    """The hooks of an experiment on this process.

    Attributes:
      hooks: the hooks of the experiment.
      is_first: whether this is process 0; on other processes, only hooks with `all_processes` are called.
    """

    hooks: Sequence[Any]
    is_first: bool

    def has(self, point: str) -> bool:
        """Return whether any hook is called at `point` on this process."""
        return bool(self._methods[point])

    def call(self, point: str, make_info: Callable[[], HookInfo]) -> None:
        """Call the hooks at `point`, in the order of the experiment; at `on_step`, those whose interval has passed.

        Raises:
          UserError: one of them raised an error; the message names it, the error and the line.
        """
        for hook, method in self._methods[point]:
            with contextlib.closing(make_info()) as info:
                if point == hook_points.ON_STEP and info.step % getattr(hook, "every_steps", 1):
                    continue
                with _naming(hook, point, info.step):
                    method(info)

    @functools.cached_property
    def _methods(self) -> dict[str, list[tuple[Any, Callable[[HookInfo], None]]]]:
        """The hooks that are called at each point on this process, with their methods."""
        called = [hook for hook in self.hooks if self.is_first or getattr(hook, "all_processes", False)]
        found = {point: [(hook, hook_points.method(hook, point)) for hook in called] for point in hook_points.POINTS}
        return {point: [(hook, each) for hook, each in pairs if each is not None] for point, pairs in found.items()}


@contextlib.contextmanager
def _naming(hook: Any, point: str, step: int) -> Iterator[None]:
    try:
        yield
    except (Exception, SystemExit, KeyboardInterrupt) as error:  # Ctrl-C itself has a handler that raises nothing
        raise errors.UserError(
            f"The hook {errors.named(hook)} failed in {point} after step {step}: {errors.describe(error)}. Repair it "
            "or remove it from Experiment.hooks."
        ) from error


def _copy(tree: Any) -> Any:
    """Return `tree` with NumPy arrays of its own."""
    return jax.tree.map(_copied, tree)


def _copied(leaf: Any) -> np.ndarray:
    value = host_value(leaf)
    if value is None:
        raise ValueError(
            "This strategy shards the state over processes, and a hook sees only what this process holds. Read the "
            "state from the checkpoint, after the run or in another process: jaxdist.load(run_dir)."
        )
    return np.array(value)  # a copy, because on CPU the next step overwrites the buffer that NumPy would share
