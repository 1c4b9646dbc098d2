"""Stop signals: the first one asks the loop to save and end, a second one ends the process at once."""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any

from jaxdist.errors import ExitStatus
from jaxdist.launch import parent

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
SAME_REQUEST_SECONDS = 1.0
"""Signals that arrive within this time are one request: a service manager signals a supervisor and its processes, and
the supervisor passes its own signal on."""

SAVING = "Saving and stopping after this step."


class StopRequest:
    """Whether a stop was requested.

    Args:
      supervised: whether to ignore a second signal: the supervisor then ends this process.
      answer: what is done about a signal, as a sentence.
    """

    def __init__(self, *, supervised: bool = False, answer: str = SAVING) -> None:
        self.signal: signal.Signals | None = None
        self._answer = answer
        self._supervised, self._at = supervised, 0.0
        self._noted = threading.Event()

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal in the main thread: wait until the other thread has noted the request."""
        del number, frame
        self._noted.wait()

    def __bool__(self) -> bool:
        return self.signal is not None

    def note(self, number: int) -> None:
        """Note a signal: announce the first one, exit at once at a later one."""
        if self:
            if not self._supervised and time.monotonic() - self._at >= SAME_REQUEST_SECONDS:
                os._exit(128 + number)
            return
        self.signal, self._at = signal.Signals(number), time.monotonic()
        # os.write, since another thread may be in the middle of a print; the terminal may be gone.
        message = f"\n{self.signal.name}: {self._answer} Repeat the signal to exit at once.\n"
        with contextlib.suppress(OSError, ValueError):
            os.write(sys.stderr.fileno(), message.encode())
        self._noted.set()


@contextmanager
def stop_on_signal(environment: Mapping[str, str] = os.environ, *, answer: str = SAVING) -> Iterator[StopRequest]:
    """Turn the signals of STOP_SIGNALS into a request while the context lasts; a SIGHUP that is ignored stays so.

    The first signal is noted and announced on standard error. A second one exits at once with status 128 + its number,
    as a shell would report it, because a user who sends two does not want to wait for a checkpoint. Python runs a
    handler only when the main thread returns from native code, which may never happen in a collective. So a thread
    reads the signals, which the interpreter writes to a pipe as soon as they arrive.
    """
    request = StopRequest(supervised=parent.PARENT_ID in environment, answer=answer)
    told, tell = os.pipe()
    os.set_blocking(tell, False)
    reader = threading.Thread(target=_read_signals, args=(told, request), name="jaxdist-signals", daemon=True)
    reader.start()
    pipe_before = signal.set_wakeup_fd(tell)
    try:
        with handled(request.handle):
            yield request
    finally:
        signal.set_wakeup_fd(pipe_before)
        os.close(tell)  # ends the reader
        reader.join()
        os.close(told)


def leave_at_signals() -> dict[signal.Signals, Any]:
    """Leave at once at a stop signal from now on, with one line: nothing has begun yet. Return the handlers before.

    Not by an exception: one that is raised in the middle of an import of native code can crash the interpreter.
    """

    def leave(number: int, frame: FrameType | None) -> None:
        del frame
        with contextlib.suppress(OSError):
            os.write(2, b"jaxdist: Interrupted; nothing was left to save.\n")
        os._exit(ExitStatus.INTERRUPTED if number == signal.SIGINT else ExitStatus.RETRY)

    return {number: signal.signal(number, leave) for number in heeded()}


@contextmanager
def handled(handle: Callable[[int, FrameType | None], object]) -> Iterator[None]:
    """Have the stop signals handled so while the context lasts."""
    with restored({number: signal.signal(number, handle) for number in heeded()}):
        yield


@contextmanager
def restored(handlers: Mapping[Any, Any]) -> Iterator[None]:
    """Set the handlers of signals, by number, when the context ends."""
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def left_at_signals() -> contextlib.AbstractContextManager[None]:
    """Leave at once at a stop signal while the context lasts; see `leave_at_signals`."""
    return restored(leave_at_signals())


def leave_to_parent() -> None:
    """Ignore stop signals from now on: one that is sent to all processes of a run is for the one that started them."""
    for number in heeded():
        signal.signal(number, signal.SIG_IGN)


def heeded() -> list[signal.Signals]:
    """Return the stop signals, without a SIGHUP that is ignored: `nohup` keeps a run alive when its terminal closes."""
    return [each for each in STOP_SIGNALS if each != signal.SIGHUP or signal.getsignal(each) != signal.SIG_IGN]


def _read_signals(told: int, request: StopRequest) -> None:
    while numbers := os.read(told, 256):
        # Signals of other handlers arrive here, too. Those that arrive before the first is read are one request.
        for number in [number for number in numbers if number in STOP_SIGNALS][:1]:
            request.note(number)
