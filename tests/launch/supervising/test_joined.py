"""Real processes join a job, leave it and are lost, without JAX: `jaxdist join` is played by its own code."""

import json
import os
import pathlib
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time

import pytest

from jaxdist.launch.supervising import job_memory, joined, joiner, local_job, roster

WORKER = "import sys, time; print('started', flush=True); time.sleep(600 if sys.argv[1] == 'wait' else 0); sys.exit(7)"
SECONDS = 200


@pytest.fixture
def memory():
    directory = pathlib.Path(tempfile.mkdtemp(prefix="jaxdist-test-", dir=job_memory.MEMORY_ROOT))
    yield directory
    shutil.rmtree(directory)


@pytest.fixture
def people():
    return roster.Roster(1, local_job.start)


def connected(memory):
    channel = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    channel.connect(str(memory / joined.SOCKET_NAME))
    return channel


def until(condition):
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.01)


def start_worker(command, environment, output):
    """Start what the job names, as the fork server would."""
    return local_job.start([sys.executable, "-c", WORKER, command[-1]], environment, output)


@pytest.fixture
def join(memory, people):
    """Return a function that joins with so many processes from a thread, and returns the `_Joiner`."""
    joiners, threads = [], []

    def begin(num_processes):
        channel = connected(memory)
        channel.send(json.dumps({"join": True}).encode())
        assert json.loads(channel.recv(joined.MAX_MESSAGE))["arguments"] == ["train", "x.py"]
        made = joiner._Joiner(channel, num_processes, start_worker)
        thread = threading.Thread(target=made.run)
        before = people.available()
        thread.start()
        until(lambda: people.available() == before + num_processes)
        joiners.append((made, channel))
        threads.append(thread)
        return made

    with joined.Reception(memory, people, ["train", "x.py"]):
        yield begin
    for thread in threads:
        thread.join(SECONDS)
        assert not thread.is_alive(), "the end of the job ends the command"
    for _, channel in joiners:
        channel.close()


def run(people, how, tmp_path):
    starters = people.begin(people.target())
    with open(tmp_path / "log", "ab") as output:
        return [start(["python", "-m", "jaxdist.cli", how], dict(os.environ), output) for start in starters[1:]]


def test_a_process_that_joined_is_started_and_its_exit_status_told(people, join, tmp_path):
    join(2)
    assert people.available() == 3
    processes = run(people, "end", tmp_path)
    assert [process.wait(SECONDS) for process in processes] == [7, 7]
    assert [process.poll() for process in processes] == [7, 7]
    assert (tmp_path / "log").read_text() == "started\nstarted\n"


def test_a_process_that_joined_is_killed_by_the_supervisor(people, join, tmp_path):
    join(1)
    (process,) = run(people, "wait", tmp_path)
    assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    assert process.wait(SECONDS) == -signal.SIGKILL


def test_processes_leave_when_the_command_is_asked_to_end(people, join, tmp_path):
    asked = join(1)
    (process,) = run(people, "wait", tmp_path)
    asked.leave()
    until(people.is_due)
    assert people.lost() == 0
    process.send_signal(signal.SIGTERM)
    assert process.wait(SECONDS) == -signal.SIGTERM
    assert len(people.begin(people.target())) == 1


def test_processes_are_lost_with_their_command(memory, people, join):
    channel = connected(memory)
    channel.send(json.dumps({"join": True}).encode())
    channel.recv(joined.MAX_MESSAGE)
    channel.send(json.dumps({"ready": 2}).encode())
    until(lambda: people.available() == 3)
    people.begin(3)
    channel.close()
    until(people.is_due)
    assert people.lost() == 2
    with pytest.raises(joined.ProcessLostError):
        people._running[1].start(["python", "-m", "jaxdist.cli"], {}, sys.stdout.buffer)


def test_the_job_can_send_processes_away(memory, people, join):
    join(2)
    for count, answer in [(1, "left"), (5, "error")]:
        with connected(memory) as channel:
            channel.send(json.dumps({"leave": count}).encode())
            assert answer in json.loads(channel.recv(joined.MAX_MESSAGE))
    assert people.available() == 2


@pytest.mark.parametrize("said", [b"no JSON", b"[]", b'{"join": "x"}', b"{}"])
def test_a_stranger_does_not_disturb_the_job(memory, people, join, said):
    with connected(memory) as channel:
        channel.send(said)
        assert channel.recv(joined.MAX_MESSAGE) == b""
    assert people.available() == 1


def test_without_a_directory_in_memory_there_is_no_socket(tmp_path, people):
    with joined.Reception(tmp_path / ("long" * 40), people, []) as reception:
        assert reception._listener is None
