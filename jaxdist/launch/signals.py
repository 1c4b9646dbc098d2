"""Stopping politely: the first signal asks the loop to save and end, the second ends the process at once."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Whether a stop was asked for."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._noted = threading.Event()
        self._handled = False

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Be the handler, in the main thread: whoever was interrupted goes on knowing of the request, or not at all."""
        del frame
        if self._handled:
            os._exit(128 + number)
        self._handled = True
        self._noted.wait()

    def __bool__(self) -> bool:
        return self.signal is not None

    def note(self, number: int) -> None:
        """Take in a signal: say the first, leave at once at the second."""
        if self:
            os._exit(128 + number)
        self.signal = signal.Signals(number)
        # os.write, since another thread may be in the middle of a print.
        message = f"\n{self.signal.name}: saving and stopping after this step; once more to leave at once.\n"
        os.write(sys.stderr.fileno(), message.encode())
        self._noted.set()


@contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """Turn SIGINT, SIGTERM and SIGUSR1 into a request while the context lasts.

    The first signal is noted and said on standard error. The second leaves at once with 128 + its number, as the shell
    would report it: whoever sends two does not want to wait for a checkpoint. At once means at once: Python runs a
    handler only when the main thread comes back from native code, which in a collective may be never; so a thread
    reads the signals, which the interpreter writes to a pipe the moment they come.
    """
    request = StopRequest()
    told, tell = os.pipe()
    os.set_blocking(tell, False)
    reader = threading.Thread(target=_read_signals, args=(told, request), name="jaxdist-signals", daemon=True)
    reader.start()
    pipe_before = signal.set_wakeup_fd(tell)
    before = {number: signal.signal(number, request.handle) for number in STOP_SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(pipe_before)
        os.close(tell)  # the reader comes to the end
        reader.join()
        os.close(told)


def _read_signals(told: int, request: StopRequest) -> None:
    while number := os.read(told, 1):
        with contextlib.suppress(ValueError):
            if signal.Signals(number[0]) in STOP_SIGNALS:  # others, of handlers that are not ours, come here, too
                request.note(number[0])
