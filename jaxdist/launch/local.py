"""Processes of one job on this machine, joined by `jax.distributed` over the loopback interface.

Each process runs in a session of its own, so that a Ctrl-C reaches the parent alone, which passes it on once. When one
process fails the others cannot go on: they are told to end, then made to, and the first failure is the one reported.
"""

import dataclasses
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import IO

from jaxdist.launch import runtime

GRACE_SECONDS = 5.0
LOG_TAIL_LINES = 40


@dataclasses.dataclass(frozen=True)
class JobResult:
    """How a job ended: its exit status, and which process failed first, with the end of its log (None: none did)."""

    exit_status: int
    failed_process: int | None = None
    message: str = ""


def run_job(
    command: Sequence[str],
    *,
    num_processes: int,
    log_dir: pathlib.Path,
    environment: Mapping[str, str] | None = None,
    show_first: bool = False,
    timeout_seconds: float | None = None,
) -> JobResult:
    """Run `command` in `num_processes` processes and wait for all of them.

    Args:
      command: the program and its arguments, the same for every process.
      num_processes: how many; each finds its place in its environment (see `runtime`).
      log_dir: gets process-N.log, standard output and standard error of process N.
      environment: set for every process, besides this process's own.
      show_first: process 0 writes to this process's standard output and error instead of its log.
      timeout_seconds: the job is ended when it takes longer.

    Returns:
      The exit status: 0 if all processes ended with 0, else that of the first that failed (128 + signal when killed).
    """
    log_dir.mkdir(parents=True, exist_ok=True)
    shared = {**os.environ, **(environment or {}), runtime.NUM_PROCESSES: str(num_processes)}
    shared[runtime.COORDINATOR] = f"127.0.0.1:{free_port()}"
    shared[runtime.PARENT_ID] = str(os.getpid())
    with ExitStack() as stack:
        processes = []
        for number in range(num_processes):
            output = None
            if number or not show_first:
                output = stack.enter_context(open(log_path(log_dir, number), "wb"))
            processes.append(_start(command, {**shared, runtime.PROCESS_ID: str(number)}, output))
        stack.callback(_end, processes)
        with _forwarding_signals(processes):
            failed = _wait(processes, timeout_seconds)
        if failed is None:
            return JobResult(0)
        _end(processes)
    status = processes[failed].returncode
    return JobResult(128 - status if status < 0 else status, failed, _tail(log_path(log_dir, failed)))


def log_path(log_dir: pathlib.Path, process: int) -> pathlib.Path:
    """Return where the output of a process goes."""
    return log_dir / f"process-{process}.log"


def free_port() -> int:
    """Return a TCP port of the loopback interface that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _start(command: Sequence[str], environment: Mapping[str, str], output: IO[bytes] | None) -> subprocess.Popen[bytes]:
    errors = None if output is None else subprocess.STDOUT
    return subprocess.Popen(command, env=environment, stdout=output, stderr=errors, start_new_session=True)


def _wait(processes: Sequence[subprocess.Popen[bytes]], timeout_seconds: float | None) -> int | None:
    """Return the number of the first process that failed, None when all have ended well."""
    ended: dict[int, int] = {}
    change = threading.Condition()

    def watch(number: int, process: subprocess.Popen[bytes]) -> None:
        status = process.wait()
        with change:
            ended[number] = status
            change.notify()

    for number, process in enumerate(processes):
        threading.Thread(target=watch, args=(number, process), daemon=True).start()
    deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds
    with change:
        while len(ended) < len(processes):
            failed = next((number for number, status in ended.items() if status), None)
            if failed is not None:
                return failed
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                raise TimeoutError(f"The job took longer than {timeout_seconds} s; processes ended: {sorted(ended)}.")
            change.wait(left)
        return next((number for number, status in ended.items() if status), None)


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Ask what still runs to end, and after a while make it."""
    running = [process for process in processes if process.poll() is None]
    for process in running:
        process.terminate()
    deadline = time.monotonic() + GRACE_SECONDS
    for process in running:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextmanager
def _forwarding_signals(processes: Sequence[subprocess.Popen[bytes]]) -> Iterator[None]:
    """Pass on SIGINT, SIGTERM and SIGUSR1, each as often as it comes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def forward(number: int, frame: FrameType | None) -> None:
        del frame
        for process in processes:
            process.send_signal(number)

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = {number: signal.signal(number, forward) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _tail(path: pathlib.Path) -> str:
    if not path.exists():
        return ""
    return "\n".join(path.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:])


def train_processes(arguments: Sequence[str], *, num_processes: int, run_dir: pathlib.Path) -> int:
    """Run `jaxdist` with `arguments` in several processes; process 0 has the terminal, the others log to `run_dir`."""
    command = [sys.executable, "-m", "jaxdist.cli", *arguments]
    result = run_job(command, num_processes=num_processes, log_dir=run_dir / "logs", show_first=True)
    if result.failed_process:
        print(f"jaxdist: process {result.failed_process} failed first:\n{result.message}", file=sys.stderr)
    return result.exit_status
