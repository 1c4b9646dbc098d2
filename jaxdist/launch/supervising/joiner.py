"""The side of `jaxdist join`: connects to the supervisor of a job on this machine, and starts processes at its word."""

import contextlib
import json
import os
import pathlib
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import IO, Any, TypeAlias

from jaxdist.errors import ExitStatus, UserError, say
from jaxdist.launch import parent
from jaxdist.launch import signals as stop_signals
from jaxdist.launch.supervising import fork_server, joined, local_job
from jaxdist.launch.supervising.restart_events import read_events
from jaxdist.rundir import lock

Message: TypeAlias = dict[str, Any]
_LOOK_SECONDS = 0.2


def connect(run_dir: pathlib.Path) -> socket.socket:
    """Return the connection to the supervisor of the job in `run_dir`.

    Raises:
      UserError: no job that can be joined runs there.
    """
    starts = [event for event in read_events(run_dir) if event["event"] == "start" and "memory" in event]
    if not starts or not lock.is_locked(run_dir):
        raise UserError(
            "Only a running job that was started with --processes, or by a parameter server, can be joined or left; "
            f"{run_dir} has none. Start it by `jaxdist train EXPERIMENT --processes P`, on this machine."
        )
    channel = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        channel.connect(str(pathlib.Path(starts[-1]["memory"]) / joined.SOCKET_NAME))
    except OSError as error:
        channel.close()
        raise UserError(
            f"The job in {run_dir} cannot be reached from here: {error.strerror}. Join or leave it on the machine, "
            "and as the user, that started it."
        ) from error
    return channel


def leave(run_dir: pathlib.Path, num_processes: int) -> None:
    """Have so many processes leave the job in `run_dir` at the end of a step.

    Raises:
      UserError: no job runs there, or no process would be left.
    """
    with connect(run_dir) as channel:
        channel.send(json.dumps({"leave": num_processes}).encode())
        reply = json.loads(channel.recv(joined.MAX_MESSAGE) or b'{"error": "The job has ended."}')
    if "error" in reply:
        raise UserError(reply["error"])
    leaves = "1 process leaves" if num_processes == 1 else f"{num_processes} processes leave"
    say(f"{leaves} the job at the end of a step.")


def join(run_dir: pathlib.Path, num_processes: int, preload: Sequence[str]) -> int:
    """Join the job in `run_dir` with so many processes, until it ends or they have left; return the exit status.

    The processes import the modules `preload` first.

    Raises:
      UserError: no job that can be joined runs there.
    """
    with connect(run_dir) as channel:
        memory = pathlib.Path(channel.getpeername()).parent
        channel.send(json.dumps({"join": True}).encode())
        greeting = json.loads(channel.recv(joined.MAX_MESSAGE) or b"{}")
        if not greeting:
            raise UserError(f"The job in {run_dir} has just ended.")
        os.chdir(greeting["directory"])  # the arguments of the job may be relative to it
        experiment = next((each for each in greeting["arguments"] if each.endswith(".py")), None)
        with contextlib.closing(fork_server.ForkServer(preload, experiment=experiment)) as forks:
            forks.is_ready()
            forks.preload(memory / joined.MODULES_NAME)
            joiner = _Joiner(channel, num_processes, forks.start)
            with stop_signals.handled(joiner.leave):
                return joiner.run()


class _Joiner:
    """Starts the processes of one connection and reports how they end.

    `num_processes` are offered through the channel to the supervisor; `fork` starts a process without imports, or
    returns None.
    """

    def __init__(self, channel: socket.socket, num_processes: int, fork: Callable[..., local_job.Process | None]):
        self._channel, self._offered, self._fork = channel, num_processes, fork
        self._running: dict[int, local_job.Process] = {}
        self._lock = threading.Lock()
        self._over: str | None = None
        self._asked_at: float | None = None

    def run(self) -> int:
        """Serve the supervisor until the job is over, or the processes have left."""
        self._send({"ready": self._offered})
        joins = "1 process joins" if self._offered == 1 else f"{self._offered} processes join"
        say(f"{joins} the job at the end of a step. Ctrl-C takes them out again.")
        try:
            while self._over is None and (self._offered or self._running):
                if select.select([self._channel], [], [], _LOOK_SECONDS)[0]:
                    self._receive()
        finally:
            for process in list(self._running.values()):
                process.send_signal(signal.SIGKILL)
        say(self._over or "The processes have left the job.")
        return ExitStatus.FAILED if self._over == _GONE else ExitStatus.OK

    def _receive(self) -> None:
        message, streams, _, _ = socket.recv_fds(self._channel, joined.MAX_MESSAGE, 1)
        with contextlib.ExitStack() as stack:
            output = [stack.enter_context(os.fdopen(stream, "wb")) for stream in streams]
            match json.loads(message or b"{}"):
                case {"start": arguments, "environment": environment}:
                    self._start(arguments, environment, output[0])
                case {"offer": int() as count}:
                    self._offered = count
                case {"over": text}:
                    self._over = text
                case _:
                    self._over = _GONE

    def _start(self, arguments: Sequence[str], environment: Mapping[str, str], output: IO[bytes]) -> None:
        command = [sys.executable, "-m", "jaxdist.cli", *arguments]
        settings = {**os.environ, **environment, parent.PARENT_ID: str(os.getpid())}
        try:
            process = self._fork(command, settings, output) or local_job.start(command, settings, output)
        except OSError as error:
            say(f"A process could not be started: {error.strerror}.")
            self._send({"started": None})
            return
        with self._lock:
            self._running[process.pid] = process
        self._send({"started": process.pid})
        threading.Thread(target=self._await_end, args=(process,), daemon=True).start()

    def _await_end(self, process: local_job.Process) -> None:
        status = process.wait()
        self._send({"ended": process.pid, "status": status})
        with self._lock:
            del self._running[process.pid]

    def leave(self, *_: object) -> None:
        """Leave at the end of a step; asked again, a second or more later, at once."""
        if self._asked_at is None:
            self._asked_at = time.monotonic()
            self._offered = 0
            self._send({"offer": 0})
        elif time.monotonic() - self._asked_at >= stop_signals.SAME_REQUEST_SECONDS:
            self._over = "The processes were ended."

    def _send(self, message: Message) -> None:
        with contextlib.suppress(OSError):  # the job is over
            self._channel.send(json.dumps(message).encode())


_GONE = "The supervisor of the job has ended without a word; its processes here are ended too."
