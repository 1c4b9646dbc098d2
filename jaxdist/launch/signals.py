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

    Where this process is `supervised`, a second signal is ignored: the supervisor then ends it. `answer` says, as a
    sentence, what is done about a signal.
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
def interruptible() -> Iterator[None]:
    """Have Ctrl-C end what the context does by KeyboardInterrupt; what handled SIGINT before does so again afterwards.

    That is so wherever the exception is raised. Python drops it in a callback of the garbage collector (JAX has one)
    and in a finaliser, and tells `sys.unraisablehook` alone; the signal is then repeated a moment later. A library may
    turn it into an error of its own, which is turned back here.
    """
    in_main = threading.current_thread() is threading.main_thread()  # where alone Python handles signals
    if not in_main or signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        yield
        return
    usual, asked, again = sys.unraisablehook, threading.Event(), _Again()

    def interrupt(number: int, frame: FrameType | None) -> None:
        asked.set()
        if not again.is_pending:  # or it would be raised in what notes the one before
            signal.default_int_handler(number, frame)

    def repeat(dropped: Any) -> None:
        if asked.is_set() and issubclass(dropped.exc_type, KeyboardInterrupt):
            again.soon()
        else:
            usual(dropped)

    with restored({signal.SIGINT: signal.signal(signal.SIGINT, interrupt)}):
        sys.unraisablehook = repeat
        try:
            yield
            again.now()
        except Exception as error:
            if asked.is_set():
                raise KeyboardInterrupt from error
            raise
        finally:
            again.never()
            sys.unraisablehook = usual


class _Again:
    """An interrupt that is repeated once, a moment after it was dropped."""

    def __init__(self) -> None:
        self.is_pending = False
        self._timer = threading.Timer(0, self._repeat)

    def soon(self) -> None:
        if not self.is_pending:
            self.is_pending = True
            self._timer = threading.Timer(_REPEAT_SECONDS, self._repeat)
            self._timer.daemon = True
            self._timer.start()

    def now(self) -> None:
        if self.is_pending:
            raise KeyboardInterrupt

    def never(self) -> None:
        self._timer.cancel()

    def _repeat(self) -> None:
        self.is_pending = False
        main = threading.main_thread().ident
        assert main is not None
        signal.pthread_kill(main, signal.SIGINT)  # which also ends a wait in the main thread


_REPEAT_SECONDS = 0.05
"""Long enough for the callback that dropped an interrupt to have returned."""


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
