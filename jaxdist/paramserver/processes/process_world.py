"""The world of a real process: clock, inbox, connections, log, files, and the threads that compute and write."""

import collections
import contextlib
import json
import logging
import os
import pathlib
import threading
import time
from collections.abc import Callable, Iterable
from concurrent import futures
from typing import Any, Protocol

from jaxdist.errors import ExitStatus
from jaxdist.paramserver.processes import driver as drivers
from jaxdist.paramserver.protocol import effects, messages
from jaxdist.paramserver.wire import codec, encoding, log_frames
from jaxdist.rundir import files, full_disk

_logger = logging.getLogger(__name__)

Gradient = Callable[[effects.Compute], messages.Computed]
Prepare = Callable[[messages.Lease], None]


class Sender(Protocol):
    """Delivers messages or drops them."""

    def send(self, to: str, message: messages.Message) -> None:
        """Send `message` to the process named `to`."""


class Log:
    """The log of the scheduler: framed records, each of which outlives this process once `append` has returned.

    On a full disk it waits for room: a step that is not in the log may be made twice after a restart.

    Args:
      path: of its file.
      outlives_machine: whether a scheduler on another machine may read it. Otherwise the run ends with this machine,
        and waiting for the disk would only make each step longer.

    Raises:
      DamagedLogError: the file is damaged. A record that its process did not write to the end is dropped instead.
    """

    def __init__(self, path: pathlib.Path, *, outlives_machine: bool) -> None:
        self.path, self._outlives_machine = path, outlives_machine
        path.parent.mkdir(parents=True, exist_ok=True)
        data = path.read_bytes() if path.exists() else b""
        self._frames = log_frames.LogFrames()
        self.records = [encoding.decode(bytes(record)) for record in self._frames.read(data)]
        if self._frames.size < len(data):  # an incomplete record was never acted on
            write_file(path, [data[: self._frames.size]])
        self._file = path.open("ab")

    def append(self, record: messages.Message) -> None:
        """Append a record; see Log."""
        frame, descriptor = self._frames.frame(encoding.to_bytes(record)), self._file.fileno()
        full_disk.until_written(lambda: files.append(descriptor, frame), str(self.path))
        if self._outlives_machine:
            os.fsync(descriptor)

    def replace(self, record: messages.Message) -> None:
        """Replace the whole log by `record`, atomically and durably."""
        self._frames = log_frames.LogFrames()
        frame = self._frames.frame(encoding.to_bytes(record))
        full_disk.until_written(lambda: write_file(self.path, [frame]), str(self.path))
        self._file.close()
        self._file = self.path.open("ab")


def write_file(path: pathlib.Path, parts: Iterable[codec.Buffer]) -> int:
    """Write a file atomically, make its folder if needed, and return the CRC-32 of its bytes. Durable on return."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return files.write(path, parts)


def write_report(path: pathlib.Path, parts: Iterable[codec.Buffer]) -> None:
    """Write a file atomically that outlives this process but need not outlive the machine; make its folder if needed.

    The thread that handles messages writes such files, so it must not wait for the disk.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_unsynced(path, parts)


def try_report(path: pathlib.Path, content: Any) -> None:
    """Write a report as JSON that a later one replaces; if that fails, log why: no process ends for a report."""
    try:
        write_report(path, [json.dumps(content).encode()])
    except OSError as error:
        if not full_disk.is_full(error):  # then the run waits for room, and says so
            _logger.warning("A report was not written: %s", error)


class ProcessWorld:
    """The World of a process of a run. `run` drives a state machine in it.

    `log` is that of a scheduler, None for other roles. `gradient` computes the gradients of a worker in a thread of its
    own, where `prepare` reads the examples of a lease before its params have arrived.
    """

    def __init__(
        self,
        directory: pathlib.Path,
        *,
        log: Log | None = None,
        gradient: Gradient | None = None,
        prepare: Prepare = lambda lease: None,
    ) -> None:
        self.directory, self._log = directory, log
        self._gradient, self._prepare = gradient, prepare
        self._inbox: collections.deque[drivers.Received] = collections.deque()
        self._heartbeats: collections.deque[drivers.Received] = collections.deque()
        self._turn = threading.Lock()  # of the thread that handles messages
        self._called = threading.Event()  # something has come for the thread that waits in `take`
        self._driver: drivers.Driver | None = None  # set by `run`
        self._failure: BaseException | None = None  # of another thread than that of `run`
        self._pool = futures.ThreadPoolExecutor(1, "compute")
        self._disk = futures.ThreadPoolExecutor(1, "disk")
        self._wire: Sender

    def receive(self, message: messages.Message, handled: Callable[[], None] = lambda: None) -> None:
        """Queue a message, from any thread; `handled` is called when it has been handled."""
        self._put(message, handled)
        self._called.set()

    def receive_small(self, message: messages.Message, handled: Callable[[], None] = lambda: None) -> None:
        """Handle a message that takes little time in the thread that brings it: waking another one takes as long.

        If another thread is handling messages, it handles this one, too.
        """
        self._put(message, handled)
        if self._driver is None:
            self._called.set()
        else:
            self._handle(self._driver)

    def _put(self, message: messages.Message, handled: Callable[[], None]) -> None:
        queue = self._heartbeats if isinstance(message, messages.Heartbeat) else self._inbox
        queue.append((message, handled))

    def _waits(self, driver: drivers.Driver) -> bool:
        return bool(self._inbox or self._heartbeats or driver.continues()) and driver.exit is None

    def _handle(self, driver: drivers.Driver) -> None:
        """Handle all that waits, unless another thread does."""
        # The outer loop is for what another thread put just before this one gave up its turn.
        while self._waits(driver) and self._turn.acquire(blocking=False):
            try:
                while self._waits(driver):
                    driver.turn()
            except BaseException as error:
                self._failure = error
                break
            finally:
                self._turn.release()
        if driver.exit is not None or self._failure is not None:
            self._called.set()

    def connect(self, wire: Sender) -> None:
        """Send through `wire` from now on."""
        self._wire = wire

    def run(self, driver: drivers.Driver, wire: Sender) -> effects.Exit:
        """Run the state machine of `driver`, whose world this is, until it exits; return its exit effect."""
        self.connect(wire)
        threading.Thread(target=self._pulse, args=(driver,), daemon=True, name="pulse").start()
        self._driver = driver
        while driver.exit is None:
            self.turn(driver)
            if self._failure is not None:
                raise self._failure
        self._disk.shutdown()
        self._pool.shutdown(wait=False, cancel_futures=True)
        return driver.exit

    def turn(self, driver: drivers.Driver) -> None:
        """Let `driver` make a turn, see Driver."""
        with self._turn:
            driver.turn()

    def _pulse(self, driver: drivers.Driver) -> None:
        while driver.exit is None:
            time.sleep(driver.pulse_seconds)
            driver.pulse()

    # World.

    def now(self) -> float:
        """Return the seconds of the monotonic clock."""
        return time.monotonic()

    def take_heartbeat(self) -> drivers.Received | None:
        """Return the next heartbeat that waits, if any."""
        return self._heartbeats.popleft() if self._heartbeats else None

    def take(self, seconds: float) -> drivers.Received | None:
        """Return the next message received; wait for one that long, while other threads may have their turn."""
        self._called.clear()
        if not self._inbox and not self._heartbeats:
            self._turn.release()
            if not self._inbox and not self._heartbeats:  # nor since, from a thread that was refused the turn
                self._called.wait(seconds)
            self._turn.acquire()
        return self._inbox.popleft() if self._inbox else self.take_heartbeat()

    def send(self, to: str, message: messages.Message) -> None:
        """Send `message` to the process named `to`, or drop it."""
        self._wire.send(to, message)

    def append(self, record: messages.Message) -> None:
        """Append a record to the log; a scheduler that is restarted reads it from then on."""
        assert self._log is not None
        self._log.append(record)

    def replace(self, record: messages.Message) -> None:
        """Replace the whole log by `record`, atomically."""
        assert self._log is not None
        self._log.replace(record)

    def write(self, name: str, content: messages.Message) -> None:
        """Write a file in the thread of the disk."""
        self._disk.submit(self._write, name, content)

    def load(self, name: str) -> None:
        """Read a file in the thread of the disk."""
        self._disk.submit(self._load, name)

    def prepare(self, lease: messages.Lease) -> None:
        """Read the examples of `lease` in the thread that computes."""
        self._pool.submit(self._in_pool, self._prepare, lease)

    def compute(self, effect: effects.Compute) -> None:
        """Compute a gradient in its thread."""
        self._pool.submit(self._in_pool, self._compute, effect)

    def warn(self, text: str) -> None:
        """Log a warning."""
        _logger.warning(text)

    # In threads.

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
        self.receive_small(self._gradient(effect))  # no other thread sends it sooner

    def _in_pool(self, work: Callable[[Any], None], what: effects.Compute | messages.Lease) -> None:
        try:
            work(what)
        except Exception:
            # The state machine would wait forever. The process ends instead, and another worker gets the lease.
            lease = what.lease if isinstance(what, effects.Compute) else what
            _logger.exception("The gradient of %s could not be computed.", lease)
            os._exit(ExitStatus.FAILED)
