"""Stopping politely: the first signal asks the loop to save and end, the second ends the process at once."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
EXIT_RETRY = 75
"""Exit status of a run that was preempted: start it again with --resume (EX_TEMPFAIL of sysexits.h)."""


class StopRequest:
    """Whether a stop was asked for."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    def __bool__(self) -> bool:
        return self.signal is not None


@contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """Turn SIGINT, SIGTERM and SIGUSR1 into a request while the context lasts.

    The first signal is noted and said on standard error. The second leaves at once with 128 + its number, as the shell
    would report it: whoever sends two does not want to wait for a checkpoint.
    """
    request = StopRequest()

    def handle(number: int, frame: FrameType | None) -> None:
        del frame
        if request:
            os._exit(128 + number)
        request.signal = signal.Signals(number)
        # os.write, since print may be in the middle of another print when the signal comes.
        message = f"\n{request.signal.name}: saving and stopping after this step; once more to leave at once.\n"
        os.write(sys.stderr.fileno(), message.encode())

    before = {number: signal.signal(number, handle) for number in STOP_SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
