"""Processes of one job on this machine, joined by `jax.distributed` over the loopback interface.

Each process runs in a session of its own, so that a Ctrl-C reaches the parent alone, which passes it on once. When one
process fails the others cannot go on: they are told to end, then made to, and the first failure is the one reported.
"""

import dataclasses
import math
import os
import pathlib
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import IO

from jaxdist.launch import runtime
from jaxdist.signals import EXIT_RETRY

LOOPBACK = "127.0.0.1"
GRACE_SECONDS = 5.0
ORDERLY_SECONDS = 15.0
"""How long the others may take to end once one process has ended with EXIT_RETRY."""
LOG_TAIL_LINES = 40
_LOOK_SECONDS = 0.5


@dataclasses.dataclass(frozen=True)
class JobResult:
    """How a job ended.

    Attributes:
      exit_status: see run_job.
      failed_process: the one that failed first; None where none did.
      message: the end of its log.
      asked_to_stop: whether a signal asked this process, and so the job, to end.
    """

    exit_status: int
    failed_process: int | None = None
    message: str = ""
    asked_to_stop: bool = False


def run_job(
    command: Sequence[str],
    *,
    num_processes: int,
    log_dir: pathlib.Path,
    environment: Mapping[str, str] | None = None,
    show_first: bool = False,
    timeout_seconds: float | None = None,
    started: Callable[[Sequence[int]], None] = lambda process_ids: None,
) -> JobResult:
    """Run `command` in `num_processes` processes and wait for all of them.

    A process that ends with `EXIT_RETRY` (preempted, or the watchdog found a hang) has not failed: the others, which
    were told the same, get some seconds to end too.

    Args:
      command: the program and its arguments, the same for every process.
      num_processes: how many; each finds its place in its environment (see `runtime`).
      log_dir: gets process-N.log, standard output and standard error of process N.
      environment: set for every process, besides this process's own.
      show_first: process 0 writes to this process's standard output and error instead of its log.
      timeout_seconds: the job is ended when it takes longer.
      started: called with the process ids once all have started.

    Returns:
      The exit status: 0 if all processes ended with 0, else that of the first that failed (128 + signal when killed).
      None has failed and the status is EXIT_RETRY where one ended with that.
    """
    log_dir.mkdir(parents=True, exist_ok=True)
    shared = {**os.environ, **(environment or {}), runtime.NUM_PROCESSES: str(num_processes)}
    shared[runtime.PARENT_ID] = str(os.getpid())
    with ExitStack() as stack:
        shared[runtime.COORDINATOR] = f"{LOOPBACK}:{stack.enter_context(reserved_port())}"
        processes: list[subprocess.Popen[bytes]] = []
        stack.callback(_end, processes)
        for number in range(num_processes):
            output = None
            if number or not show_first:
                output = stack.enter_context(open(log_path(log_dir, number), "wb"))
            processes.append(_start(command, {**shared, runtime.PROCESS_ID: str(number)}, output))
        started([process.pid for process in processes])
        with _forwarding_signals(processes) as forwarded:
            failed = _wait(processes, timeout_seconds)
        _end(processes)
    asked = bool(forwarded)
    if failed is None:
        return JobResult(EXIT_RETRY if any(process.returncode for process in processes) else 0, asked_to_stop=asked)
    status = processes[failed].returncode
    return JobResult(128 - status if status < 0 else status, failed, _tail(log_path(log_dir, failed)), asked)


def log_path(log_dir: pathlib.Path, process: int) -> pathlib.Path:
    """Return where the output of a process goes."""
    return log_dir / f"process-{process}.log"


@contextmanager
def reserved_port() -> Iterator[int]:
    """Yield a TCP port of the loopback interface that is the coordinator's alone while the context lasts.

    The port stays bound here, without listening. The coordinator (gRPC, which sets SO_REUSEPORT) may bind it too;
    another program of this machine, which asks for any free port, will not be given it.
    """
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        held.bind((LOOPBACK, 0))
        yield held.getsockname()[1]


def _start(command: Sequence[str], environment: Mapping[str, str], output: IO[bytes] | None) -> subprocess.Popen[bytes]:
    errors = None if output is None else subprocess.STDOUT
    return subprocess.Popen(command, env=environment, stdout=output, stderr=errors, start_new_session=True)


def _wait(processes: Sequence[subprocess.Popen[bytes]], timeout_seconds: float | None) -> int | None:
    """Return the number of the first process that failed, None when all have ended well, or some and time is up."""
    ended: dict[int, int] = {}
    change = threading.Condition()

    def watch(number: int, process: subprocess.Popen[bytes]) -> None:
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
            failed = next((number for number, status in ended.items() if status not in (0, EXIT_RETRY)), None)
            now = time.monotonic()
            if EXIT_RETRY in ended.values():
                orderly = min(orderly, now + ORDERLY_SECONDS)
            running = [process for number, process in enumerate(processes) if number not in ended]
            # A process that is stopped will not end by itself, however long the others wait for it.
            pointless = orderly < math.inf and all(is_stopped(process.pid) for process in running)
            if failed is not None or not running or pointless or now >= orderly:
                return failed
            if now >= deadline:
                raise TimeoutError(f"The job took longer than {timeout_seconds} s; processes ended: {sorted(ended)}.")
            left = min(deadline, orderly) - now
            if orderly < math.inf:
                left = min(left, _LOOK_SECONDS)
            change.wait(None if left == math.inf else left)


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Ask what still runs to end, and after a while make it."""
    running = [process for process in processes if process.poll() is None]
    for process in running:
        if is_stopped(process.pid):
            process.kill()
        else:
            process.terminate()
    deadline = time.monotonic() + GRACE_SECONDS
    for process in running:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def is_stopped(process_id: int) -> bool:
    """Return whether a process was stopped by a signal: it takes no other then but SIGKILL."""
    try:
        status = pathlib.Path(f"/proc/{process_id}/stat").read_text()
    except OSError:
        return False
    # The name in parentheses may hold anything; the state is the first field after it.
    return status.rpartition(")")[2].split()[0] == "T"


@contextmanager
def _forwarding_signals(processes: Sequence[subprocess.Popen[bytes]]) -> Iterator[list[int]]:
    """Pass on SIGINT, SIGTERM and SIGUSR1, each as often as it comes; yields the list of those that came."""
    forwarded: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield forwarded
        return

    def forward(number: int, frame: FrameType | None) -> None:
        del frame
        forwarded.append(number)
        for process in processes:
            process.send_signal(number)

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = {number: signal.signal(number, forward) for number in numbers}
    try:
        yield forwarded
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _tail(path: pathlib.Path) -> str:
    if not path.exists():
        return ""
    return "\n".join(path.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:])
