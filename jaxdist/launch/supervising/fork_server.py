"""The fork server: a process that has imported what the processes of a job need, and forks one on request.

Importing JAX and Flax costs every process seconds of processor time, and at a restart all of them pay at once.
A fork of a process that has imported them pays nothing. Forking is safe while the process has one thread and no
backend of JAX runs. The fork server therefore starts no thread, counts its threads before it offers a fork, and
declines if an import (for example of the user's experiment) has started any. The supervisor then starts new processes
without it. What the processes import later, when they need it (the writer of TensorBoard, for example), is imported in
advance for the next ones.

The fork server outlives the supervisor: it then runs the module that saves what a supervisor that was killed could not.
"""

import contextlib
import ctypes
import gc
import json
import os
import pathlib
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from typing import IO, Any

from jaxdist.errors import ExitStatus
from jaxdist.launch.supervising import stopped

_PR_SET_CHILD_SUBREAPER = 36
_MAX_MESSAGE = 1 << 20
_READY, _UNSAFE = b"ready", b"unsafe"
_ANSWER_SECONDS = 120.0
"""How long the imports of the fork server may take; after that the processes make their own."""
_LOOK_SECONDS = 0.5
_TRIAL_SECONDS, _TRIAL_NICE = 60, 10
_FORKABLE_THREADS = ("jemalloc_bg_thd",)
"""Threads of libraries that hold them still while a process forks: jemalloc's, which pyarrow starts when imported."""
_IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
"""Sent to a whole group, these must not end the fork server, which is needed when the supervisor is killed."""


class Child:
    """A process forked by the fork server and adopted by this one, with methods of `subprocess.Popen`."""

    def __init__(self, process_id: int):
        self.pid = process_id
        self.returncode: int | None = None
        self._descriptor = os.pidfd_open(process_id)
        self._lock = threading.Lock()
        weakref.finalize(self, os.close, self._descriptor)

    def poll(self) -> int | None:
        """Return the exit status, minus the signal that killed it, or None while it runs."""
        with self._lock:
            if self.returncode is None:
                ended, status = os.waitpid(self.pid, os.WNOHANG)
                self.returncode = os.waitstatus_to_exitcode(status) if ended else None
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Return the exit status once it has ended; raises subprocess.TimeoutExpired."""
        poll = select.poll()
        poll.register(self._descriptor, select.POLLIN)
        if not poll.poll(None if timeout is None else timeout * 1000):
            raise subprocess.TimeoutExpired(str(self.pid), timeout or 0.0)
        status = self.poll()
        assert status is not None
        return status

    def send_signal(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._descriptor, number)


class ForkServer:
    """Starts processes that run a module as `python -m MODULE` does, without the time for imports.

    The modules `preload`, not those to run, are imported in advance, and so is what `experiment` imports: that file is
    run under another name, and again by each process, which reports its errors. Of `module:function` in `preload` the
    function is then called.
    """

    def __init__(self, preload: Sequence[str] = (), *, experiment: str | None = None):
        self._usable: bool | None = None
        self._environment = dict(os.environ)  # that of the fork server
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # A forked process is orphaned on purpose; being the reaper makes it this process's own child.
        _prctl(_PR_SET_CHILD_SUBREAPER, 1)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, str(theirs.fileno()), experiment or "", *preload],
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        self._channel = ours

    def close(self) -> None:
        """End the fork server; the processes it started continue."""
        self._process.kill()
        self._channel.close()
        self._process.wait()
        _prctl(_PR_SET_CHILD_SUBREAPER, 0)

    def is_ready(self) -> bool:
        """Return whether the fork server can start processes, once its imports are made."""
        if self._usable is None:
            self._usable = self._receive() == _READY
        return self._usable

    def start(self, command: Sequence[str], environment: Mapping[str, str], output: IO[bytes] | None) -> Child | None:
        """Start a process and return it; None if the fork server cannot, or has ended.

        `command` is `[sys.executable, "-m", module, arguments...]`. Without `output` the process shares that of this
        one.
        """
        if not self.is_ready():
            return None
        changed = {name: value for name, value in environment.items() if self._environment.get(name) != value}
        request = json.dumps({"module": command[2], "arguments": command[3:], "environment": changed}).encode()
        streams = [1, 2] if output is None else 2 * [output.fileno()]
        try:
            socket.send_fds(self._channel, [request], streams)
        except OSError:
            self._usable = False
            return None
        reply = self._receive()
        self._usable = bool(reply)
        return Child(int(reply)) if reply else None

    def preload(self, names: pathlib.Path) -> None:
        """Have the modules named in a file imported, too, before the next fork, unless that would start threads."""
        with contextlib.suppress(OSError):
            self._channel.send(json.dumps({"preload": str(names)}).encode())

    def run_at_end(self, module: str, *arguments: str) -> None:
        """Have a module run as `python -m` does when this process has ended without `close`: when it was killed."""
        request = {"module": module, "arguments": arguments, "environment": {}}
        with contextlib.suppress(OSError):
            self._channel.send(json.dumps({"at_end": request}).encode())

    def _receive(self) -> bytes:
        """Return the next message; empty if the fork server was killed, is stopped, or does not answer in time."""
        deadline = time.monotonic() + _ANSWER_SECONDS
        while not select.select([self._channel], [], [], _LOOK_SECONDS)[0]:
            if stopped.is_stopped(self._process.pid) or time.monotonic() >= deadline:
                self._process.kill()
                return b""
        try:
            return self._channel.recv(_MAX_MESSAGE)
        except OSError:  # it was killed
            return b""


def _prctl(option: int, value: int) -> None:
    ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


def main(arguments: Sequence[str]) -> None:
    """Run the fork server until its supervisor has ended; in a forked process, run the module it was forked for."""
    channel = socket.socket(fileno=int(arguments[0]))
    before = {number: signal.signal(number, signal.SIG_IGN) for number in _IGNORED}
    _preload(arguments[2:], arguments[1])
    usable = _may_fork()
    with contextlib.suppress(BrokenPipeError):
        channel.send(_READY if usable else _UNSAFE)
    request = _serve(channel, before)
    channel.close()
    if request is not None:
        _run(request)


def _preload(modules: Sequence[str], experiment: str) -> None:
    prepared = [name.partition(":") for name in modules]
    for module, _, _ in prepared:
        __import__(module)
    if experiment:
        sys.path.insert(0, str(pathlib.Path(experiment).resolve().parent))
        # If the file has a mistake, the process that trains it reports it.
        with contextlib.suppress(Exception):
            runpy.run_path(experiment, run_name="jaxdist_preloaded")
        sys.path.pop(0)
    for module, _, function in prepared:
        if function:
            getattr(sys.modules[module], function)()


def _may_fork() -> bool:
    """Return whether this process has one thread, apart from those of libraries that support forking.

    Some, such as OpenBLAS, end their threads before a fork; so fork once, then count.
    """
    trial = os.fork()
    if not trial:
        os._exit(ExitStatus.OK)
    os.waitpid(trial, 0)
    names = [path.read_text().strip() for path in pathlib.Path("/proc/self/task").glob("*/comm")]
    return sum(name not in _FORKABLE_THREADS for name in names) == 1


def _serve(channel: socket.socket, handlers: Mapping[signal.Signals, Any]) -> dict[str, Any] | None:
    """Fork on each request and send the child's number; return the request in a child, that of the end at the end."""
    at_end: dict[str, Any] | None = None
    further = _FurtherImports()
    while True:
        further.make_until(channel)
        message, streams, _, _ = socket.recv_fds(channel, _MAX_MESSAGE, 2)
        if not message:
            further.end()
            return at_end
        request: dict[str, Any] = json.loads(message)
        if "at_end" in request:
            at_end = request["at_end"]
            continue
        if "preload" in request:
            further.begin(pathlib.Path(request["preload"]), channel)
            continue
        # What is imported stays: the collector of a fork would look at all of it, and so copy it, again and again.
        gc.freeze()
        process_id = _fork_orphan()
        if not process_id:
            further.forget()
            os.setsid()
            for number, handler in handlers.items():
                signal.signal(number, handler)
            for stream, standard in zip(streams, (1, 2), strict=True):
                os.dup2(stream, standard)
        for stream in streams:
            os.close(stream)
        if not process_id:
            return request
        channel.send(str(process_id).encode())


class _FurtherImports:
    """Imports that are made between requests, if a trial in a fork shows that this process can still fork then.

    No request waits for the trial, which may take long where the processes that train leave it no time, nor for more
    than one of the imports.
    """

    def __init__(self) -> None:
        self._names: list[str] = []
        self._trial: tuple[int, int] | None = None
        self._passed = False

    def begin(self, names: pathlib.Path, channel: socket.socket) -> None:
        """Begin the trial with the modules named in a file."""
        self.end()
        self._passed = False
        try:
            self._names = [name for name in names.read_text().split() if name not in sys.modules]
        except OSError:  # the job has just ended
            return
        trial = os.fork()
        if not trial:
            channel.close()
            signal.alarm(_TRIAL_SECONDS)  # an import that waits for something ends the trial
            os.nice(_TRIAL_NICE)
            _try_to_import(self._names)
            os._exit(ExitStatus.OK if _may_fork() else ExitStatus.FAILED)
        self._trial = trial, os.pidfd_open(trial)

    def make_until(self, channel: socket.socket) -> None:
        """Return once there is a request; until then, wait for the trial and make the imports."""
        while True:
            waiting = self._trial[1:] if self._trial else ()
            busy = self._passed and self._names
            ready = select.select([channel, *waiting], [], [], 0 if busy else None)[0]
            if channel in ready:
                return
            if self._trial and ready:
                self._passed = os.waitpid(self._trial[0], 0)[1] == 0
                self.forget()
            elif busy:
                _try_to_import([self._names.pop(0)])

    def forget(self) -> None:
        """Have nothing more to do with the trial."""
        if self._trial:
            os.close(self._trial[1])
        self._trial = None

    def end(self) -> None:
        """End the trial."""
        if self._trial:
            os.kill(self._trial[0], signal.SIGKILL)
            os.waitpid(self._trial[0], 0)
        self.forget()


def _try_to_import(names: Sequence[str]) -> None:
    for name in names:
        # Some cannot be imported by their name, and those that fail are left to the process that needs them.
        with contextlib.suppress(Exception):
            __import__(name)


def _fork_orphan() -> int:
    """Return the number of a new process whose parent is this one's parent, 0 in the new process.

    It is forked by a process that ends at once, and continues when it has been adopted.
    """
    (told, tell), (gate, open_gate) = os.pipe(), os.pipe()
    between = os.fork()
    if not between:
        child = os.fork()
        if child:
            os.write(tell, str(child).encode())
            os._exit(ExitStatus.OK)
        os.close(open_gate)
        os.read(gate, 1)
        for descriptor in (told, tell, gate):
            os.close(descriptor)
        return 0
    os.waitpid(between, 0)
    child = int(os.read(told, 32))
    for descriptor in (told, tell, gate, open_gate):
        os.close(descriptor)
    return child


def _run(request: Mapping[str, Any]) -> None:
    """Do as `python -m MODULE` does."""
    os.environ.update(request["environment"])
    sys.argv = [request["module"], *request["arguments"]]
    sys.stdout.reconfigure(line_buffering=os.isatty(1))  # type: ignore[union-attr]
    if "numpy" in sys.modules:  # as in a newly started process
        sys.modules["numpy"].random.seed()
    runpy.run_module(request["module"], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(sys.argv[1:])
