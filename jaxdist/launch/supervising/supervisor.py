"""The supervisor: starts a job, and restarts it when it fails, from the newest state that survived.

It outlives every process of the job, so it holds what must outlive them: the lock of the run directory, and a directory
in memory with the snapshots and the reports of the processes. Whether to restart after a failure, how soon and on how
many processes is a pure function of the attempts so far; see `decide`.
"""

import contextlib
import dataclasses
import json
import math
import os
import pathlib
import shlex
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from jaxdist.errors import ExitStatus
from jaxdist.launch.supervising import board, local_job
from jaxdist.launch.supervising import stopped as stopped_processes
from jaxdist.rundir import lock, record

MEMORY = "JAXDIST_MEMORY"
"""Environment variable: the directory in memory for snapshots and reports."""
FAILED_AT = "JAXDIST_FAILED_AT"
"""Environment variable: when the attempt before failed, by the machine's monotonic clock."""

DEADLINE = "JAXDIST_DEADLINE"
"""Environment variable: when the job must stop, by the monotonic clock."""

EVENTS_NAME = "restarts.jsonl"
BOARD_NAME = "board"
"""The folder of the board in the run directory, if the job has no directory in memory."""
MEMORY_ROOT = pathlib.Path("/dev/shm")
_PREFIX = "jaxdist-"
_OWNER_NAME, _FOUND_NAME = "run_dir", "found_at"
_KEEP_SECONDS = 24 * 3600.0
_GOOD_ENDS = ("target_reached", "max_steps", "max_epochs", "max_seconds", "patience")
_LOOK_SECONDS = 0.1
_STOPPED_LOOK_SECONDS = 0.5
FIRST_DELAY_SECONDS, LONGEST_DELAY_SECONDS = 1.0, 60.0
"""Pause after a first fruitless attempt, which doubles with each further one, and the longest pause. After an attempt
that made progress the next one begins at once."""
STOPPED_MARGIN_SECONDS = 5.0
"""A process that is stopped (SIGSTOP) for this much longer than `hang_seconds` is killed: the other processes notice it
first, and say more about it than the supervisor can."""


class RestartSettings(Protocol):
    """The settings under `recovery.` that say when to restart a job; see `config.experiment.Recovery`."""

    @property
    def max_fruitless(self) -> int:
        """See Recovery."""

    @property
    def min_processes(self) -> int | None:
        """See Recovery."""

    @property
    def deadline_seconds(self) -> float | None:
        """See Recovery."""

    @property
    def hang_seconds(self) -> float:
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
    """

    num_processes: int
    exit_status: int
    asked_to_stop: bool = False
    end_reason: str | None = None
    saved_step: int = 0


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
    if last.exit_status in (ExitStatus.OK, ExitStatus.USER) or last.asked_to_stop or last.end_reason == "nonfinite":
        return End(last.exit_status)
    fruitless = num_fruitless(attempts, start_step=start_step)
    if fruitless >= settings.max_fruitless:
        return End(
            last.exit_status,
            f"{fruitless} attempts in a row failed without saving a new step (the newest saved step is "
            f"{last.saved_step}). Fix the cause and continue with --resume.",
        )
    delay = 0.0 if not fruitless else FIRST_DELAY_SECONDS * 2.0 ** (fruitless - 1)
    processes = _next_processes(last.num_processes, fruitless, settings.min_processes)
    return Restart(min(delay, LONGEST_DELAY_SECONDS), processes)


def num_fruitless(attempts: Sequence[Attempt], *, start_step: int = 0) -> int:
    """Return how many attempts in a row, up to the last, did not raise the newest saved step."""
    steps = [start_step, *(attempt.saved_step for attempt in attempts)]
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

    Args:
      attempt: `attempt(number, num_processes)` runs one to its end; the first number is 0.
      num_processes: number of processes of the first attempt.
      settings: when to restart.
      say: shows a line to the user.
      start_step: the newest saved step before the first attempt.
      stopped: returns whether the supervisor was asked to stop; then no further attempt is made.
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
        fewer = f" on {processes} processes instead of {num_processes}" if processes != num_processes else ""
        pause = f" in {decision.delay_seconds:g} s" if decision.delay_seconds else ""
        say(f"The job ended with status {last.exit_status}; it continues from step {last.saved_step}{fewer}{pause}.")
        num_processes = processes
        _sleep(decision.delay_seconds, stopped)
        if stopped():
            return ExitStatus.RETRY


def _sleep(seconds: float, stopped: Callable[[], bool]) -> None:
    """Sleep, but no longer than until `stopped`: a signal's handler does not end time.sleep."""
    end = time.monotonic() + seconds
    while not stopped() and (left := end - time.monotonic()) > 0:
        time.sleep(min(left, _LOOK_SECONDS))


@contextlib.contextmanager
def memory_directory(run_dir: pathlib.Path, *, root: pathlib.Path = MEMORY_ROOT) -> Iterator[pathlib.Path]:
    """Yield a directory in memory for the job in `run_dir`; the caller removes it.

    It gets its name when its lock is held, so another job never takes it for one that was left behind.
    """
    draft = pathlib.Path(tempfile.mkdtemp(prefix=f".{_PREFIX}", dir=root))
    with lock.locked(draft, purpose="snapshots"):
        # A short symbolic link needs no memory of its own, so this works even if the memory is full.
        with contextlib.suppress(OSError):
            (draft / _OWNER_NAME).symlink_to(run_dir.absolute())
        yield draft.rename(root / draft.name.removeprefix("."))


def left_behind(run_dir: pathlib.Path, *, root: pathlib.Path = MEMORY_ROOT) -> Iterator[pathlib.Path]:
    """Yield each directory in memory that a killed job of `run_dir` left behind, locked; remove those of no use.

    Those of other run directories stay for a day after they were first found, so that their runs can be resumed.
    """
    for path in root.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError, lock.LockedError):
            if path.stat().st_uid != os.getuid() or not (path / lock.FILE_NAME).exists():
                continue
            with lock.locked(path, purpose="snapshots"):
                owner = path / _OWNER_NAME
                if owner.is_symlink() and owner.readlink() == run_dir.absolute():
                    yield path
                elif not owner.exists() or _found_seconds_ago(path) > _KEEP_SECONDS:
                    shutil.rmtree(path, ignore_errors=True)


def _found_seconds_ago(left: pathlib.Path) -> float:
    """Return how long ago a job first found a directory that was left behind, and note it there if this is the first.

    By the time since the machine started, which is never set: the directory is in memory and as old at most.
    """
    note, now = left / _FOUND_NAME, time.clock_gettime(time.CLOCK_BOOTTIME)
    if not note.is_symlink():
        note.symlink_to(repr(now))  # needs no memory of its own, like that to the owner
    return now - float(os.readlink(note))


class Events:
    """Records in restarts.jsonl in the run directory when attempts began and ended, one object a line.

    A line that cannot be written is omitted, with one warning: the job does not depend on it.
    """

    def __init__(self, run_dir: pathlib.Path):
        self._path = run_dir / EVENTS_NAME
        self._told = False
        self.failed_at: float | None = None

    def note(self, event: str, **details: object) -> None:
        """Add a line with the time in seconds since 1970, and by the monotonic clock, for what measures."""
        monotonic = time.monotonic()  # one clock for all processes of this machine, which is never set
        if event == "end":
            self.failed_at = monotonic
        try:
            with open(self._path, "a") as file:
                file.write(json.dumps({"event": event, "time": time.time(), "monotonic": monotonic} | details) + "\n")
        except OSError as error:
            if not self._told:
                say(f"{self._path} could not be written: {error.strerror}. The job continues without it.")
            self._told = True


def read_events(run_dir: pathlib.Path) -> list[dict[str, Any]]:
    """Return the events of a run directory, oldest first; an incomplete line is omitted."""
    path = run_dir / EVENTS_NAME
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


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
      at_kill: called with the directory in memory, to have it saved and removed if this process is killed.
    """

    command: Sequence[str]
    run_dir: pathlib.Path
    saved_step: Callable[[pathlib.Path], int]
    show_first: bool = True
    start: local_job.Start = local_job.start
    save: Callable[[pathlib.Path, str], int | None] = lambda memory, end_reason: None
    save_left: bool = True
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
        for memory in left_behind(job.run_dir) if job.save_left else ():
            _save(job, memory, "error")
        job.begin()
        memory = stack.enter_context(_memory(job.run_dir))
        job.at_kill(memory)
        attempts = _Attempts(job, settings, memory, signals)
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
            attempts.restore_record()
            saved = _save(job, memory, "preempted" if attempts.stopped() else "error")
        return ExitStatus.FAILED if status == ExitStatus.OK and not saved else status


@contextlib.contextmanager
def _memory(run_dir: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yield a directory in memory, or the board of the run directory if there can be none."""
    with contextlib.ExitStack() as stack:
        try:
            directory = stack.enter_context(memory_directory(run_dir))
        except OSError as error:
            say(f"No directory could be made in {MEMORY_ROOT}: {error.strerror}. The run takes no snapshots.")
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
    """Makes the attempts of one job."""

    def __init__(self, job: Job, settings: RestartSettings, memory: pathlib.Path, signals: local_job.Signals):
        self._job, self._memory, self._signals = job, memory, signals
        self._stopped_seconds = settings.hang_seconds + STOPPED_MARGIN_SECONDS
        self._events = Events(job.run_dir)
        self._record = _KeptRecord(job.run_dir)
        limit = settings.deadline_seconds
        self._deadline = math.inf if limit is None else time.monotonic() + limit

    def stopped(self) -> bool:
        """Return whether a signal came or the deadline has passed."""
        return bool(self._signals.received) or time.monotonic() >= self._deadline

    def restore_record(self) -> None:
        """Write the run record again if it is missing or damaged."""
        self._record.restore()

    def make(self, number: int, num_processes: int) -> Attempt:
        """Run the job once, to its end."""
        job, events = self._job, self._events
        board.clear(self._memory)
        if number:
            self._record.restore()
        before = _changed_at(job.run_dir)
        log_dir = job.run_dir / "logs" / f"attempt-{number}"
        resume = ["--resume"] if number and (job.run_dir / record.FILE_NAME).exists() else []
        with _StoppedWatch(self._memory, self._stopped_seconds, self._record.look) as watch:

            def started(process_ids: Sequence[int]) -> None:
                events.note("start", attempt=number, process_ids=process_ids, memory=str(self._memory))
                watch.begin(process_ids)

            result = local_job.run_job(
                [*job.command, *resume],
                num_processes=num_processes,
                log_dir=log_dir,
                environment=self._environment(),
                show_first=job.show_first,
                started=started,
                start=job.start,
                signals=self._signals,
                # Processes in a collective do not react to a signal; their state is in memory or on disk already.
                grace_seconds=0.0,
            )
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
        )
        events.note("end", attempt=number, status=made.exit_status, failed=result.failed_process, saved=made.saved_step)
        return made

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
        with contextlib.suppress(OSError, ValueError):
            record.RunRecord.read(self._path.parent)
            self._changed, self._content = changed, self._path.read_bytes()

    def restore(self) -> None:
        """Write the record again if it is missing or damaged."""
        if not self._content or _is_readable(self._path.parent):
            return
        with contextlib.suppress(OSError):  # the next attempt reports the error
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.write_bytes(self._content)
            say(f"{self._path} was removed or damaged; it is written again.")


def _is_readable(run_dir: pathlib.Path) -> bool:
    with contextlib.suppress(OSError, ValueError):
        record.RunRecord.read(run_dir)
        return True
    return False


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


def say(message: str) -> None:
    """Show a line to the user."""
    print(f"jaxdist: {message}", file=sys.stderr, flush=True)
