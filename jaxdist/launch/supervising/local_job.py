"""Processes of one job on this machine, joined by `jax.distributed` over the loopback interface.

Each process runs in a session of its own, so that a Ctrl-C reaches the parent alone, which passes it on once. When one
process fails the others cannot continue: they are asked to end, then killed, and the first failure is reported.
"""

import dataclasses
import itertools
import math
import os
import pathlib
import random
import re
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from types import FrameType
from typing import IO, Any, Literal, Protocol, TypeAlias

from jaxdist.errors import ExitStatus
from jaxdist.launch import parent
from jaxdist.launch import signals as stop_signals
from jaxdist.launch.joining import places, runtime
from jaxdist.launch.supervising import stopped

LOOPBACK = places.LOOPBACK
GRACE_SECONDS = 5.0
ORDERLY_SECONDS = 15.0
"""How long the others may take to end once one process has ended with ExitStatus.RETRY."""
LOG_TAIL_LINES = 40
_LOOK_SECONDS = 0.5
_GIVEN_PORTS = pathlib.Path("/proc/sys/net/ipv4/ip_local_port_range")
_LEAST_PORT = 10_000
_NOISE = re.compile(r"\[Gloo\] Rank |[IWEF]\d{4} [\d:.]+ |WARNING: All log messages before absl::InitializeLog")
"""Begins what native code says of every connection that it makes or loses."""


class Process(Protocol):
    """A process of a job, as `subprocess.Popen` makes them."""

    @property
    def pid(self) -> int:
        """Its process id."""

    @property
    def returncode(self) -> int | None:
        """Its exit status, minus the signal that killed it; None until `poll` or `wait` has seen its end."""

    def poll(self) -> int | None:
        """Return its exit status, None while it runs."""

    def wait(self, timeout: float | None = None) -> int:
        """Return its exit status once it has ended; raises subprocess.TimeoutExpired."""

    def send_signal(self, sig: int, /) -> None:
        """Send a signal, unless it has ended."""


def start(command: Sequence[str], environment: Mapping[str, str], output: IO[bytes] | None) -> Process:
    """Start a process in its own session; without `output` it shares the output of this one."""
    errors = None if output is None else subprocess.STDOUT
    return subprocess.Popen(command, env=environment, stdout=output, stderr=errors, start_new_session=True)


Start: TypeAlias = Callable[[Sequence[str], Mapping[str, str], IO[bytes] | None], Process]


class Signals:
    """While entered, passes a stop signal on to the processes of a job; a second one kills them.

    Signals that come within `SAME_REQUEST_SECONDS` of the first are one request.

    Attributes:
      received: the first signal of each request.
      processes: the processes that get them.
    """

    def __init__(self) -> None:
        self.received: list[int] = []
        self.processes: Sequence[Process] = ()
        self._first_at = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Signals":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._forward) for number in stop_signals.heeded()}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _forward(self, number: int, frame: FrameType | None) -> None:
        del frame
        now = time.monotonic()
        if self.received and now - self._first_at < stop_signals.SAME_REQUEST_SECONDS:
            return
        self._first_at = self._first_at or now
        self.received.append(number)
        for process in self.processes:
            process.send_signal(number if len(self.received) == 1 else signal.SIGKILL)


@dataclasses.dataclass(frozen=True)
class JobResult:
    """How a job ended.

    Attributes:
      exit_status: see run_job.
      failed_process: the one that failed first; None where none did.
      message: the end of its log; empty if process 0 has shown the same user error.
      asked_to_stop: whether a signal asked this process, and so the job, to end.
    """

    exit_status: int
    failed_process: int | None = None
    message: str = ""
    asked_to_stop: bool = False


class ProcessGroup:
    """The processes of a job, started; `close` ends those that still run.

    Attributes:
      processes: in the order of their numbers; grows while they are started.
      log_dir: gets process-N.log, standard output and standard error of process N.
      show_first: whether process 0 writes to this process's standard output and error, and its native code to its log.
    """

    def __init__(self, log_dir: pathlib.Path, *, show_first: bool = False, grace_seconds: float = GRACE_SECONDS):
        self.processes: list[Process] = []
        self.log_dir, self.show_first = log_dir, show_first
        self._stack = ExitStack()
        self._port = self._stack.enter_context(reserved_port())
        self._stack.callback(_end, self.processes, grace_seconds)

    def start(
        self, command: Sequence[str], starters: Sequence[Start], environment: Mapping[str, str] | None = None
    ) -> None:
        """Start a process by each of `starters`; each finds its place in its environment (see `runtime`)."""
        shared = {**os.environ, **(environment or {}), runtime.NUM_PROCESSES: str(len(starters))}
        shared |= {parent.PARENT_ID: str(os.getpid()), runtime.COORDINATOR: f"{LOOPBACK}:{self._port}"}
        for number, starter in enumerate(starters):
            own, log = {runtime.PROCESS_ID: str(number)}, log_path(self.log_dir, number)
            with open_log(log) as opened:
                output: IO[bytes] | None = opened
                if self.show_first and not number:
                    output, own = None, own | {runtime.LOG: str(log)}
                self.processes.append(starter(command, shared | own, output))

    def on_close(self, callback: Callable[[], object]) -> None:
        """Have `callback` called when the group is closed, before its processes are ended."""
        self._stack.callback(callback)

    def has_ended(self) -> bool:
        """Return whether a process has ended."""
        return any(process.poll() is not None for process in self.processes)

    def close(self) -> None:
        """End the processes that still run, and give the port back."""
        self._stack.close()


def run_job(
    command: Sequence[str],
    *,
    num_processes: int,
    log_dir: pathlib.Path,
    environment: Mapping[str, str] | None = None,
    show_first: bool = False,
    timeout_seconds: float | None = None,
) -> JobResult:
    """Run `command` in `num_processes` processes and wait for all of them; see `ProcessGroup` and `run_group`.

    `environment` is set for every process, besides this process's own.
    """
    with Signals() as signals:
        group = ProcessGroup(log_dir, show_first=show_first)
        return run_group(
            group,
            lambda: group.start(command, num_processes * [start], environment),
            signals=signals,
            timeout_seconds=timeout_seconds,
        )


def run_group(
    group: ProcessGroup,
    begin: Callable[[], object],
    *,
    signals: Signals,
    timeout_seconds: float | None = None,
    started: Callable[[Sequence[int]], None] = lambda process_ids: None,
) -> JobResult:
    """Begin the work of a group of processes and wait for all of them; the group is closed.

    A process that ends with `ExitStatus.RETRY` (preempted, or the watchdog found a hang) has not failed: the others,
    which received the same signal or verdict, get `ORDERLY_SECONDS` to end too.

    `begin` starts the processes, or has those that were started begin; `started` is called with their ids once all
    have. A job that takes longer than `timeout_seconds` is ended.

    Returns:
      The exit status: 0 if all processes ended with 0, else that of the first that failed (128 + signal when killed).
      If one ended with ExitStatus.RETRY and none failed, the status is ExitStatus.RETRY.
    """
    processes = group.processes
    with closing(group):
        signals.processes = processes
        begin()
        if signals.received:  # the processes that started after the signal did not get it
            return JobResult(ExitStatus.RETRY, asked_to_stop=True)
        started([process.pid for process in processes])
        failed = _wait(processes, timeout_seconds)
    asked = bool(signals.received)
    if failed is None:
        again = any(process.returncode for process in processes)
        return JobResult(ExitStatus.RETRY if again else ExitStatus.OK, asked_to_stop=asked)
    status = processes[failed].returncode
    assert status is not None
    # Process 0 has shown a mistake that all processes found.
    shown = group.show_first and processes[0].returncode == status == ExitStatus.USER
    message = "" if shown else _tail(log_path(group.log_dir, failed))
    return JobResult(128 - status if status < 0 else status, failed, message, asked)


def open_log(path: pathlib.Path, mode: Literal["wb", "ab"] = "wb") -> IO[bytes]:
    """Open a log. If that fails (full disk, directory removed), the output is dropped and the job runs."""
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        return open(path, mode)
    return open(os.devnull, "wb")


def log_path(log_dir: pathlib.Path, process: int) -> pathlib.Path:
    """Return where the output of a process goes."""
    return log_dir / f"process-{process}.log"


@contextmanager
def reserved_port() -> Iterator[int]:
    """Yield a TCP port of the loopback interface that is the coordinator's alone while the context lasts.

    The port stays bound here, without listening. The coordinator (gRPC, which sets SO_REUSEPORT) may bind it too;
    another program on this machine that asks for any free port will not be given it.
    """
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        held.bind((LOOPBACK, 0))
        yield held.getsockname()[1]


def quiet_ports(count: int) -> list[int]:
    """Return free TCP ports of the loopback interface, below those that outgoing connections use.

    A restarted process needs its port again, which an outgoing connection of another program may have taken.
    """
    first_given = int(_GIVEN_PORTS.read_text().split()[0]) if _GIVEN_PORTS.exists() else _LEAST_PORT
    below = range(_LEAST_PORT, max(_LEAST_PORT, first_given))
    drawn = random.SystemRandom().sample(below, min(len(below), 50 * count))
    with ExitStack() as stack:
        # If there are none below, any free port.
        bound = (_bind(stack, port) for port in itertools.chain(drawn, itertools.repeat(0)))
        return list(itertools.islice((port for port in bound if port is not None), count))


def _bind(stack: ExitStack, port: int) -> int | None:
    held = stack.enter_context(socket.socket())
    try:
        held.bind((LOOPBACK, port))
    except OSError:
        return None
    return held.getsockname()[1]


def _wait(processes: Sequence[Process], timeout_seconds: float | None) -> int | None:
    """Return the number of the first process that failed, None when all have ended well, or some and time is up."""
    ended: dict[int, int] = {}
    change = threading.Condition()

    def watch(number: int, process: Process) -> None:
        status = process.wait()
        with change:
            ended[number] = status
            change.notify()

    for number, process in enumerate(processes):
        threading.Thread(target=watch, args=(number, process), daemon=True).start()
    deadline = math.inf if timeout_seconds is None else time.monotonic() + timeout_seconds
    orderly = math.inf
    with change:
        while True:
            failed = _first_failed(ended)
            now = time.monotonic()
            if ExitStatus.RETRY in ended.values():
                orderly = min(orderly, now + ORDERLY_SECONDS)
            running = [process for number, process in enumerate(processes) if number not in ended]
            # A process that is stopped will not end by itself, however long the others wait for it.
            pointless = orderly < math.inf and all(stopped.is_stopped(process.pid) for process in running)
            if failed is not None or not running or pointless or now >= orderly:
                return failed
            if now >= deadline:
                raise TimeoutError(f"The job took longer than {timeout_seconds} s; processes ended: {sorted(ended)}.")
            left = min(deadline, orderly) - now
            if orderly < math.inf:
                left = min(left, _LOOK_SECONDS)
            change.wait(None if left == math.inf else left)


def _first_failed(ended: Mapping[int, int]) -> int | None:
    """Return the first process that failed in `ended`, in order of time; one that was killed has made others fail."""
    killed = [number for number, status in ended.items() if status == -signal.SIGKILL]
    failed = [number for number, status in ended.items() if status not in (0, ExitStatus.RETRY)]
    return next(iter([*killed, *failed]), None)


def _end(processes: Sequence[Process], grace_seconds: float) -> None:
    """Ask the processes that still run to end, kill them after `grace_seconds`, and kill what they left behind."""
    running = [process for process in processes if process.poll() is None]
    for process in running:
        process.send_signal(signal.SIGKILL if stopped.is_stopped(process.pid) else signal.SIGTERM)
    deadline = time.monotonic() + grace_seconds
    for process in running:
        with suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, deadline - time.monotonic()))
    for process in running:  # all of them before the first is waited for: to give back its memory takes it a while
        process.send_signal(signal.SIGKILL)
    for process in running:
        process.wait()
    for process in processes:
        _end_group(process.pid)


def _end_group(process_id: int) -> None:
    """Kill what is left of the group that a process led: its data workers, for example, when it was killed itself."""
    with suppress(ProcessLookupError):
        os.killpg(process_id, signal.SIGKILL)
    # Where this process adopts orphans (see `fork_server`) it has to reap them, too.
    with suppress(ChildProcessError):
        while os.waitid(os.P_PGID, process_id, os.WEXITED) is not None:
            pass


def _tail(path: pathlib.Path) -> str:
    if not path.exists():
        return ""
    lines = path.read_text(errors="replace").strip().splitlines()
    return "\n".join([line for line in lines if not _NOISE.match(line)][-LOG_TAIL_LINES:])
