import contextlib
import json
import socket
import threading
from multiprocessing.connection import Listener

import numpy as np

from jaxdist.checkpoint import slots
from jaxdist.launch.supervising.several_hosts import neighbours

KEY = b"secret"


def write(directory, process, step, num_processes=2):
    """A snapshot of half of an array, that of this process."""
    structure = {"leaves": [["a", "uint8", "uint8", [4 * num_processes]]]}
    structure["pieces"] = [{"leaf": 0, "index": [[4 * process, 4 * process + 4]], "num_bytes": 4}]
    buffers = [np.full(4, step + process, np.uint8)]
    header = slots.header_of({"identity": "a", "step": step}, json.dumps(structure), buffers)
    slots.Slots(directory, process).write(header, buffers)
    return header, buffers


@contextlib.contextmanager
def keeping(directory, ended=lambda term: None, running=False):
    directory.mkdir(exist_ok=True)
    with neighbours.CopyKeeper(directory, KEY, "127.0.0.1", is_running=lambda: running, ended=ended) as keeper:
        yield keeper


def test_a_neighbour_keeps_what_a_process_sends_beside_its_own(tmp_path):
    (tmp_path / "sent").mkdir()
    with keeping(tmp_path / "kept") as keeper:
        write(tmp_path / "kept", 0, 7)
        copier = neighbours.Copier(keeper.address, KEY)
        for step in range(3, 8):
            copier(1, *write(tmp_path / "sent", 1, step))
        found = slots.by_step(tmp_path / "kept", "a")
        assert slots.newest_whole(found) == 7
        assert sorted(found) == [5, 6, 7], "the oldest is overwritten"
        np.testing.assert_array_equal(slots.joined(found[7])[0], [7, 7, 7, 7, 8, 8, 8, 8])


def test_a_neighbour_that_is_gone_stops_no_process(tmp_path):
    with keeping(tmp_path) as keeper:
        copier = neighbours.Copier(keeper.address, KEY)
    copier(0, *write(tmp_path, 0, 1))
    copier(0, *write(tmp_path, 0, 2))
    assert neighbours.ask(keeper.address, KEY, {}) is None


def test_only_who_knows_the_secret_is_answered(tmp_path):
    with keeping(tmp_path) as keeper:
        assert neighbours.ask(keeper.address, b"another", {"list": True}) is None
        assert neighbours.ask(keeper.address, KEY, {"list": True}) == {"files": {}}


def test_a_stranger_who_says_nothing_keeps_nobody_waiting(tmp_path):
    with keeping(tmp_path) as keeper:
        host, _, port = keeper.address.rpartition(":")
        with socket.create_connection((host, int(port)), 5):
            assert neighbours.ask(keeper.address, KEY, {"list": True}) == {"files": {}}


def test_the_end_of_an_attempt_is_passed_on_with_its_term(tmp_path):
    terms = []
    with keeping(tmp_path, ended=terms.append, running=True) as keeper:
        assert neighbours.ask(keeper.address, KEY, {"ended": 5}) == {"running": True}
    assert terms == [5]


def test_the_newest_step_that_all_hosts_together_have_is_fetched(tmp_path):
    here = tmp_path / "here"
    here.mkdir()
    with keeping(tmp_path / "first") as first, keeping(tmp_path / "second") as second:
        for step in (1, 2, 3):
            write(tmp_path / "first", 0, step)
        for step in (1, 2):
            write(tmp_path / "second", 1, step)
        neighbours.gather(here, "a", [first.address, second.address], KEY)
        found = slots.by_step(here, "a")
        assert sorted(found) == [2]
        np.testing.assert_array_equal(slots.joined(found[2])[0], [2, 2, 2, 2, 3, 3, 3, 3])
        neighbours.gather(here, "another", [first.address], KEY)
        assert sorted(slots.by_step(here, "a")) == [2]


def test_a_name_that_leads_out_of_the_memory_gets_nothing(tmp_path):
    (tmp_path / "memory").mkdir()
    write(tmp_path, 0, 1)
    with keeping(tmp_path / "memory") as keeper:
        channel = neighbours._connect(keeper.address, KEY)
        channel.send_bytes(json.dumps({"fetch": "../process-0.slot-0.snapshot"}).encode())
        assert channel.recv_bytes() == b""


def test_the_end_of_a_supervisor_is_noticed():
    lost = threading.Event()
    with Listener(("127.0.0.1", 0), authkey=KEY) as listener:
        neighbours.watch(f"127.0.0.1:{listener.address[1]}", KEY, lost.set)
        while True:
            with contextlib.suppress(EOFError, ConnectionError):  # the first connection only tries the address
                channel = listener.accept()
                break
    assert not lost.is_set()
    channel.close()
    assert lost.wait(200)


def test_a_supervisor_that_ends_with_the_job_is_not_lost(tmp_path, monkeypatch):
    lost, over = threading.Event(), threading.Event()
    connect = neighbours._connect

    @contextlib.contextmanager
    def connecting(*arguments):
        with connect(*arguments) as channel:
            yield channel
        over.set()

    with keeping(tmp_path) as keeper:
        monkeypatch.setattr(neighbours, "_connect", connecting)
        neighbours.watch(keeper.address, KEY, lost.set)
        while not over.wait(0.01):
            keeper.say_over()
    assert not lost.is_set()


def test_the_secret_is_one_and_for_this_user_alone(tmp_path):
    made = {neighbours.secret(tmp_path / "hosts") for _ in range(3)}
    assert len(made) == 1
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "hosts").iterdir()} == {0o600}
