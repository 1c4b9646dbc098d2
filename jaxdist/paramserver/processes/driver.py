"""Runs a state machine in a process: clock, files, network, and the order in which effects happen.

One thread calls the state machine; all inputs (messages, finished writes, gradients) reach it through one queue. The
effects of a message are done before its replies are sent, as `effects` requires.
"""

import contextlib
import logging
import os
import pathlib
import queue
import threading
import time
from collections.abc import Callable, Iterable
from concurrent import futures
from typing import Any, Protocol

from jaxdist.errors import ExitStatus
from jaxdist.paramserver.processes import faults
from jaxdist.paramserver.protocol import effects, messages
from jaxdist.paramserver.wire import codec, encoding
from jaxdist.rundir import files, full_disk

_logger = logging.getLogger(__name__)

PULSE_SECONDS, MOST_SILENT_SECONDS = 0.5, 120.0
"""How often, and for how long, heartbeats are repeated while one message is being handled."""

Gradient = Callable[[effects.Compute], messages.Computed]
Prepare = Callable[[messages.Lease], None]


class StateMachine(Protocol):
    """What server, scheduler and worker have in common."""

    def handle(self, message: messages.Message, now: float) -> tuple[list[effects.Send], list[effects.Effect]]:
        """Handle one message; return what to send after the effects are done."""
        ...


class Sender(Protocol):
    """Delivers messages or drops them."""

    def send(self, to: str, message: messages.Message) -> None:
        """Send `message` to the process named `to`."""
        ...


class Log:
    """The log of the scheduler: framed records, each of which is durable before `append` returns.

    On a full disk it waits for room: a step that is not in the log may be made twice after a restart.
    """

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        data = path.read_bytes() if path.exists() else b""
        payloads = list(encoding.unframe(data))
        self.records = [encoding.decode(bytes(payload)) for payload in payloads]
        whole = b"".join(encoding.frame(payload) for payload in payloads)
        if len(whole) < len(data):  # an incomplete record was never acted on
            write_file(path, [whole])
        self._file = path.open("ab")

    def append(self, record: messages.Message) -> None:
        """Append a record and make it durable."""
        frame, descriptor = encoding.frame(encoding.to_bytes(record)), self._file.fileno()
        full_disk.until_written(lambda: files.append(descriptor, frame), str(self.path))
        os.fsync(descriptor)

    def replace(self, record: messages.Message) -> None:
        """Replace the whole log by `record`, atomically and durably."""
        frame = encoding.frame(encoding.to_bytes(record))
        full_disk.until_written(lambda: write_file(self.path, [frame]), str(self.path))
        self._file.close()
        self._file = self.path.open("ab")


def write_file(path: pathlib.Path, parts: Iterable[codec.Buffer]) -> int:
    """Write a file atomically, make its folder if needed, and return the CRC-32 of its bytes. Durable on return."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return files.write(path, parts)


class Driver:
    """Runs one state machine until it exits.

    Args:
      machine: the state machine.
      directory: the directory of its files.
      log: the log of a scheduler; None for other roles.
      gradient: computes the gradients of a worker, in its own thread.
      prepare: reads the examples of a lease before its params have arrived, in the same thread.
      observe: called with every effect after it is done, for example effects.Committed or effects.ShowCut.
      tick_seconds: seconds between two ticks.
      point: called before and after everything this process does; see `faults`.
    """

    def __init__(
        self,
        machine: StateMachine,
        *,
        directory: pathlib.Path,
        log: Log | None = None,
        gradient: Gradient | None = None,
        prepare: Prepare = lambda lease: None,
        observe: Callable[[effects.Effect], None] = lambda effect: None,
        tick_seconds: float = 0.05,
        point: faults.Point = faults.no_faults,
    ) -> None:
        self.machine, self.directory, self._log = machine, directory, log
        self._gradient, self._prepare = gradient, prepare
        self._observe, self._tick_seconds = observe, tick_seconds
        self._point = point
        self._inbox: queue.SimpleQueue[tuple[messages.Message, Callable[[], None]]] = queue.SimpleQueue()
        self._pool = futures.ThreadPoolExecutor(1, "compute")
        self._disk = futures.ThreadPoolExecutor(1, "disk")
        self.exit: effects.Exit | None = None
        self._beat: tuple[str, messages.Heartbeat] | None = None  # the last one sent
        self._beat_at = 0.0

    def receive(self, message: messages.Message, handled: Callable[[], None] = lambda: None) -> None:
        """Queue a message, from any thread; `handled` is called when it has been handled."""
        self._inbox.put((message, handled))

    def run(self, wire: Sender) -> effects.Exit:
        """Run the state machine until it exits; return its exit effect."""
        tick_at = 0.0
        threading.Thread(target=self._pulse, args=(wire,), daemon=True, name="pulse").start()
        while self.exit is None:
            now = time.monotonic()
            if now >= tick_at:
                tick_at = now + self._tick_seconds
                self._feed(messages.Tick(), now, wire)
                continue
            try:
                message, handled = self._inbox.get(timeout=tick_at - now)
            except queue.Empty:
                continue
            self._feed(message, time.monotonic(), wire)
            handled()
        self._disk.shutdown()
        self._pool.shutdown(wait=False, cancel_futures=True)
        return self.exit

    def _feed(self, message: messages.Message, now: float, wire: Sender) -> None:
        self._point("hear", message)
        replies, todo = self.machine.handle(message, now)
        for effect in todo:
            self._point("do", effect)
            self._do(effect)
            self._point("did", effect)
        for to, reply in replies:
            if isinstance(reply, messages.Heartbeat):
                self._beat, self._beat_at = (to, reply), now
            for _ in range(self._point("send", reply)):
                wire.send(to, reply)

    def _pulse(self, wire: Sender) -> None:
        """Repeat the last heartbeat while one message takes long to handle: a process at work must not seem silent."""
        while self.exit is None:
            time.sleep(PULSE_SECONDS)
            beat, silent = self._beat, time.monotonic() - self._beat_at
            if beat is not None and PULSE_SECONDS < silent < MOST_SILENT_SECONDS:
                wire.send(*beat)

    def _do(self, effect: effects.Effect) -> None:
        match effect:
            case effects.Append(record):
                assert self._log is not None
                self._log.append(record)
            case effects.Compact(record):
                assert self._log is not None
                self._log.replace(record)
            case effects.Write(name, content):
                self._disk.submit(self._write, name, content)
            case effects.Load(name):
                self._disk.submit(self._load, name)
            case effects.Prepare(lease):
                self._pool.submit(self._in_pool, self._prepare, lease)
            case effects.Compute():
                self._pool.submit(self._in_pool, self._compute, effect)
            case effects.Warn(text):
                _logger.warning(text)
            case effects.Exit():
                self.exit = effect
        self._observe(effect)

    def _write(self, name: str, content: messages.Message) -> None:
        try:
            checksum = write_file(self.directory / name, encoding.encode(content))
        except OSError as error:
            self.receive(messages.Written(name, 0, f"{error.strerror} ({self.directory / name})"))
        else:
            self.receive(messages.Written(name, checksum, ""))

    def _load(self, name: str) -> None:
        content = None
        with contextlib.suppress(FileNotFoundError, codec.EncodingError):  # the state machine decides what this means
            content = encoding.decode((self.directory / name).read_bytes())
        self.receive(messages.Loaded(name, content))

    def _compute(self, effect: effects.Compute) -> None:
        assert self._gradient is not None
        self.receive(self._gradient(effect))

    def _in_pool(self, work: Callable[[Any], None], what: effects.Compute | messages.Lease) -> None:
        try:
            work(what)
        except Exception:
            # The state machine would wait forever. The process ends instead, and another worker gets the lease.
            lease = what.lease if isinstance(what, effects.Compute) else what
            _logger.exception("The gradient of %s could not be computed.", lease)
            os._exit(ExitStatus.FAILED)
