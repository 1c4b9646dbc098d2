"""A state machine as a real process: its clock, its files, its wire, and the order in which effects happen.

One thread feeds the machine; everything else (messages, finished writes, gradients) reaches it through one queue. The
effects of a message are done before its replies leave, as `effects` promises.
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

from jaxdist.paramserver.processes import faults
from jaxdist.paramserver.protocol import effects, messages
from jaxdist.paramserver.wire import codec, encoding
from jaxdist.rundir import files

_logger = logging.getLogger(__name__)

MOST_WAITING = 16
ROOM_SECONDS = 30.0
PULSE_SECONDS, MOST_SILENT_SECONDS = 0.5, 120.0
"""How often, and for how long, heartbeats are repeated for a machine that handles one message."""

Gradient = Callable[[effects.Compute], messages.Computed]


class Machine(Protocol):
    """What server, scheduler and worker have in common."""

    def handle(self, message: messages.Message, now: float) -> tuple[list[effects.Send], list[effects.Effect]]:
        """Take in one message; return what to send after the effects are done."""
        ...


class Sender(Protocol):
    """Delivers messages or drops them."""

    def send(self, to: str, message: messages.Message) -> None:
        """Send `message` to the process named `to`."""
        ...


class Log:
    """The scheduler's log: framed records, each durable before `append` returns."""

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        data = path.read_bytes() if path.exists() else b""
        payloads = list(encoding.unframe(data))
        self.records = [encoding.decode(bytes(payload)) for payload in payloads]
        whole = b"".join(encoding.frame(payload) for payload in payloads)
        if len(whole) < len(data):  # a record that was torn when the last process died was never acted on
            write_file(path, [whole])
        self._file = path.open("ab")

    def append(self, record: messages.Message) -> None:
        """Add a record and make it durable."""
        self._file.write(encoding.frame(encoding.to_bytes(record)))
        self._file.flush()
        os.fsync(self._file.fileno())

    def replace(self, record: messages.Message) -> None:
        """Make `record` the whole log, atomically and durably."""
        write_file(self.path, [encoding.frame(encoding.to_bytes(record))])
        self._file.close()
        self._file = self.path.open("ab")


def write_file(path: pathlib.Path, parts: Iterable[codec.Buffer]) -> int:
    """Write a file, and its folder, wholly or not at all; return the CRC-32 of its bytes. Durable on return."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return files.write(path, parts)


class Driver:
    """Drives one machine until it exits.

    Args:
      machine: the state machine.
      directory: where its files are.
      log: of a scheduler.
      gradient: computes what a worker asks for, in a thread of its own.
      observe: called with the effects that only inform (effects.Committed, effects.ShowCut, effects.Applied, ...).
      tick_seconds: how often time passes for the machine.
      point: told of everything this node does; see `faults`.
    """

    def __init__(
        self,
        machine: Machine,
        *,
        directory: pathlib.Path,
        log: Log | None = None,
        gradient: Gradient | None = None,
        observe: Callable[[effects.Effect], None] = lambda effect: None,
        tick_seconds: float = 0.05,
        point: faults.Point = faults.no_faults,
    ) -> None:
        self.machine, self.directory, self._log, self._gradient = machine, directory, log, gradient
        self._observe, self._tick_seconds = observe, tick_seconds
        self._point = point
        self._inbox: queue.SimpleQueue[tuple[messages.Message, bool]] = queue.SimpleQueue()
        self._room = threading.Semaphore(MOST_WAITING)
        self._pool = futures.ThreadPoolExecutor(1, "compute")
        self._disk = futures.ThreadPoolExecutor(1, "disk")
        self.exit: effects.Exit | None = None
        self._beat: tuple[str, messages.Heartbeat] | None = None  # the last one that left
        self._beat_at = 0.0

    def receive(self, message: messages.Message) -> None:
        """Hand over a message that arrived, from any thread; waits while many wait to be handled, or drops it then."""
        if self._room.acquire(timeout=ROOM_SECONDS):
            self._inbox.put((message, True))

    def _report(self, message: messages.Message) -> None:
        """Hand over what this process itself found out."""
        self._inbox.put((message, False))

    def run(self, wire: Sender) -> effects.Exit:
        """Feed the machine until it says that its part is over."""
        tick_at = 0.0
        threading.Thread(target=self._pulse, args=(wire,), daemon=True, name="pulse").start()
        while self.exit is None:
            now = time.monotonic()
            if now >= tick_at:
                tick_at = now + self._tick_seconds
                self._feed(messages.Tick(), now, wire)
                continue
            try:
                message, arrived = self._inbox.get(timeout=tick_at - now)
            except queue.Empty:
                continue
            if arrived:
                self._room.release()
            self._feed(message, time.monotonic(), wire)
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
        """Repeat the last heartbeat while one message takes long to handle: a process at work is not silent."""
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
            case effects.Compute():
                self._pool.submit(self._compute, effect)
            case effects.Warn(text):
                _logger.warning(text)
            case effects.Exit():
                self.exit = effect
        self._observe(effect)

    def _write(self, name: str, content: messages.Message) -> None:
        try:
            checksum = write_file(self.directory / name, encoding.encode(content))
        except OSError as error:
            self._report(messages.Written(name, 0, f"{error.strerror} ({self.directory / name})"))
        else:
            self._report(messages.Written(name, checksum, ""))

    def _load(self, name: str) -> None:
        content = None
        with contextlib.suppress(FileNotFoundError, codec.EncodingError):  # the state machine says what that means
            content = encoding.decode((self.directory / name).read_bytes())
        self._report(messages.Loaded(name, content))

    def _compute(self, effect: effects.Compute) -> None:
        assert self._gradient is not None
        try:
            computed: Any = self._gradient(effect)
        except Exception:
            # The thread's caller is the protocol, which would wait: the process ends instead, and others step in.
            _logger.exception("the gradient of %s failed", effect.lease)
            os._exit(1)
        self._report(computed)
