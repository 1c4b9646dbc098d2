"""The supervisor's side of `jaxdist join`: a socket in the job's directory in memory, and the processes behind it.

A command that joins (see `joiner`) stays connected for as long as its processes belong to the job. The supervisor has
it start processes, watches and signals them itself, because they are on the same machine, and is told how they ended.
When the connection ends without a word, the processes are lost.

Messages are JSON objects, one a packet. A command sends {"leave": N} and gets {"left": N} or {"error": text}; or it
sends {"join": true}, gets {"directory", "arguments"}, and sends {"ready": N} once its imports are made. The supervisor
sends {"start": arguments, "environment"} with the file of the output, and gets {"started": process id}; {"ended":
process id, "status": S} follows. {"offer": N} lowers the number of processes, from either side; {"over": text} ends the
connection.
"""

import contextlib
import errno
import json
import os
import pathlib
import queue
import select
import signal
import socket
import subprocess
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import IO, Any

from jaxdist.errors import UserError
from jaxdist.launch.supervising import roster

SOCKET_NAME = "join"
MODULES_NAME = "modules"
"""The file in the same directory in which process 0 names the modules that it has imported."""
MAX_MESSAGE = 1 << 20
_ANSWER_SECONDS = 120.0
_STATUS_SECONDS = 2.0
_OURS = "JAXDIST_"


class ProcessLostError(OSError):
    """A process could not be started, because the command that joined has ended."""


class JoinedProcess:
    """A process of a member, which is no child of this process; with the methods of `local_job.Process`."""

    def __init__(self, process_id: int, descriptor: int | None):
        self.pid = process_id
        self.returncode: int | None = None
        self._descriptor = descriptor
        self._told = threading.Event()
        self._status = -signal.SIGKILL
        if descriptor is not None:
            weakref.finalize(self, os.close, descriptor)

    def tell(self, status: int) -> None:
        """Note the exit status, which the parent of the process reports."""
        self._status = status
        self._told.set()

    def poll(self) -> int | None:
        """Return the exit status, None while it runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.wait(0.0)
        return None

    def wait(self, timeout: float | None = None) -> int:
        """Return the exit status once it has ended; if its parent cannot report it, it counts as killed."""
        if self.returncode is None:
            poll = select.poll()
            if self._descriptor is not None:
                poll.register(self._descriptor, select.POLLIN)
                if not poll.poll(None if timeout is None else timeout * 1000):
                    raise subprocess.TimeoutExpired(str(self.pid), timeout or 0.0)
            self._told.wait(_STATUS_SECONDS)
            self.returncode = self._status
        return self.returncode

    def send_signal(self, number: int, /) -> None:
        """Send a signal, unless it has ended."""
        if self._descriptor is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._descriptor, number)


class Joined:
    """The processes of one `jaxdist join`: a member of the roster.

    Attributes:
      num_processes: how many it offers now.
      lost: whether the command ended without leaving.
    """

    def __init__(self, channel: socket.socket, num_processes: int):
        self.num_processes, self.lost = num_processes, False
        self._channel = channel
        self._replies: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._processes: dict[int, JoinedProcess] = {}
        self._early: dict[int, int] = {}
        self._lock = threading.Lock()

    def offer(self, num_processes: int) -> None:
        """Lower the number of processes, and tell the command."""
        self.num_processes = num_processes
        self.say({"offer": num_processes})

    def say(self, message: Mapping[str, Any]) -> None:
        """Send a message; a command that has ended does not get it."""
        with contextlib.suppress(OSError):
            self._channel.send(json.dumps(message).encode())

    def start(self, command: Sequence[str], environment: Mapping[str, str], output: IO[bytes] | None) -> JoinedProcess:
        """Have the command start a process, in its own environment and with our variables.

        Raises:
          ProcessLostError: it has ended, or could not start one.
        """
        assert output is not None  # only process 0, which is the supervisor's own, writes to its terminal
        ours = {name: value for name, value in environment.items() if name.startswith(_OURS)}
        request = json.dumps({"start": list(command[3:]), "environment": ours}).encode()
        reply = None
        with contextlib.suppress(OSError, queue.Empty):
            socket.send_fds(self._channel, [request], [output.fileno()])
            reply = self._replies.get(timeout=_ANSWER_SECONDS)
        if reply is None:
            raise ProcessLostError(errno.ESRCH, "a process that joined could not be started again")
        process = JoinedProcess(reply, _pidfd(reply))
        with self._lock:
            self._processes = {reply: process} | {
                number: each for number, each in self._processes.items() if each.returncode is None
            }
            if reply in self._early:
                process.tell(self._early.pop(reply))
        return process

    def read(self, changed: Callable[[], object]) -> None:
        """Read what the command says, until it has ended; `changed` is called when it offers fewer processes."""
        while message := _receive(self._channel):
            match message:
                case {"started": int() | None as process_id}:
                    self._replies.put(process_id)
                case {"ended": process_id, "status": status}:
                    self._note_end(process_id, status)
                case {"offer": int() as count}:
                    self.num_processes = min(count, self.num_processes)
                    changed()
        self.lost = bool(self.num_processes)
        self.num_processes = 0
        self._replies.put(None)
        with self._lock:
            for process in self._processes.values():
                process.tell(-signal.SIGKILL)
        changed()

    def _note_end(self, process_id: int, status: int) -> None:
        with self._lock:
            if process_id in self._processes:
                self._processes[process_id].tell(status)
            else:  # it ended before `start` has read that it was started
                self._early[process_id] = status


def _pidfd(process_id: int) -> int | None:
    with contextlib.suppress(ProcessLookupError):
        return os.pidfd_open(process_id)
    return None


def _receive(channel: socket.socket) -> dict[str, Any]:
    """Return the next message, {} at the end of the connection."""
    with contextlib.suppress(OSError, ValueError):
        content = json.loads(channel.recv(MAX_MESSAGE) or b"{}")
        return content if isinstance(content, dict) else {}
    return {}


class Reception:
    """While entered, takes in the commands that connect to the socket in `directory`; a thread serves each.

    `directory` is in memory, and only this user may open it. `arguments`, the command line of the job's processes,
    tells a command what to import.
    """

    def __init__(self, directory: pathlib.Path, taking_part: roster.Roster, arguments: Sequence[str]):
        self._path, self._roster, self._arguments = directory / SOCKET_NAME, taking_part, list(arguments)
        self._listener: socket.socket | None = None
        self._channels: list[socket.socket] = []

    def __enter__(self) -> "Reception":
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:  # the path may be too long, where the directory is not in memory
            listener.bind(str(self._path))
            listener.listen()
        except OSError:
            listener.close()
            return self
        self._listener = listener
        threading.Thread(target=self._accept, args=(listener,), name="jaxdist-join", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._listener is None:
            return
        self._path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for channel in list(self._channels):
            with contextlib.suppress(OSError):
                channel.send(json.dumps({"over": "The job has ended."}).encode())

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):  # closed at the end
            while True:
                channel, _ = listener.accept()
                self._channels.append(channel)
                threading.Thread(target=self._serve, args=(channel,), name="jaxdist-joined", daemon=True).start()

    def _serve(self, channel: socket.socket) -> None:
        with channel:
            match _receive(channel):
                case {"leave": int() as count}:
                    channel.send(json.dumps(self._lower(count)).encode())
                case {"join": True}:
                    self._take_in(channel)
            self._channels.remove(channel)

    def _take_in(self, channel: socket.socket) -> None:
        with contextlib.suppress(OSError):
            channel.send(json.dumps({"directory": os.getcwd(), "arguments": self._arguments}).encode())
            match _receive(channel):
                case {"ready": int() as count} if count > 0:
                    member = Joined(channel, count)
                    self._roster.add(member)
                    member.read(self._roster.changed)

    def _lower(self, count: int) -> dict[str, Any]:
        try:
            self._roster.lower(count)
        except UserError as error:
            return {"error": str(error)}
        return {"left": count}
