"""Which trial of a sweep is next, and what is kept of those that ended. No process is started here."""

import contextlib
import pathlib
import shutil
from collections.abc import Callable

from jaxdist.errors import ExitStatus, say
from jaxdist.run.sweeps import optuna_proposals, ranking, sweep_record, trial_runs
from jaxdist.rundir import lock
from jaxdist.rundir.writers import format_number

LOGS = "logs"
"""Folder of a sweep's directory with what its processes print."""


class Conductor:
    """Gives out the trials of a sweep that are left, and records what became of each.

    `proposals` are asked for trials that the sweep does not plan beforehand; None for a sweep that does.
    """

    def __init__(
        self,
        sweep: sweep_record.Sweep,
        sweep_dir: pathlib.Path,
        proposals: optuna_proposals.OptunaProposals | None = None,
    ) -> None:
        self.sweep, self.sweep_dir, self._proposals = sweep, sweep_dir, proposals
        self._given: set[int] = set()
        for trial in sweep.trials:
            if sweep_record.is_over(sweep_dir, trial):
                self._given.add(trial.number)
                self._tell(trial)
        self.num_finished_before = len(self._given)
        sweep.write(sweep_dir)

    def beginning(self) -> str:
        """Return what is about to happen, in a line."""
        sweep, done = self.sweep, self.num_finished_before
        ended = f", {done} of them ended earlier" if done else ""
        return f"{sweep.num_trials} trials in {self.sweep_dir}{ended}; ranked by {sweep.metric} ({sweep.mode})"

    def num_left(self) -> int:
        """Return how many trials have not ended."""
        over = sum(sweep_record.is_over(self.sweep_dir, trial) or bool(trial.failed) for trial in self.sweep.trials)
        return self.sweep.num_trials - over

    def when_nothing_works(self) -> ExitStatus:
        """Return the exit status of a sweep without a trial that works; one in which all were refused leaves nothing.

        Then no trial began, and the mistake is that of the command line or of the experiment.
        """
        if not all(trial.refused for trial in self.sweep.trials):
            return ExitStatus.FAILED
        shutil.rmtree(self.sweep_dir / LOGS, ignore_errors=True)
        for name in (sweep_record.FILE_NAME, lock.FILE_NAME):
            (self.sweep_dir / name).unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.sweep_dir.rmdir()
        return ExitStatus.USER

    def next(self) -> sweep_record.Trial | None:
        """Return a trial to run now, or None when there is none."""
        for trial in self.sweep.trials:
            if trial.number not in self._given:
                self._given.add(trial.number)
                trial.failed = None
                return trial
        if self._proposals is None or len(self.sweep.trials) >= self.sweep.num_trials:
            return None
        trial = sweep_record.Trial.make(len(self.sweep.trials), self._proposals.propose())
        self.sweep.trials.append(trial)
        self._given.add(trial.number)
        self.sweep.write(self.sweep_dir)
        return trial

    def note(self, outcome: trial_runs.TrialOutcome) -> None:
        """Record what became of a trial, and show it in a line on standard error."""
        trial = self.sweep.trials[outcome.number]
        trial.refused, trial.failed = outcome.refused, outcome.failed
        self.sweep.write(self.sweep_dir)
        self._tell(trial)
        say(self._line(trial, outcome))

    def _tell(self, trial: sweep_record.Trial) -> None:
        if self._proposals is not None:
            found = ranking.ranked(self.sweep_dir, self.sweep, trial)
            self._proposals.tell(trial.settings, found.value if found.works else None)

    def _line(self, trial: sweep_record.Trial, outcome: trial_runs.TrialOutcome) -> str:
        heads = ranking.columns(self.sweep)
        named = " ".join(f"{heads[path]}={value}" for path, value in trial.settings.items())
        start = f"trial {trial.number}, {trial.number + 1} of {self.sweep.num_trials}, {named}:"
        if outcome.refused or outcome.failed:
            return f"{start} {'refused' if outcome.refused else 'failed'}. {outcome.refused or outcome.failed}"
        found = ranking.ranked(self.sweep_dir, self.sweep, trial)
        value = "no value" if found.value is None else f"{format_number(found.value)} at step {found.step}"
        return f"{start} {self.sweep.metric} {value}, {outcome.end_reason}, {found.seconds:.1f} s"


def run_here(
    conductor: Conductor, train: Callable[[sweep_record.Trial], trial_runs.TrialOutcome], stopped: Callable[[], bool]
) -> None:
    """Run the trials that are left one after the other, until `stopped`."""
    while not stopped() and (trial := conductor.next()) is not None:
        conductor.note(train(trial))
