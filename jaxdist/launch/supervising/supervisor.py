"""The supervisor: starts a job, and restarts it when it fails, from the newest state that survived.

It outlives every process of the job, so it holds what must outlive them: the lock of the run directory and a directory
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
from typing import Any

from jaxdist.errors import ExitStatus
from jaxdist.launch.supervising import board, local_job
from jaxdist.rundir import lock, record

MEMORY = "JAXDIST_MEMORY"
"""Environment variable: the directory in memory for snapshots and reports."""
FAILED_AT = "JAXDIST_FAILED_AT"
"""Environment variable: when the attempt before failed, in seconds since 1970."""

DEADLINE = "JAXDIST_DEADLINE"
"""Environment variable: when the job must stop, in seconds since 1970."""

EVENTS_NAME = "restarts.jsonl"
_MEMORY_ROOT = pathlib.Path("/dev/shm")
_PREFIX = "jaxdist-"
_LOOK_SECONDS = 0.1
_STOPPED_LOOK_SECONDS = 0.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Policy:
    """When to restart a job.

    Attributes:
      max_fruitless: attempts in a row that may fail without raising the newest saved step; then the job has failed.
      first_delay_seconds: pause after a first fruitless attempt; it doubles with each further one. After an attempt
        that made progress there is no pause.
      longest_delay_seconds: longest pause.
      min_processes: after two fruitless attempts the job continues on half the processes, down to this number; None
        keeps their number.
      deadline_seconds: the job is asked to stop so long after its start; None never.
      stopped_seconds: a process that is stopped (SIGSTOP) for so long is killed.
    """

    max_fruitless: int = 3
    first_delay_seconds: float = 1.0
    longest_delay_seconds: float = 60.0
    min_processes: int | None = None
    deadline_seconds: float | None = None
    stopped_seconds: float = math.inf


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
    """Restart the job after a pause, on so many processes."""

    delay_seconds: float
    num_processes: int


@dataclasses.dataclass(frozen=True)
class End:
    """Do not restart the job; `reason` is empty if there is nothing to explain."""

    exit_status: int
    reason: str = ""


def decide(attempts: Sequence[Attempt], policy: Policy, *, start_step: int = 0) -> Restart | End:
    """Return what to do after the last of `attempts`, all of one job that began with `start_step` steps saved.

    A job is over when it ended well, by its own rules (for example a loss that is not finite), by a user error or on
    request. Everything else, a crash, a kill, a hang, is followed by another attempt as long as attempts make progress.
    """
    last = attempts[-1]
    own_end = last.end_reason not in (None, "hang", "error", "preempted")
    if last.exit_status in (0, ExitStatus.USER) or last.asked_to_stop or own_end:
        return End(last.exit_status)
    fruitless = num_fruitless(attempts, start_step=start_step)
    if fruitless >= policy.max_fruitless:
        return End(
            last.exit_status,
            f"{fruitless} attempts in a row failed without saving a new step (the newest saved step is "
            f"{last.saved_step}). Fix the cause and continue with --resume.",
        )
    delay = 0.0 if not fruitless else policy.first_delay_seconds * 2.0 ** (fruitless - 1)
    return Restart(min(delay, policy.longest_delay_seconds), _next_processes(last.num_processes, fruitless, policy))


def num_fruitless(attempts: Sequence[Attempt], *, start_step: int = 0) -> int:
    """Return how many attempts in a row, up to the last, did not raise the newest saved step."""
    steps = [start_step, *(attempt.saved_step for attempt in attempts)]
    count = 0
    for before, after in zip(reversed(steps[:-1]), reversed(steps[1:])):
        if after > before:
            break
        count += 1
    return count


def _next_processes(num_processes: int, fruitless: int, policy: Policy) -> int:
    if policy.min_processes is None or fruitless < 2:
        return num_processes
    return max(policy.min_processes, num_processes // 2)


def supervise(
    attempt: Callable[[int, int], Attempt],
    *,
    num_processes: int,
    policy: Policy,
    say: Callable[[str], None],
    start_step: int = 0,
    sleep: Callable[[float], None] = time.sleep,
    stopped: Callable[[], bool] = lambda: False,
) -> int:
    """Make attempts until `decide` ends it; return the exit status.

    Args:
      attempt: `attempt(number, num_processes)` runs one to its end; the first number is 0.
      num_processes: number of processes of the first attempt.
      policy: see Policy.
      say: shows a line to the user.
      start_step: the newest saved step before the first attempt.
      sleep: waits for so many seconds, or until `stopped`.
      stopped: returns whether the supervisor was asked to stop; then no further attempt is made.
    """
    attempts: list[Attempt] = []
    while True:
        attempts.append(attempt(len(attempts), num_processes))
        decision = decide(attempts, policy, start_step=start_step)
        if isinstance(decision, End):
            if decision.reason:
                say(decision.reason)
            return decision.exit_status
        last, processes = attempts[-1], decision.num_processes
        fewer = f" on {processes} processes instead of {num_processes}" if processes != num_processes else ""
        pause = f" in {decision.delay_seconds:g} s" if decision.delay_seconds else ""
        say(f"The job ended with status {last.exit_status}; it continues from step {last.saved_step}{fewer}{pause}.")
        num_processes = processes
        sleep(decision.delay_seconds)
        if stopped():
            return ExitStatus.RETRY


@contextlib.contextmanager
def memory_directory(root: pathlib.Path = _MEMORY_ROOT) -> Iterator[pathlib.Path]:
    """Yield a directory in memory for this supervisor; remove it at the end, and those of supervisors that died."""
    for path in root.glob(f"{_PREFIX}*"):
        # A supervisor that was killed could not clean up; its lock is free.
        ours = path.is_dir() and path.stat().st_uid == os.getuid() and (path / lock.FILE_NAME).exists()
        if ours and not lock.is_locked(path):
            shutil.rmtree(path, ignore_errors=True)
    directory = pathlib.Path(tempfile.mkdtemp(prefix=_PREFIX, dir=root))
    try:
        with lock.locked(directory, purpose="snapshots"):
            yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


class Events:
    """Records in restarts.jsonl in the run directory when attempts began and ended, one object a line."""

    def __init__(self, run_dir: pathlib.Path):
        self._path = run_dir / EVENTS_NAME
        self.failed_at: float | None = None

    def note(self, event: str, **details: object) -> None:
        """Add a line with the time in seconds since 1970."""
        now = time.time()
        if event == "end":
            self.failed_at = now
        with open(self._path, "a") as file:
            file.write(json.dumps({"event": event, "time": now} | details) + "\n")


def read_events(run_dir: pathlib.Path) -> list[dict[str, Any]]:
    """Return the events of a run directory, oldest first; a line that is being written is left out."""
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
      remove_at_end: called with the directory in memory, to have it removed if this process is killed.
    """

    command: Sequence[str]
    run_dir: pathlib.Path
    saved_step: Callable[[pathlib.Path], int]
    show_first: bool = True
    start: local_job.Start = local_job.start
    remove_at_end: Callable[[pathlib.Path], object] = lambda directory: None


def run(job: Job, *, num_processes: int, policy: Policy | None = None) -> int:
    """Run a job to its end, through its failures; return its exit status.

    Raises:
      LockedError: another job works in the run directory.
    """
    policy = policy or Policy()
    with contextlib.ExitStack() as stack:
        stack.enter_context(lock.locked(job.run_dir, purpose=shlex.join(job.command)))
        memory = stack.enter_context(memory_directory())
        job.remove_at_end(memory)
        attempts = _Attempts(job, policy, memory, stack.enter_context(local_job.Signals()))
        return supervise(
            attempts.make,
            num_processes=num_processes,
            policy=policy,
            say=_say,
            start_step=job.saved_step(memory),
            sleep=attempts.sleep,
            stopped=attempts.stopped,
        )


class _Attempts:
    """Makes the attempts of one job."""

    def __init__(self, job: Job, policy: Policy, memory: pathlib.Path, signals: local_job.Signals):
        self._job, self._policy, self._memory, self._signals = job, policy, memory, signals
        self._events = Events(job.run_dir)
        self._deadline = math.inf if policy.deadline_seconds is None else time.time() + policy.deadline_seconds

    def stopped(self) -> bool:
        """Return whether a signal came or the deadline has passed."""
        return bool(self._signals.received) or time.time() >= self._deadline

    def sleep(self, seconds: float) -> None:
        """Sleep, but no longer than until a stop is requested: a signal's handler does not end time.sleep."""
        end = time.monotonic() + seconds
        while not self.stopped() and (left := end - time.monotonic()) > 0:
            time.sleep(min(left, _LOOK_SECONDS))

    def make(self, number: int, num_processes: int) -> Attempt:
        """Run the job once, to its end."""
        job, events = self._job, self._events
        board.clear(self._memory)
        before = _changed_at(job.run_dir)
        resume = ["--resume"] if number and (job.run_dir / record.FILE_NAME).exists() else []
        with _StoppedWatch(self._memory, self._policy.stopped_seconds) as watch:

            def started(process_ids: Sequence[int]) -> None:
                events.note("start", attempt=number, process_ids=process_ids, memory=str(self._memory))
                watch.begin(process_ids)

            result = local_job.run_job(
                [*job.command, *resume],
                num_processes=num_processes,
                log_dir=job.run_dir / "logs" / f"attempt-{number}",
                environment=self._environment(),
                show_first=job.show_first,
                started=started,
                start=job.start,
                signals=self._signals,
                # Processes in a collective do not react to a signal; their state is in memory or on disk already.
                grace_seconds=0.0,
            )
        if result.failed_process is not None and result.message:
            _say(f"Process {result.failed_process} failed first:\n{result.message}")
        end_reason = record.RunRecord.read(job.run_dir).end_reason if _changed_at(job.run_dir) != before else None
        made = Attempt(
            num_processes=num_processes,
            exit_status=_exit_status(result, self._signals),
            asked_to_stop=result.asked_to_stop or (end_reason == "preempted" and self.stopped()),
            end_reason=end_reason,
            saved_step=job.saved_step(self._memory),
        )
        events.note("end", attempt=number, status=made.exit_status, failed=result.failed_process, saved=made.saved_step)
        return made

    def _environment(self) -> dict[str, str]:
        environment = {MEMORY: str(self._memory)}
        if self._events.failed_at:
            environment[FAILED_AT] = str(self._events.failed_at)
        if self._deadline < math.inf:
            environment[DEADLINE] = str(self._deadline)
        return environment


class _StoppedWatch:
    """The thread that kills a process of the job that has been stopped too long.

    The watchdogs of the other processes notice it sooner. But there may be no other process, all may be stopped, or
    none may have started its watchdog yet.
    """

    def __init__(self, memory: pathlib.Path, limit_seconds: float):
        self._memory, self._limit_seconds = memory, limit_seconds
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
            now = time.monotonic()
            for number, process_id in enumerate(process_ids):
                if not local_job.is_stopped(process_id):
                    since.pop(number, None)
                elif now - since.setdefault(number, now) >= self._limit_seconds:
                    self._end(number, process_id)

    def _end(self, number: int, process_id: int) -> None:
        report = board.read(self._memory, number)
        where = f"in step {report.step + 1}, {report.phase}" if report else "before its first step"
        _say(f"The job hangs: process {number} was stopped for {self._limit_seconds:.0f} s ({where}); it is killed.")
        with contextlib.suppress(ProcessLookupError):
            os.kill(process_id, signal.SIGKILL)


def _exit_status(result: local_job.JobResult, signals: local_job.Signals) -> int:
    """Return the status of the job; ExitStatus.RETRY if a single signal ended it before it handled signals."""
    unheard = len(signals.received) == 1 and result.exit_status == 128 + signals.received[0]
    return ExitStatus.RETRY if unheard else result.exit_status


def _changed_at(run_dir: pathlib.Path) -> int:
    path = run_dir / record.FILE_NAME
    return path.stat().st_mtime_ns if path.exists() else 0


def _say(message: str) -> None:
    print(f"jaxdist: {message}", file=sys.stderr, flush=True)
