import contextlib
import gc
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from jaxdist.launch import parent, signals

SECOND = """
import os, signal, time
from jaxdist.launch import signals
signals.SAME_REQUEST_SECONDS = 3.0  # on a busy machine, too
with signals.stop_on_signal() as request:
    for _ in range(3):  # of one request
        os.kill(os.getpid(), {first})
    print("noted", request.signal.name, flush=True)
    time.sleep(signals.SAME_REQUEST_SECONDS)
    os.kill(os.getpid(), {second})
    time.sleep({patience})  # a thread ends the process
    print("still here", flush=True)
"""


@pytest.fixture(autouse=True)
def heeded_signals():
    """Under nohup SIGHUP is ignored, in the background SIGINT, and the processes that a test starts inherit that."""
    handlers = {signal.SIGHUP: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", signals.STOP_SIGNALS)
def test_the_first_signal_is_a_request_and_says_so(number, capfd):
    with signals.stop_on_signal() as request:
        assert not request
        os.kill(os.getpid(), number)
        assert request
        assert request.signal is number
    assert f"{number.name}: Saving and stopping after this step" in capfd.readouterr().err


def test_the_handlers_before_are_put_back():
    before = [signal.getsignal(number) for number in signals.STOP_SIGNALS]
    with contextlib.suppress(RuntimeError), signals.stop_on_signal():
        assert before != [signal.getsignal(number) for number in signals.STOP_SIGNALS]
        raise RuntimeError
    assert [signal.getsignal(number) for number in signals.STOP_SIGNALS] == before


@pytest.mark.parametrize(("first", "second"), [("SIGTERM", "SIGTERM"), ("SIGINT", "SIGTERM"), ("SIGUSR1", "SIGINT")])
def test_the_second_signal_leaves_at_once(first, second):
    done = send(first, second, os.environ, patience=50.0)
    assert done.stdout == f"noted {first}\n"
    assert done.returncode == 128 + signal.Signals[second]


def send(first, second, environment, *, patience):
    numbers = {"first": int(signal.Signals[first]), "second": int(signal.Signals[second])}
    command = [sys.executable, "-c", SECOND.format(**numbers, patience=patience)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)


def test_a_supervised_process_leaves_it_to_its_supervisor_when_to_leave_at_once():
    done = send("SIGTERM", "SIGTERM", os.environ | {parent.PARENT_ID: "1"}, patience=0.2)
    assert done.stdout == "noted SIGTERM\nstill here\n"
    assert done.returncode == 0


def test_a_process_may_leave_every_stop_signal_to_its_parent():
    script = "import os; from jaxdist.launch import signals as s; s.leave_to_parent()\n"
    script += "for number in s.STOP_SIGNALS: os.kill(os.getpid(), number)\nprint('lives')"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=200, check=True)
    assert done.stdout == "lives\n"


def test_a_hangup_that_is_ignored_stays_so():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals.stop_on_signal() as request:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not request
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_request_is_noted_when_nobody_can_read_of_it():
    """The thread that reads signals must outlast a terminal that is closed, or the main thread waits for it forever."""
    code = "import os; from jaxdist.launch import signals\nwith signals.stop_on_signal() as request:\n"
    code += " os.close(2); os.kill(os.getpid(), 1)\n assert request"
    assert subprocess.run([sys.executable, "-c", code], timeout=200, check=False).returncode == 0


STUCK = """
import ctypes
from jaxdist.launch import signals
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
        assert stuck.stderr.readline().startswith(b"SIGTERM: Saving")
        time.sleep(signals.SAME_REQUEST_SECONDS)
        stuck.terminate()
        assert stuck.wait(timeout=200) == 128 + signal.SIGTERM


def interrupt(*_):
    os.kill(os.getpid(), signal.SIGINT)


class Finalised:
    def __del__(self):
        interrupt()


def in_a_finaliser():
    Finalised()  # dropped at once


def in_a_callback_of_the_garbage_collector():
    gc.callbacks.append(interrupt)
    try:
        gc.collect()
    finally:
        gc.callbacks.remove(interrupt)


@pytest.mark.parametrize("lose", [in_a_finaliser, in_a_callback_of_the_garbage_collector])
def test_an_interrupt_that_python_drops_is_repeated(lose):
    before, hook = signal.getsignal(signal.SIGINT), sys.unraisablehook
    with pytest.raises(KeyboardInterrupt), signals.interruptible():  # noqa: PT012
        lose()
        threading.Event().wait(timeout=100)
        pytest.fail("the interrupt was lost")
    assert (signal.getsignal(signal.SIGINT), sys.unraisablehook) == (before, hook)


def test_an_interrupt_that_is_dropped_at_the_very_end_counts():
    with pytest.raises(KeyboardInterrupt), signals.interruptible():
        in_a_finaliser()


def test_an_interrupt_that_a_library_turns_into_an_error_is_one_again():
    with pytest.raises(KeyboardInterrupt) as raised, signals.interruptible():  # noqa: PT012
        try:
            interrupt()
        except KeyboardInterrupt as error:
            raise RuntimeError("the computation failed") from error
    assert isinstance(raised.value.__cause__, RuntimeError)


def test_errors_without_an_interrupt_are_as_they_were():
    with pytest.raises(RuntimeError, match="of its own"), signals.interruptible():
        raise RuntimeError("of its own")
    with signals.interruptible(), pytest.raises(ZeroDivisionError):
        _ = 1 / 0
