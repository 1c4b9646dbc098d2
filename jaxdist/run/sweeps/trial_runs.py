"""The trials of a sweep as runs in this process, one after the other, and what became of each."""

import contextlib
import dataclasses
import gc
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax

from jaxdist import errors
from jaxdist.config.experiment import Experiment
from jaxdist.config.overrides import override
from jaxdist.run import attempt, bookkeeping, components
from jaxdist.run.sweeps import shared_programs, sweep_record
from jaxdist.rundir import record

PREEMPTED = "preempted"


@dataclasses.dataclass(frozen=True)
class TrialOutcome:
    """What became of a trial: how it ended, or why there is no end; see `sweep_record.Trial`."""

    number: int
    end_reason: str | None = None
    refused: str | None = None
    failed: str | None = None


@dataclasses.dataclass(kw_only=True)
class TrialRuns:
    """Trains trials in this process; those that share programs compile them once.

    Attributes:
      experiment: what every trial changes.
      sweep_dir: where the run directories are.
      devices: to train on.
      command: returns the command line that repeats a trial, for its run record.
      source: the experiment's file and the assignments of the command line.
      stop_requested: whether to save and stop after the present step.
    """

    experiment: Experiment
    sweep_dir: pathlib.Path
    devices: Sequence[jax.Device]
    command: Callable[[sweep_record.Trial], str]
    source: bookkeeping.ExperimentSource
    stop_requested: Callable[[], bool]

    def __post_init__(self) -> None:
        self._programs = shared_programs.SharedPrograms()
        self._fingerprint: str | None = None

    def train(self, trial: sweep_record.Trial) -> TrialOutcome:
        """Train a trial, or continue it, until it ends; whatever goes wrong is its outcome."""
        run_dir = self.sweep_dir / trial.name
        begun = (run_dir / record.FILE_NAME).exists()
        try:
            experiment = override(self.experiment, trial.assignments)
            made = attempt.train(experiment, self._options(experiment, trial, run_dir, begun), devices=self.devices)
        except errors.UserError as error:
            if begun:
                return TrialOutcome(trial.number, failed=str(error))
            with contextlib.suppress(OSError):
                run_dir.rmdir()
            return TrialOutcome(trial.number, refused=str(error))
        except Exception as error:  # whatever one trial dies of, the others are worth their time
            return TrialOutcome(trial.number, failed=errors.describe(error))
        finally:
            gc.collect()  # the state of a trial is in cycles, and may fill the device
        return TrialOutcome(trial.number, end_reason=made.end_reason)

    def _options(
        self, experiment: Experiment, trial: sweep_record.Trial, run_dir: pathlib.Path, begun: bool
    ) -> attempt.RunOptions:
        source = dataclasses.replace(self.source, assignments=(*self.source.assignments, *trial.assignments))
        options: dict[str, Any] = {"identity": self._identity(experiment)}
        return attempt.RunOptions(
            run_dir=run_dir,
            resume=begun,
            silent=True,
            command=self.command(trial),
            stop_requested=lambda step: self.stop_requested(),
            source=source,
            put_together=self._programs.put_together,
            **options,
        )

    def _identity(self, experiment: Experiment) -> components.Identity:
        """Return the identity; the fingerprint of the data, which may look at every file, is taken once."""
        if experiment.data is not self.experiment.data:
            with errors.as_user_error():
                return components.identity(experiment)
        if self._fingerprint is None:
            with errors.as_user_error():
                self._fingerprint = components.identity(experiment).data
        return components.identity_of(experiment, self._fingerprint)
