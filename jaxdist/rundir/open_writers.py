"""Writers other than the files of the run directory: experiment trackers, and writers that other packages add.

A package adds one by an entry point of the group `jaxdist.writers`: a function that takes a WrittenRun and returns a
`rundir.writers.Writer`.
"""

import dataclasses
import importlib
import importlib.metadata
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any

from jaxdist import errors
from jaxdist.rundir.rich_values import RichValue
from jaxdist.setting_group import nearest

GROUP = "jaxdist.writers"
KINDS = ("console", "jsonl", "csv", "tensorboard")
"""The console and the files of the run directory; see `writers`."""
TRACKERS = {
    "mlflow": "jaxdist.rundir.trackers.mlflow_tracker",
    "trackio": "jaxdist.rundir.trackers.trackio_tracker",
    "wandb": "jaxdist.rundir.trackers.wandb_tracker",
}
"""The trackers of this package: each is a module with `check()` and `make(run)`, imported when it is used."""
_RETRY_SECONDS = 60.0


@dataclasses.dataclass(frozen=True)
class WrittenRun:
    """The run whose metrics a writer writes.

    Attributes:
      run_dir: the run directory.
      name: name of the experiment.
      config: the experiment as plain data, with secrets hidden.
      resumed_step: the step that the run resumes from; the rows after it are written again. None for a new run.
    """

    run_dir: pathlib.Path
    name: str
    config: Any
    resumed_step: int | None

    def noted(self, file_name: str) -> str | None:
        """Return what a writer of the run that is resumed noted in a file of the run directory; None if nothing."""
        path = self.run_dir / file_name
        return path.read_text().strip() if self.resumed_step is not None and path.exists() else None


def check_name(name: str) -> None:
    """Raise ConfigError if there is no writer `name`; nothing is imported."""
    if name in KINDS or name in TRACKERS:
        return
    names = (*KINDS, *TRACKERS, *_entry_points())
    if name not in names:
        raise errors.ConfigError(
            f"A writer is one of {', '.join(names)}; got {name!r}.{nearest(name, names)} Other packages can add "
            f"writers by entry points of the group {GROUP}."
        )


def check(name: str) -> None:
    """Raise UserError if the writer `name` cannot be used: its package is not installed, or not set up."""
    check_name(name)
    with errors.as_user_error():
        if name in TRACKERS:
            importlib.import_module(TRACKERS[name]).check()
        elif name not in KINDS:
            _entry_points()[name].load()


def make(name: str, run: WrittenRun) -> "Tolerant":
    """Return the writer `name`: a tracker of this package, or one that another package adds.

    Raises:
      UserError: it cannot start, for example because its server cannot be reached.
    """
    check_name(name)
    try:
        maker = importlib.import_module(TRACKERS[name]).make if name in TRACKERS else _entry_points()[name].load()
        return Tolerant(maker(run), name)
    except errors.UserError:
        raise
    except Exception as error:
        raise errors.UserError(f"The writer {name} could not start: {errors.describe(error).rstrip('.')}.") from error


def _entry_points() -> dict[str, importlib.metadata.EntryPoint]:
    return {point.name: point for point in importlib.metadata.entry_points(group=GROUP)}


class Tolerant:
    """A writer whose failures never end the run; the first one is printed.

    After a failure nothing is written for a minute, since each attempt may wait for the network.
    """

    def __init__(self, writer: Any, name: str, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._writer, self._name, self._clock = writer, name, clock
        self._told, self._again_at = False, 0.0
        self.takes_rich_values = hasattr(writer, "write_rich")

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """See Writer."""
        self._try(lambda: self._writer.write(step, metrics))

    def write_rich(self, step: int, values: Mapping[str, RichValue]) -> None:
        """See Writer."""
        self._try(lambda: self._writer.write_rich(step, values))

    def close(self) -> None:
        """See Writer."""
        self._again_at = 0.0
        self._try(self._writer.close)

    def _try(self, call: Callable[[], object]) -> None:
        if self._clock() < self._again_at:
            return
        try:
            call()
        except Exception as error:
            self._again_at = self._clock() + _RETRY_SECONDS
            if not self._told:
                self._told = True
                said = " ".join(f"{type(error).__name__}: {error}".split())
                errors.say(
                    f"The writer {self._name} failed: {said}. The run continues; the rows of this writer are "
                    "incomplete from here on."
                )
