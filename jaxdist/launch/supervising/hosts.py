"""One job on several hosts without an engine: on each, the same command supervises that host's processes.

When the job fails, it fails on all hosts: the supervisors tell each other, and see when one of them is gone. Those that
are left agree on who takes part in the next attempt (`taking_part`), and continue from the snapshots in their memory.
Each keeps those of the host before it, too, so a host that is lost takes none along (`neighbours`). A host that comes
back is taken in at the end of a step. The run directory must be on a file system that all hosts share.
"""

import contextlib
import dataclasses
import os
import pathlib
import shlex
import shutil
import signal
import socket
import threading
from collections.abc import Callable, Sequence

from jaxdist.errors import ExitStatus, UserError, say
from jaxdist.launch.joining import coordinator, places
from jaxdist.launch.supervising import board, job_memory, local_job, restart_events, restart_policy, supervisor
from jaxdist.launch.supervising.several_hosts import neighbours, taking_part
from jaxdist.rundir import lock, record

NEIGHBOUR, FOLDER = "JAXDIST_NEIGHBOUR", "JAXDIST_HOSTS"
"""Environment variables: HOST:PORT of the supervisor that keeps copies of this host's snapshots, and the folder with
the secret of the job."""
_NEWCOMER_SECONDS = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Host:
    """One of the hosts of a job.

    Attributes:
      index: its number; process 0 runs on host 0 at first.
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

    def environment(self, members: taking_part.Members) -> dict[str, str]:
        """Return the environment variables that give the processes of this host their place among all processes."""
        neighbour = members.next_to(self.index)
        return {
            places.MEETING: members.coordinator,
            places.FIRST: str(list(members.hosts).index(self.index) * self.num_processes),
            places.ALL: str(len(members.hosts) * self.num_processes),
            **({} if neighbour is None else {NEIGHBOUR: neighbour}),
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Saved:
    """What is saved of a run.

    Attributes:
      identity: names the experiment in its snapshots.
      newest_step: returns the newest step, given the directory in memory.
      save: see `supervisor.Job`.
    """

    identity: str
    newest_step: Callable[[pathlib.Path], int]
    save: Callable[[pathlib.Path, str], int | None] = lambda memory, end_reason: None


def run(
    host: Host, command: Sequence[str], *, run_dir: pathlib.Path, saved: Saved, settings: restart_policy.RestartSettings
) -> int:
    """Run this host's part of the job to its end, through its failures; return its exit status.

    `command` must be able to continue an existing run, in a directory on a file system that all hosts share. `settings`
    are without `min_processes`, since each host always has as many.

    Raises:
      LockedError: another job works in the run directory.
    """
    with contextlib.ExitStack() as stack:
        place = run_dir if host.index == 0 else run_dir / f"host-{host.index}"
        place.mkdir(parents=True, exist_ok=True)
        if host.index:
            stack.enter_context(lock.locked(place, purpose=shlex.join(command)))
        signals = stack.enter_context(local_job.Signals())
        memory = stack.enter_context(job_memory.memory_directory(run_dir))
        stack.callback(shutil.rmtree, memory, ignore_errors=True)
        _adopt(run_dir, memory)
        attempts = _Attempts(host, command, run_dir, memory, signals, saved, settings, place, stack)
        return attempts.run()


def _adopt(run_dir: pathlib.Path, memory: pathlib.Path) -> None:
    """Move the snapshots that this host's part of the run left behind when it was killed into `memory`."""
    for left in job_memory.left_behind(run_dir):
        for path in left.glob("*.snapshot") if (run_dir / record.FILE_NAME).exists() else ():
            path.rename(memory / path.name)
        shutil.rmtree(left, ignore_errors=True)


class _Attempts:
    """Makes the attempts of one host."""

    def __init__(
        self,
        host: Host,
        command: Sequence[str],
        run_dir: pathlib.Path,
        memory: pathlib.Path,
        signals: local_job.Signals,
        saved: Saved,
        settings: restart_policy.RestartSettings,
        place: pathlib.Path,
        stack: contextlib.ExitStack,
    ):
        self._host, self._command, self._run_dir, self._memory = host, command, run_dir, memory
        self._signals, self._saved, self._settings = signals, saved, settings
        self._events = restart_events.Events(place)
        self._lock = threading.Lock()
        self._process_ids: Sequence[int] = ()
        folder = run_dir / neighbours.FOLDER_NAME
        self._key = neighbours.secret(folder)
        address = coordinator.own_address(host.coordinator)
        self._keeper = stack.enter_context(
            neighbours.CopyKeeper(
                memory, self._key, address, is_running=lambda: bool(self._process_ids), ended=self._end
            )
        )
        self._assembly = taking_part.Assembly(
            run_dir, host.index, host.count, self._keeper.address, self._key, self._meeting, stack
        )
        self._assembly.begin()
        neighbours.announce(folder, host.index, self._keeper.address)

    def run(self) -> int:
        """Make attempts until the job is over; return the exit status."""
        status: int = ExitStatus.FAILED
        try:
            status = supervisor.supervise(
                self.make,
                num_processes=self._host.num_processes,
                settings=self._settings,
                say=say,
                start_step=self._saved.newest_step(self._memory),
                stopped=self._is_stopped,
            )
        finally:
            if status in (ExitStatus.OK, ExitStatus.RETRY):
                self._keeper.say_over()
            if self._assembly.decides:
                self._save()
        return status

    def make(self, number: int, num_processes: int) -> restart_policy.Attempt:
        """Run this host's processes once, to their end."""
        before = self._assembly.members
        members = self._assembly.next(
            patience_seconds=self._settings.patience_seconds,
            first_seconds=coordinator.connect_seconds(),
            stopped=lambda: self._is_stopped() or self._is_over(),
        )
        if members is None:
            return self._without_members(num_processes)
        if before is not None and set(members.hosts) != set(before.hosts):
            say(f"The job continues on hosts {', '.join(map(str, sorted(members.hosts)))}.")
        neighbours.gather(self._memory, self._saved.identity, members.others(self._host.index), self._key)
        self._keeper.forget_order()
        (self._memory / restart_events.CHANGE_NAME).unlink(missing_ok=True)
        result = self._run(number, members)
        reason, saved = _end_reason(self._run_dir), self._saved.newest_step(self._memory)
        self._events.note("end", attempt=number, status=result.exit_status, end_reason=reason, saved=saved)
        changed = (self._memory / restart_events.CHANGE_NAME).exists()
        return restart_policy.Attempt(
            num_processes=num_processes,
            exit_status=_exit_status(result),
            # Whichever host was asked to stop, the job has stopped on all.
            asked_to_stop=result.asked_to_stop or reason == "preempted",
            end_reason=reason,
            saved_step=saved,
            available=num_processes if changed and not result.asked_to_stop else None,
        )

    def _run(self, number: int, members: taking_part.Members) -> local_job.JobResult:
        verdicts = self._run_dir / supervisor.BOARD_NAME
        earlier = board.mark(verdicts)
        first = next(iter(members.hosts)) == self._host.index
        logs = self._run_dir / "logs" / f"host-{self._host.index}" / f"attempt-{number}"
        group = local_job.ProcessGroup(logs, show_first=first, grace_seconds=0.0)
        environment = self._host.environment(members)
        environment |= {supervisor.MEMORY: str(self._memory), FOLDER: str(self._run_dir / neighbours.FOLDER_NAME)}
        over = threading.Event()

        def started(process_ids: Sequence[int]) -> None:
            self._events.note("start", attempt=number, process_ids=process_ids, hosts=list(members.hosts))
            with self._lock:
                self._process_ids = process_ids
            for address in members.others(self._host.index):
                neighbours.watch(address, self._key, lambda: self._end(members.term))
            if first:
                threading.Thread(target=self._await_newcomers, args=(over,), daemon=True).start()

        try:
            result = local_job.run_group(
                group,
                lambda: group.start(self._command, self._host.num_processes * [local_job.start], environment),
                started=started,
                signals=self._signals,
            )
        finally:
            over.set()
            with self._lock:
                self._process_ids = ()
        verdict = board.published(verdicts, earlier=earlier)
        if verdict and first:
            say(f"{verdict['text']}\nEach process's stacks are in its log in {self._run_dir / 'logs'}.")
        elif result.failed_process is not None and result.message:
            say(f"Process {result.failed_process} of host {self._host.index} failed first:\n{result.message}")
        return result

    def _end(self, term: int) -> None:
        """End this host's processes of an attempt that has ended elsewhere; alone they would wait for the others."""
        with self._lock:
            if term == self._assembly.term:
                for process_id in self._process_ids:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(process_id, signal.SIGKILL)

    def _await_newcomers(self, over: threading.Event) -> None:
        """Have the attempt end at its next step when a host has come that does not take part."""
        while not over.wait(_NEWCOMER_SECONDS):
            if self._assembly.newcomers():
                (self._memory / restart_events.CHANGE_NAME).touch()

    def _without_members(self, num_processes: int) -> restart_policy.Attempt:
        """Return the attempt of a host that was not needed: it was stopped, or the job ended, or some never came."""
        reason = _end_reason(self._run_dir) if not self._is_stopped() and self._is_over() else None
        if not self._is_stopped() and reason is None:
            say(
                f"Not all {self._host.count} hosts have come within {coordinator.connect_seconds():g} s. Start the "
                "command on each of them."
            )
        return restart_policy.Attempt(
            num_processes=num_processes, exit_status=ExitStatus.RETRY, asked_to_stop=True, end_reason=reason
        )

    def _is_stopped(self) -> bool:
        return bool(self._signals.received)

    def _is_over(self) -> bool:
        """Return whether the others have ended the job while this host waited."""
        over = not self._assembly.decides and not lock.is_locked(self._run_dir)
        return over and _end_reason(self._run_dir) is not None

    def _meeting(self) -> str:
        """Return where the processes meet on this host; the address that the user named, on host 0."""
        if self._host.index == 0:
            return self._host.coordinator
        host = coordinator.own_address(self._host.coordinator)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.socket(family) as free:
            free.bind((host, 0))
            port = free.getsockname()[1]
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    def _save(self) -> None:
        try:
            step = self._saved.save(self._memory, "preempted" if self._is_stopped() else "error")
        except Exception as error:  # after any error the rest of the end must happen
            say(f"The newest state in memory could not be saved: {error}")
            return
        if step:
            say(f"Step {step} was saved from memory, as a checkpoint.")


def _exit_status(result: local_job.JobResult) -> int:
    """Return the status of this host's part; if it was asked to stop ExitStatus.RETRY, however its processes ended."""
    ended = not result.asked_to_stop or result.exit_status in (ExitStatus.OK, ExitStatus.USER)
    return result.exit_status if ended else ExitStatus.RETRY


def _end_reason(run_dir: pathlib.Path) -> str | None:
    """Return how the run ended, None while it runs: each attempt begins by writing None."""
    return supervisor.end_reason_of(run_dir) if (run_dir / record.FILE_NAME).exists() else None
