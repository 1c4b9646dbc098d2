"""The hooks of an experiment: when they are called, and what they are given.

What a hook is given is its own to keep: numbers, and copies in the host's memory, made when they are asked for. The
buffers of the state are not among it, since the next step donates them.
"""

import contextlib
import dataclasses
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


class HookError(errors.UserError):
    """A hook of the experiment raised an error; the message names both, and the user's line."""


@dataclasses.dataclass(kw_only=True)
class _Sources:
    """Where a HookInfo takes from what it is asked for; empty once its hook has returned."""

    metrics: Callable[[], Mapping[str, float]] | None
    state: Any
    write: Write | None


class HookInfo:
    """What a hook is given.

    Attributes:
      step: finished steps.
      epoch: finished epochs.
      examples_seen: true examples trained on.
      seconds: of training, over all attempts.
      run_dir: the run directory, for files of the hook's own.
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
        """A copy of the model's state (running means and the like), as NumPy arrays; None where there is none."""
        return self._once("model_state", lambda: _copy(self._state().model_state))

    @property
    def opt_state(self) -> Any:
        """A copy of the optimizer's state, as NumPy arrays."""
        return self._once("opt_state", lambda: _copy(self._state().opt_state))

    def log(self, metrics: Mapping[str, Any]) -> None:
        """Write metrics of the hook's own to the row of this step, by all writers of the experiment.

        An Image, Histogram, Table or Text goes to the writers that take it, TensorBoard for example. Metrics are
        written, and that is all: no stop rule looks at them, since a hook runs on one process.
        """
        for name in metrics:
            if name in _TAKEN or name.startswith(("train/", "eval/")):
                raise ValueError(
                    f"A metric of a hook has a name of its own; {name!r} is one of the run's. Choose another, such as "
                    f"'mine/{name.rpartition('/')[2]}'."
                )
        rich = {name: value for name, value in metrics.items() if isinstance(value, RichValue)}
        numbers = {name: float(value) for name, value in metrics.items() if name not in rich}
        self._open("write")(numbers, rich)

    def close(self) -> None:
        """Let go of the state: what was not read until now cannot be read any more."""
        self._sources = _Sources(metrics=None, state=None, write=None)

    def _once(self, name: str, read: Callable[[], Any]) -> Any:
        if name not in self._read:
            self._read[name] = read()
        return self._read[name]

    def _open(self, name: str) -> Any:
        found = getattr(self._sources, name)
        if found is None:
            raise ValueError(
                f"What was not read of step {self.step} while its hook ran is gone with the next step, and nothing can "
                "be logged to it. Read it in the hook, and keep that."
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
"""In place of the state, where there is none at this point."""


@dataclasses.dataclass(frozen=True)
class UserHooks:
    """The hooks of an experiment on this process.

    Attributes:
      hooks: of the experiment.
      is_first: whether this is process 0; on others, only hooks with `all_processes` are called.
    """

    hooks: Sequence[Any]
    is_first: bool

    def has(self, point: str) -> bool:
        """Return whether any hook is called at `point` on this process."""
        return any(True for _ in self._methods(point))

    def call(self, point: str, make_info: Callable[[], HookInfo]) -> None:
        """Call the hooks at `point`, in the order of the experiment; at `on_step` those that are due.

        Raises:
          HookError: one of them raised.
        """
        for hook, method in self._methods(point):
            with contextlib.closing(make_info()) as info:
                if point == hook_points.ON_STEP and info.step % getattr(hook, "every_steps", 1):
                    continue
                with _naming(hook, point, info.step):
                    method(info)

    def _methods(self, point: str) -> Iterator[tuple[Any, Callable[[HookInfo], None]]]:
        for hook in self.hooks:
            method = hook_points.method(hook, point)
            if method is not None and (self.is_first or getattr(hook, "all_processes", False)):
                yield hook, method


@contextlib.contextmanager
def _naming(hook: Any, point: str, step: int) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise HookError(
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
