"""The supervisor: starts a job, and restarts it when it fails, from the newest state that survived.

It outlives every process of the job, so it holds what must outlive them: the lock of the run directory, and a directory
in memory with the snapshots and the reports of the processes (`job_memory`). Whether to restart after a failure, how
soon and on how many processes is a pure function of the attempts so far (`restart_policy`).
"""

import contextlib
import dataclasses
import math
import os
import pathlib
import shlex
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence

from jaxdist.errors import ExitStatus, say
from jaxdist.launch.supervising import board, job_memory, joined, local_job, roster
from jaxdist.launch.supervising import stopped as stopped_processes
from jaxdist.launch.supervising.restart_events import REACHED, Events, Standstill
from jaxdist.launch.supervising.restart_policy import Attempt, End, RestartSettings, decide
from jaxdist.launch.supervising.standby import reserve, standby_job
from jaxdist.rundir import lock, record

MEMORY = "JAXDIST_MEMORY"
"""Environment variable: the directory in memory for snapshots and reports."""
FAILED_AT = "JAXDIST_FAILED_AT"
"""Environment variable: when the attempt before failed, by the machine's monotonic clock."""

DEADLINE = "JAXDIST_DEADLINE"
"""Environment variable: when the job must stop, by the monotonic clock."""

BOARD_NAME = "board"
"""The folder of the board in the run directory, if the job has no directory in memory."""
_LOOK_SECONDS = 0.1
_STOPPED_LOOK_SECONDS = 0.5
STOPPED_MARGIN_SECONDS = 5.0
"""A process that is stopped (SIGSTOP) for this much longer than `hang_seconds` is killed: the other processes notice it
first, and say more about it than the supervisor can."""


def supervise(
    attempt: Callable[[int, int], Attempt],
    *,
    num_processes: int,
    settings: RestartSettings,
    say: Callable[[str], None],
    start_step: int = 0,
    stopped: Callable[[], bool] = lambda: False,
) -> int:
    """Make attempts until `decide` ends it; return the exit status.

    `attempt(number, num_processes)` runs one to its end; the first number is 0. `start_step` is the newest saved step
    before it. Once `stopped()` is true, no further attempt is made.
    """
    attempts: list[Attempt] = []
    while True:
        attempts.append(attempt(len(attempts), num_processes))
        decision = decide(attempts, settings, start_step=start_step)
        if isinstance(decision, End):
            if decision.reason:
                say(decision.reason)
            return decision.exit_status
        last, processes = attempts[-1], decision.num_processes
        others = f" on {processes} processes instead of {num_processes}" if processes != num_processes else ""
        pause = f" in {decision.delay_seconds:g} s" if decision.delay_seconds else ""
        ended = "The job" if last.available else f"The job ended with status {last.exit_status}; it"
        say(f"{ended} continues from step {last.saved_step}{others}{pause}.")
        num_processes = processes
        _sleep(decision.delay_seconds, stopped)
        if stopped():
            return ExitStatus.RETRY


def _sleep(seconds: float, stopped: Callable[[], bool]) -> None:
    """Sleep, but no longer than until `stopped`: a signal's handler does not end time.sleep."""
    end = time.monotonic() + seconds
    while not stopped() and (left := end - time.monotonic()) > 0:
        time.sleep(min(left, _LOOK_SECONDS))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """What is supervised.

    Attributes:
      command: the program and its arguments; `--resume` is added from the second attempt on.
      run_dir: run directory; must not be in use by another job.
      saved_step: returns the newest step that survives, given the directory in memory.
      show_first: process 0 writes to the terminal; otherwise all processes log to files.
      start: starts a process.
      save: `save(memory, end_reason)` makes a checkpoint of the newest snapshot in memory, if it is newer than all
        checkpoints, and returns its step, None otherwise.
      save_left: whether to save what an earlier job of the run directory, killed with its fork server, left in memory.
      begin: called before the first attempt, once what an earlier job left was saved.
      preload: called once with the file that names the modules which process 0 has imported.
      at_kill: called with the directory in memory, to have it saved and removed if this process is killed.
    """

    command: Sequence[str]
    run_dir: pathlib.Path
    saved_step: Callable[[pathlib.Path], int]
    show_first: bool = True
    start: local_job.Start = local_job.start
    save: Callable[[pathlib.Path, str], int | None] = lambda memory, end_reason: None
    save_left: bool = True
    preload: Callable[[pathlib.Path], object] = lambda names: None
    at_kill: Callable[[pathlib.Path], object] = lambda memory: None
    begin: Callable[[], object] = lambda: None


def run(job: Job, *, num_processes: int, settings: RestartSettings) -> int:
    """Run a job to its end, through its failures; return its exit status.

    Raises:
      LockedError: another job works in the run directory.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(lock.locked(job.run_dir, purpose=shlex.join(job.command)))
        signals = stack.enter_context(local_job.Signals())
        for memory in job_memory.left_behind(job.run_dir) if job.save_left else ():
            _save(job, memory, "error")
        job.begin()
        memory = stack.enter_context(_memory(job.run_dir))
        job.at_kill(memory)
        attempts = _Attempts(job, settings, memory, signals, num_processes)
        stack.enter_context(attempts.reserve)
        stack.enter_context(joined.Reception(memory, attempts.roster, job.command[3:]))
        start_step = job.saved_step(memory)
        if start_step:
            say(f"The run continues from the checkpoint of step {start_step}.")
        status: int = ExitStatus.FAILED
        try:
            status = supervise(
                attempts.make,
                num_processes=num_processes,
                settings=settings,
                say=say,
                start_step=start_step,
                stopped=attempts.stopped,
            )
        finally:
            attempts.record.restore()
            saved = _save(job, memory, "preempted" if attempts.stopped() else "error")
        return ExitStatus.FAILED if status == ExitStatus.OK and not saved else status


@contextlib.contextmanager
def _memory(run_dir: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yield a directory in memory, or the board of the run directory if there can be none."""
    with contextlib.ExitStack() as stack:
        try:
            directory = stack.enter_context(job_memory.memory_directory(run_dir))
        except OSError as error:
            say(
                f"No directory could be made in {job_memory.MEMORY_ROOT}: {error.strerror}. The run takes no snapshots."
            )
            directory = run_dir / BOARD_NAME
        yield directory


def _save(job: Job, memory: pathlib.Path, end_reason: str) -> bool:
    """Save what is newer than the checkpoints, and remove the directory in memory; if that fails it stays.

    Returns whether nothing is left to be saved.
    """
    try:
        step = job.save(memory, end_reason)
    except Exception as error:  # after any error the state must stay
        say(f"The newest state could not be saved and stays in {memory}: {error} It is saved when the run is resumed.")
        return False
    if step:
        say(f"Step {step} was saved from memory, as a checkpoint.")
    shutil.rmtree(memory, ignore_errors=True)
    return True


class _Attempts:
    """Makes the attempts of one job.

    Attributes:
      roster: the processes that take part, of which the supervisor's own are `num_processes` at first.
      reserve: the processes of the next attempt.
      record: the run record, kept.
    """

    def __init__(
        self,
        job: Job,
        settings: RestartSettings,
        memory: pathlib.Path,
        signals: local_job.Signals,
        num_processes: int,
    ):
        self._job, self._memory, self._signals = job, memory, signals
        self._stopped_seconds = settings.hang_seconds + STOPPED_MARGIN_SECONDS
        self._patience_seconds = settings.patience_seconds
        self._events = Events(job.run_dir)
        self.record = _KeptRecord(job.run_dir)
        self._standstill = Standstill(memory)
        self._preloaded = False
        self.roster = roster.Roster(num_processes, job.start, lambda: self.reserve.change())
        sparing = settings.standby is None
        self.reserve = reserve.Reserve(memory, self.roster, self._prepare, self._standstill.ask, sparing=sparing)
        limit = settings.deadline_seconds
        self._deadline = math.inf if limit is None else time.monotonic() + limit

    def stopped(self) -> bool:
        """Return whether a signal came or the deadline has passed."""
        return bool(self._signals.received) or time.monotonic() >= self._deadline

    def make(self, number: int, num_processes: int) -> Attempt:
        """Run the job once, to its end."""
        job, events = self._job, self._events
        board.clear(self._memory)
        if number:
            self.record.restore()
        before = _changed_at(job.run_dir)
        log_dir = self._log_dir(number)
        self._standstill.withdraw()
        starters = self.roster.begin(num_processes)
        num_processes = len(starters)  # some may have left in the meantime
        result = self._run(number, starters)
        self._standstill.note_end(num_processes)
        if verdict := board.published(self._memory):
            say(f"{verdict['text']}\nEach process's stacks are in its log in {log_dir}.")
        elif result.failed_process is not None and result.message:
            say(f"Process {result.failed_process} failed first. Its log in {log_dir} ends so:\n{result.message}")
        end_reason = end_reason_of(job.run_dir) if _changed_at(job.run_dir) != before else None
        made = Attempt(
            num_processes=num_processes,
            exit_status=self._exit_status(result.exit_status, end_reason),
            asked_to_stop=self.stopped(),
            end_reason=end_reason,
            saved_step=job.saved_step(self._memory),
            available=self._available(num_processes, result.exit_status),
        )
        events.note("end", attempt=number, status=made.exit_status, failed=result.failed_process, saved=made.saved_step)
        return made

    def _run(self, number: int, starters: Sequence[local_job.Start]) -> local_job.JobResult:
        still = self._standstill
        cause = {"cause": still.cause, "reached": still.reached} if number else {}
        in_reserve = self.reserve.take(self.roster.running()) if self._has_record() else self.reserve.take([])
        group = in_reserve.group if in_reserve else self._group(number)

        def begin() -> None:
            if in_reserve:
                in_reserve.begin(self._environment())
            else:
                group.start(self._command(number), starters, self._environment())

        with _StoppedWatch(self._memory, self._stopped_seconds, self._look) as watch:

            def started(process_ids: Sequence[int]) -> None:
                self._events.note("start", attempt=number, process_ids=process_ids, memory=str(self._memory), **cause)
                watch.begin(process_ids)
                self.reserve.watch(number, process_ids)

            try:
                return local_job.run_group(group, begin, started=started, signals=self._signals)
            except joined.ProcessLostError as error:
                return local_job.JobResult(ExitStatus.FAILED, message=str(error))

    def _prepare(self, number: int, starters: Sequence[local_job.Start]) -> standby_job.StandbyJob:
        """Start the processes of attempt `number`, to wait; they have passed the checks that the running ones have."""
        made = standby_job.StandbyJob(self._memory / f"standby-{number}", self._group(number))
        try:
            made.start(self._command(number), starters, {**self._environment(), REACHED: "1"})
        except BaseException:
            made.group.close()
            raise
        return made

    def _group(self, number: int) -> local_job.ProcessGroup:
        # Processes in a collective do not react to a signal; their state is in memory or on disk already.
        return local_job.ProcessGroup(self._log_dir(number), show_first=self._job.show_first, grace_seconds=0.0)

    def _command(self, number: int) -> list[str]:
        return [*self._job.command, *(["--resume"] if number and self._has_record() else [])]

    def _has_record(self) -> bool:
        return (self._job.run_dir / record.FILE_NAME).exists()

    def _log_dir(self, number: int) -> pathlib.Path:
        return self._job.run_dir / "logs" / f"attempt-{number}"

    def _look(self) -> None:
        self.record.look()
        names = self._memory / joined.MODULES_NAME
        if not self._preloaded and names.exists():
            self._preloaded = True
            self._job.preload(names)

    def _available(self, num_processes: int, status: int) -> int | None:
        """Return how many processes the job should have now, None if as many as before; see Attempt."""
        self.roster.judge(num_processes, mistaken=status == ExitStatus.USER)
        lost = self.roster.lost()
        if lost:
            say(f"{lost} of {num_processes} processes were lost with the command that had joined them.")
            self._wait_for(num_processes)
        wanted = self.roster.end()
        self._standstill.cause = "restart" if wanted == num_processes else "join" if wanted > num_processes else "leave"
        if wanted < num_processes and status == ExitStatus.USER:
            say(f"This experiment cannot be trained by {num_processes} processes.")
        return None if wanted == num_processes else wanted

    def _wait_for(self, num_processes: int) -> None:
        """Wait for processes that were lost to come back, no longer than `recovery.patience_seconds`."""
        end = time.monotonic() + self._patience_seconds
        while not self.stopped() and self.roster.target() < num_processes and time.monotonic() < end:
            time.sleep(_LOOK_SECONDS)

    def _exit_status(self, status: int, end_reason: str | None) -> int:
        """Return the status of the job; if it was asked to stop ExitStatus.RETRY, however its processes ended.

        What they had not saved is in memory, and is saved from there. After a second signal it is 128 + its number.
        """
        if end_reason == "nonfinite":
            return ExitStatus.FAILED
        if not self.stopped() or status in (ExitStatus.OK, ExitStatus.USER):
            return status
        received = self._signals.received
        return ExitStatus.RETRY if len(received) < 2 else 128 + received[-1]

    def _environment(self) -> dict[str, str]:
        environment = {} if self._memory.name == BOARD_NAME else {MEMORY: str(self._memory)}
        if self._events.failed_at:
            environment[FAILED_AT] = str(self._events.failed_at)
        environment |= self._standstill.environment()
        if self._deadline < math.inf:
            environment[DEADLINE] = str(self._deadline)
        return environment


class _KeptRecord:
    """The last readable run record: without one in the run directory, an attempt cannot resume."""

    def __init__(self, run_dir: pathlib.Path):
        self._path = run_dir / record.FILE_NAME
        self._changed, self._content = 0, b""

    def look(self) -> None:
        """Keep the record if it is new and intact."""
        changed = _changed_at(self._path.parent)
        if changed in (0, self._changed):
            return
        with contextlib.suppress(OSError):
            if record.readable(self._path.parent):
                self._changed, self._content = changed, self._path.read_bytes()

    def restore(self) -> None:
        """Write the record again if it is missing or damaged."""
        if not self._content or record.readable(self._path.parent):
            return
        with contextlib.suppress(OSError):  # the next attempt reports the error
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.write_bytes(self._content)
            say(f"{self._path} was removed or damaged; it is written again.")


class _StoppedWatch:
    """The thread that kills processes of the job that have been stopped for too long.

    The watchdogs of the other processes notice it sooner. But there may be no other process, all may be stopped, or
    none may have started its watchdog yet.
    """

    def __init__(self, memory: pathlib.Path, limit_seconds: float, look: Callable[[], object] = lambda: None):
        self._memory, self._limit_seconds, self._look = memory, limit_seconds, look
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "_StoppedWatch":
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._thread:
            self._thread.join()

    def begin(self, process_ids: Sequence[int]) -> None:
        """Watch these processes, children of this one, from now on."""
        self._thread = threading.Thread(target=self._run, args=(process_ids,), name="jaxdist-stopped", daemon=True)
        self._thread.start()

    def _run(self, process_ids: Sequence[int]) -> None:
        since: dict[int, float] = {}
        while not self._over.wait(_STOPPED_LOOK_SECONDS):
            self._look()
            now = time.monotonic()
            for number, process_id in enumerate(process_ids):
                if not stopped_processes.is_stopped(process_id):
                    since.pop(number, None)
                elif now - since.setdefault(number, now) >= self._limit_seconds:
                    self._end(number, process_id)

    def _end(self, number: int, process_id: int) -> None:
        report = board.read(self._memory, number)
        where = f"in step {report.step + 1}, {report.phase}" if report else "before its first step"
        say(f"The job hangs: process {number} was stopped for {self._limit_seconds:.0f} s ({where}); it is killed.")
        with contextlib.suppress(ProcessLookupError):
            os.kill(process_id, signal.SIGKILL)


def _changed_at(run_dir: pathlib.Path) -> int:
    with contextlib.suppress(OSError):
        return (run_dir / record.FILE_NAME).stat().st_mtime_ns
    return 0


def end_reason_of(run_dir: pathlib.Path) -> str | None:
    """Return the end reason of the run record, None if the record is damaged."""
    try:
        return record.RunRecord.read(run_dir).end_reason
    except (OSError, ValueError) as error:
        say(f"The run record cannot be read: {error}")
        return None
