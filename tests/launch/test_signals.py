import contextlib
import os
import signal
import subprocess
import sys

import pytest

from jaxdist.launch import signals

SECOND = """
import os, signal
from jaxdist import signals
with signals.stop_on_signal() as request:
    os.kill(os.getpid(), {first})
    print("noted", request.signal.name, flush=True)
    os.kill(os.getpid(), {second})
    print("still here", flush=True)
"""


@pytest.mark.parametrize("number", signals.STOP_SIGNALS)
def test_the_first_signal_is_a_request_and_says_so(number, capfd):
    with signals.stop_on_signal() as request:
        assert not request
        os.kill(os.getpid(), number)
        assert request
        assert request.signal is number
    assert f"{number.name}: saving and stopping after this step" in capfd.readouterr().err


def test_the_handlers_before_are_put_back():
    before = [signal.getsignal(number) for number in signals.STOP_SIGNALS]
    with contextlib.suppress(RuntimeError), signals.stop_on_signal():
        assert before != [signal.getsignal(number) for number in signals.STOP_SIGNALS]
        raise RuntimeError
    assert [signal.getsignal(number) for number in signals.STOP_SIGNALS] == before


@pytest.mark.parametrize(("first", "second"), [("SIGTERM", "SIGTERM"), ("SIGINT", "SIGTERM"), ("SIGUSR1", "SIGINT")])
def test_the_second_signal_leaves_at_once(first, second):
    numbers = {"first": int(signal.Signals[first]), "second": int(signal.Signals[second])}
    done = subprocess.run(
        [sys.executable, "-c", SECOND.format(**numbers)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout == f"noted {first}\n"
    assert done.returncode == 128 + numbers["second"]


STUCK = """
import ctypes
from jaxdist import signals
library, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
with signals.stop_on_signal():
    library.pthread_mutex_lock(mutex)
    print("ready", flush=True)
    library.pthread_mutex_lock(mutex)  # never returns, and no signal interrupts it: as in a collective
"""


def test_both_signals_are_heard_in_native_code_that_never_returns():
    with subprocess.Popen([sys.executable, "-c", STUCK], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as stuck:
        assert stuck.stdout.readline() == b"ready\n"
        stuck.terminate()
        assert stuck.stderr.readline() == b"\n"
        assert stuck.stderr.readline().startswith(b"SIGTERM: saving")
        stuck.terminate()
        assert stuck.wait(timeout=60) == 128 + signal.SIGTERM
