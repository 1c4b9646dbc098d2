"""Whether to restart a job that ended, how soon and on how many processes: a pure function of its attempts so far."""

import dataclasses
from collections.abc import Sequence
from typing import Protocol

from jaxdist.errors import ExitStatus

_FINAL_ENDS = ("nonfinite", "faulty_device")
"""Ends that another attempt would only repeat."""
_GOOD_ENDS = ("target_reached", "max_steps", "max_epochs", "max_seconds", "patience")
FIRST_DELAY_SECONDS, LONGEST_DELAY_SECONDS = 1.0, 60.0
"""Pause after a first fruitless attempt, which doubles with each further one, and the longest pause. After an attempt
that made progress the next one begins at once."""


class RestartSettings(Protocol):
    """The settings under `recovery.` that say when to restart a job; see `config.experiment.Recovery`."""

    @property
    def max_fruitless(self) -> int:
        """See Recovery."""

    @property
    def min_processes(self) -> int | None:
        """See Recovery."""

    @property
    def patience_seconds(self) -> float:
        """See Recovery."""

    @property
    def deadline_seconds(self) -> float | None:
        """See Recovery."""

    @property
    def hang_seconds(self) -> float:
        """See Recovery."""

    @property
    def standby(self) -> bool | None:
        """See Recovery."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attempt:
    """How one attempt ended.

    Attributes:
      num_processes: number of processes it ran on.
      exit_status: exit status of the job.
      asked_to_stop: whether a signal or the deadline asked it to stop.
      end_reason: that of the run record; None if the attempt ended without writing one.
      saved_step: the newest step that survives, in memory or on disk.
      available: how many processes the job should have now, if that has changed: some have joined, have left, were
        lost, or were too many for the experiment. None if it has not.
    """

    num_processes: int
    exit_status: int
    asked_to_stop: bool = False
    end_reason: str | None = None
    saved_step: int = 0
    available: int | None = None


@dataclasses.dataclass(frozen=True)
class Restart:
    """Restart the job after a pause, on `num_processes` processes."""

    delay_seconds: float
    num_processes: int


@dataclasses.dataclass(frozen=True)
class End:
    """Do not restart the job; `reason` is empty if there is nothing to explain."""

    exit_status: int
    reason: str = ""


def decide(attempts: Sequence[Attempt], settings: RestartSettings, *, start_step: int = 0) -> Restart | End:
    """Return what to do after the last of `attempts`, all of one job that began with `start_step` steps saved.

    A job is over when it ended well, by its own rules (for example a loss that is not finite), by a user error or on
    request. Everything else, a crash, a kill, a hang, is followed by another attempt as long as attempts make progress.
    """
    last = attempts[-1]
    if last.end_reason in _GOOD_ENDS:  # even if a process was killed after that
        return End(ExitStatus.OK)
    if last.exit_status == ExitStatus.OK or last.asked_to_stop or last.end_reason in _FINAL_ENDS:
        return End(last.exit_status)
    if last.available:
        return Restart(0.0, last.available)
    if last.exit_status == ExitStatus.USER:
        return End(last.exit_status)
    fruitless = num_fruitless(attempts, start_step=start_step)
    if fruitless >= settings.max_fruitless:
        return End(
            last.exit_status,
            f"{fruitless} attempts in a row failed without saving a new step (the newest saved step is "
            f"{last.saved_step}). Fix the cause and continue with --resume.",
        )
    # One that failed may have been killed while it started, which says nothing of the next.
    delay = 0.0 if fruitless < 2 else FIRST_DELAY_SECONDS * 2.0 ** (fruitless - 2)
    processes = _next_processes(last.num_processes, fruitless, settings.min_processes)
    return Restart(min(delay, LONGEST_DELAY_SECONDS), processes)


def num_fruitless(attempts: Sequence[Attempt], *, start_step: int = 0) -> int:
    """Return how many attempts in a row, up to the last, did not raise the newest saved step.

    Those that ended for a change of the number of processes do not count.
    """
    steps = [start_step, *(attempt.saved_step for attempt in attempts if attempt.available is None)]
    count = 0
    for before, after in zip(reversed(steps[:-1]), reversed(steps[1:])):
        if after > before:
            break
        count += 1
    return count


def _next_processes(num_processes: int, fruitless: int, min_processes: int | None) -> int:
    if min_processes is None or fruitless < 2:
        return num_processes
    return max(min_processes, num_processes // 2)
