"""Real processes without JAX: what the launcher does with their ends, their output and its own end."""

import contextlib
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
import types

import pytest

from jaxdist.errors import ExitStatus
from jaxdist.launch.joining import runtime
from jaxdist.launch.supervising import local_job

PLACE = f"import os, sys, signal, time; place = int(os.environ['{runtime.PROCESS_ID}']); "
STUCK = "signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"


def run(code, tmp_path, processes=2, **settings):
    return local_job.run_job(
        [sys.executable, "-c", PLACE + code], num_processes=processes, log_dir=tmp_path, **settings
    )


def wait_until(condition, seconds=200.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "this never came true"
        time.sleep(0.02)


def started(folder):
    """Return the processes that have made a file of their number."""
    return [int(path.name) for path in folder.iterdir() if path.name.isdigit()]


def is_running(process_id):
    try:
        state = pathlib.Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_each_process_has_its_place_and_its_log(tmp_path):
    result = run("print('I am', place, 'of', os.environ['JAXDIST_NUM_PROCESSES'])", tmp_path)
    assert result == local_job.JobResult(0)
    for number in range(2):
        assert local_job.log_path(tmp_path, number).read_text() == f"I am {number} of 2\n"


def test_the_first_failure_is_reported_and_the_stuck_one_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(local_job, "GRACE_SECONDS", 0.2)
    result = run(f"print('mine', flush=True); place and sys.exit(3); {STUCK}", tmp_path)
    assert result == local_job.JobResult(3, 1, "mine")


def test_a_killed_process_gives_the_status_a_shell_would(tmp_path):
    result = run("place or os.kill(os.getpid(), signal.SIGKILL); time.sleep(600)", tmp_path)
    assert (result.exit_status, result.failed_process) == (128 + signal.SIGKILL, 0)


def test_a_mistake_that_process_0_has_shown_is_not_told_twice(tmp_path, capfd):
    ready = tmp_path / "ready"
    code = f"""
if place:
    while not os.path.exists({str(ready)!r}): time.sleep(0.01)
    print('[Gloo] Rank 1 is connected'); sys.exit('mine' if {{elsewhere}} else 2)
signal.signal(signal.SIGTERM, lambda *_: sys.exit(2))
print('my mistake', flush=True); open({str(ready)!r}, 'w').close(); time.sleep(600)
"""
    shown = run("\n" + code.format(elsewhere=False), tmp_path, show_first=True)
    assert shown == local_job.JobResult(2, 1, "")
    ready.unlink()
    assert run("\n" + code.format(elsewhere=True), tmp_path, show_first=True) == local_job.JobResult(1, 1, "mine")
    assert capfd.readouterr().out == 2 * "my mistake\n"


def test_after_an_orderly_retry_the_others_may_end_by_themselves(tmp_path):
    """A second SIGTERM would cut short what a process does after it was preempted."""
    code = f"""
waited = tmp = os.path.join({str(tmp_path)!r}, 'first-has-ended')
if place == 0:
    open(waited, 'w').close(); sys.exit({ExitStatus.RETRY})
while not os.path.exists(waited): time.sleep(0.01)
signal.signal(signal.SIGTERM, lambda *_: os._exit(99))
time.sleep(0.5); sys.exit({ExitStatus.RETRY})
"""
    assert run("\n" + code, tmp_path) == local_job.JobResult(ExitStatus.RETRY)


def test_a_stopped_process_does_not_outlive_an_orderly_retry_nor_is_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(local_job, "ORDERLY_SECONDS", 1000.0)
    monkeypatch.setattr(local_job, "GRACE_SECONDS", 1000.0)
    result = run(f"place and os.kill(os.getpid(), signal.SIGSTOP); sys.exit({ExitStatus.RETRY})", tmp_path)
    assert result == local_job.JobResult(ExitStatus.RETRY)


def test_a_job_that_takes_too_long_is_ended(tmp_path, monkeypatch):
    """However far its processes have come by then."""
    monkeypatch.setattr(local_job, "GRACE_SECONDS", 0.2)
    begun = []

    class Noted(subprocess.Popen):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            begun.append(self.pid)

    monkeypatch.setattr(local_job.subprocess, "Popen", Noted)
    with pytest.raises(TimeoutError, match=r"longer than 2.0 s; processes ended: \[\]"):
        run(STUCK, tmp_path, timeout_seconds=2.0)
    assert len(begun) == 2
    assert not any(is_running(each) for each in begun)


LAUNCHER = """
import pathlib, sys
from jaxdist.launch.supervising import local_job
result = local_job.run_job(
    [sys.executable, "-c", sys.argv[1]], num_processes=2, log_dir=pathlib.Path(sys.argv[2])
)
sys.exit(result.exit_status)
"""


def start_launcher(code, tmp_path):
    launcher = subprocess.Popen([sys.executable, "-c", LAUNCHER, code, str(tmp_path)])
    wait_until(lambda: len(started(tmp_path)) == 2)
    return launcher, started(tmp_path)


def test_signals_to_the_launcher_reach_every_process_once(tmp_path):
    code = f"""
{PLACE}
def note(number, frame):
    print(signal.Signals(number).name, flush=True); sys.exit({ExitStatus.RETRY})
signal.signal(signal.SIGTERM, note)
open(os.path.join({str(tmp_path)!r}, str(os.getpid())), 'w').close()
time.sleep(600)
"""
    launcher, _ = start_launcher(code, tmp_path)
    launcher.terminate()
    assert launcher.wait(timeout=200) == ExitStatus.RETRY
    assert [local_job.log_path(tmp_path, number).read_text() for number in range(2)] == 2 * ["SIGTERM\n"]


class Noting:
    """A process that notes the signals that it gets."""

    def __init__(self):
        self.got = []

    def send_signal(self, number):
        self.got.append(number)


def test_signals_within_a_second_are_one_request_and_a_later_one_kills(monkeypatch):
    """A service manager signals a supervisor more than once, and a shell all processes of a group."""
    now, process = [100.0], Noting()
    monkeypatch.setattr(local_job, "time", types.SimpleNamespace(monotonic=lambda: now[0]))
    with local_job.Signals() as signals:
        signals.processes = [process]
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGHUP):
            os.kill(os.getpid(), number)
            now[0] += 0.3
        assert (signals.received, process.got) == ([signal.SIGTERM], [signal.SIGTERM])
        now[0] += 0.2
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.received == [signal.SIGTERM, signal.SIGINT]
        assert process.got == [signal.SIGTERM, signal.SIGKILL]


def test_processes_die_with_their_launcher(tmp_path):
    """Even those that ignore SIGTERM, as a process in a collective does."""
    code = f"""
{PLACE}
from jaxdist.launch import parent
parent.die_with_parent()
signal.signal(signal.SIGTERM, signal.SIG_IGN)
open(os.path.join({str(tmp_path)!r}, str(os.getpid())), 'w').close()
time.sleep(600)
"""
    launcher, children = start_launcher(code, tmp_path)
    assert all(is_running(child) for child in children)
    launcher.kill()
    launcher.wait(timeout=200)
    wait_until(lambda: not any(is_running(child) for child in children))


@pytest.mark.parametrize("given", ["32768\t60999\n", "1024 65535", None])
def test_ports_of_processes_that_start_again(tmp_path, monkeypatch, given):
    path = tmp_path / "range"
    if given:
        path.write_text(given)
    monkeypatch.setattr(local_job, "_GIVEN_PORTS", path)
    ports = local_job.quiet_ports(20)
    assert len(set(ports)) == 20
    assert all(port < 32768 for port in ports) or given != "32768\t60999\n"
    with contextlib.ExitStack() as stack:
        for port in ports:
            stack.enter_context(socket.create_server((local_job.LOOPBACK, port)))


def test_a_reserved_port_is_given_to_nobody_else_but_the_coordinator():
    with local_job.reserved_port() as port:
        with socket.socket() as stranger, pytest.raises(OSError, match="in use"):
            stranger.bind((local_job.LOOPBACK, port))
        with socket.socket() as coordinator:
            coordinator.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            coordinator.bind((local_job.LOOPBACK, port))
            coordinator.listen()
            with socket.create_connection((local_job.LOOPBACK, port), timeout=5):
                pass
