"""One job on several hosts without an engine: on each, the same command supervises that host's processes.

The supervisors do not talk to each other. When the job fails, it fails on all hosts (a process that has lost its peers
in a collective, or to the watchdog, ends), and on each the processes are started again and wait for the others at the
coordinator. A restart continues from the newest checkpoint, so the run directory must be on a file system they share.
"""

import dataclasses
import pathlib
import shlex
from collections.abc import Callable, Sequence

from jaxdist.errors import ExitStatus, UserError
from jaxdist.launch.joining import places
from jaxdist.launch.supervising import board, local_job, restart_events, restart_policy, supervisor
from jaxdist.rundir import lock, record


@dataclasses.dataclass(frozen=True, kw_only=True)
class Host:
    """One of the hosts of a job.

    Attributes:
      index: its number; process 0 runs on host 0.
      count: how many hosts there are.
      coordinator: HOST:PORT of host 0, the same on all.
      num_processes: on each host.
    """

    index: int
    count: int
    coordinator: str
    num_processes: int

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise UserError(f"--host-index counts the hosts from 0; got {self.index} of {self.count}.")

    def environment(self) -> dict[str, str]:
        """Return the environment variables that give the processes of this host their place among all processes."""
        return {
            places.MEETING: self.coordinator,
            places.FIRST: str(self.index * self.num_processes),
            places.ALL: str(self.count * self.num_processes),
        }


def run(
    host: Host,
    command: Sequence[str],
    *,
    run_dir: pathlib.Path,
    saved_step: Callable[[], int],
    settings: restart_policy.RestartSettings,
) -> int:
    """Run this host's part of the job to its end, through its failures; return its exit status.

    Args:
      host: which one this is.
      command: the program and its arguments; it must be able to continue an existing run.
      run_dir: of the run, on a file system that all hosts share.
      saved_step: returns the newest step with a checkpoint.
      settings: when to restart; without `min_processes`, because all hosts would have to agree on fewer.

    Raises:
      LockedError: another job works in the run directory.
    """
    place = run_dir if host.index == 0 else run_dir / f"host-{host.index}"
    with lock.locked(place, purpose=shlex.join(command)), local_job.Signals() as signals:
        attempts = _Attempts(host, command, run_dir, restart_events.Events(place), signals, saved_step)
        return supervisor.supervise(
            attempts.make,
            num_processes=host.num_processes,
            settings=settings,
            say=restart_events.say,
            start_step=saved_step(),
            stopped=attempts.stopped,
        )


@dataclasses.dataclass(frozen=True)
class _Attempts:
    """Makes the attempts of one host."""

    host: Host
    command: Sequence[str]
    run_dir: pathlib.Path
    events: restart_events.Events
    signals: local_job.Signals
    saved_step: Callable[[], int]

    def stopped(self) -> bool:
        """Return whether a signal came."""
        return bool(self.signals.received)

    def make(self, number: int, num_processes: int) -> restart_policy.Attempt:
        """Run this host's processes once, to their end."""
        verdicts = self.run_dir / supervisor.BOARD_NAME
        earlier = board.mark(verdicts)
        logs = self.run_dir / "logs" / f"host-{self.host.index}" / f"attempt-{number}"
        group = local_job.ProcessGroup(logs, show_first=self.host.index == 0)
        result = local_job.run_group(
            group,
            lambda: group.start(self.command, num_processes * [local_job.start], self.host.environment()),
            started=lambda ids: self.events.note("start", attempt=number, process_ids=ids),
            signals=self.signals,
        )
        verdict = board.published(verdicts, earlier=earlier)
        if verdict and self.host.index == 0:
            restart_events.say(f"{verdict['text']}\nEach process's stacks are in its log in {self.run_dir / 'logs'}.")
        elif result.failed_process is not None and result.message:
            restart_events.say(
                f"Process {result.failed_process} of host {self.host.index} failed first:\n{result.message}"
            )
        reason = _end_reason(self.run_dir)
        self.events.note("end", attempt=number, status=result.exit_status, end_reason=reason)
        return restart_policy.Attempt(
            num_processes=num_processes,
            exit_status=_exit_status(result),
            # Whichever host was asked to stop, the job has stopped on all.
            asked_to_stop=result.asked_to_stop or reason == "preempted",
            end_reason=reason,
            saved_step=self.saved_step(),
        )


def _exit_status(result: local_job.JobResult) -> int:
    """Return the status of this host's part; if it was asked to stop ExitStatus.RETRY, however its processes ended."""
    ended = not result.asked_to_stop or result.exit_status in (ExitStatus.OK, ExitStatus.USER)
    return result.exit_status if ended else ExitStatus.RETRY


def _end_reason(run_dir: pathlib.Path) -> str | None:
    """Return how the run ended, None while it runs: each attempt begins by writing None."""
    return supervisor.end_reason_of(run_dir) if (run_dir / record.FILE_NAME).exists() else None
