"""The door of a run: who is let in, and what is told of those that go."""

import contextlib
import os
import pathlib
import socket
import time

import pytest
import tiny_experiment

from jaxdist.errors import UserError
from jaxdist.launch.supervising import local_job
from jaxdist.paramserver.processes import admission, peer_addresses, run_folder
from jaxdist.paramserver.protocol.settings import OBSERVER
from jaxdist.paramserver.wire.security import KEY, ROOT, Security, new_token

FACTS = admission.facts_of(pathlib.Path(tiny_experiment.__file__))


@pytest.fixture
def door(tmp_path):
    spec = run_folder.Spec(
        attempt="a",
        experiment=tiny_experiment.__file__,
        assignments=[],
        settings={},
        peers={"worker/0": "127.0.0.2:1", "server/0/a": "127.0.0.2:5", OBSERVER: "127.0.0.1:2"},
        directory=str(tmp_path),
        resume="",
        devices=1,
        kind="elementwise",
        door=(f"jaxdist-test-{new_token()}", f"127.0.0.1:{local_job.quiet_ports(1)[0]}"),
    )
    opened = admission.Admission(spec, tmp_path, Security("right"), first_worker=2)
    opened.open()
    yield opened
    opened.close()


def until(condition):
    deadline = time.monotonic() + 200
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def enter(line, *given, facts=FACTS):
    line.say(hello="join")
    greeting = line.hear()
    line.say(addresses=given, facts=facts)
    return greeting, line.hear()


def test_a_command_of_this_machine_gets_the_secrets_and_names_for_its_workers(tmp_path, door):
    with admission.knock((door.spec.door[0], ""), Security()) as line:
        greeting, answer = enter(line, "127.0.0.1:71", "127.0.0.1:72")
        assert (greeting["token"], greeting["folder"]) == ("right", os.getcwd())
        assert answer == {"names": ["worker/2", "worker/3"]}
        known = peer_addresses.Addresses({}, tmp_path)
        assert dict(known) == {"worker/2": "127.0.0.1:71", "worker/3": "127.0.0.1:72"}
        line.say(died="worker/3", boot=17)
        until(lambda: door._deaths)
        assert [(note.name, note.boot) for note in door.deaths()] == [("worker/3", 17)]
        line.say(left=["worker/3"])
    until(lambda: not door.guests)
    assert [note.name for note in door.deaths()] == ["worker/2"]  # it went without a word


def test_a_command_of_this_machine_has_the_certificates_of_the_run_and_no_others(door, monkeypatch):
    monkeypatch.setenv(KEY, "/keys/of/the/run.pem")
    monkeypatch.delenv(ROOT, raising=False)
    with admission.knock((door.spec.door[0], ""), Security()) as line:
        given = enter(line, "127.0.0.1:71")[0]["secrets"]
    assert (given[KEY], given[ROOT]) == ("/keys/of/the/run.pem", "")


def test_a_number_is_never_used_again(door):
    for number in (2, 3):
        with admission.knock((door.spec.door[0], ""), Security()) as line:
            assert enter(line, "127.0.0.1:71")[1] == {"names": [f"worker/{number}"]}
            line.say(bye=True)
        until(lambda: not door.guests)


def test_another_machine_needs_the_token_and_gets_no_secret(door):
    with admission.knock(("", door.spec.door[1]), Security("right")) as line:
        greeting, answer = enter(line, "127.0.0.1:71")
        assert set(greeting) == {"spec", "folder"}
        assert answer == {"names": ["worker/2"]}
    for token in ("wrong", ""):
        with (
            pytest.raises(UserError, match="did not accept the token"),
            admission.knock(("", door.spec.door[1]), Security(token)),
        ):
            pass


def test_a_machine_with_other_versions_or_another_experiment_is_refused(door):
    with admission.knock(("", door.spec.door[1]), Security("right")) as line:
        _, answer = enter(line, "127.0.0.1:71", facts=FACTS | {"version of jax": "0.1", "experiment file": "abc"})
    assert "version of jax is 0.1 there and" in answer["error"]
    assert "experiment file is abc there and" in answer["error"]
    assert door.guests == []


def test_bytes_that_are_no_greeting_are_refused(door):
    host, _, port = door.spec.door[1].rpartition(":")
    with socket.create_connection((host, int(port))) as stranger:
        stranger.sendall(b"GET / HTTP/1.1\r\n" * 20)
        stranger.settimeout(200)
        with contextlib.suppress(ConnectionResetError):  # more than an answer of that length is never read
            while stranger.recv(4096):
                pass
    with admission.knock(("", door.spec.door[1]), Security("right")) as line:
        assert enter(line, "127.0.0.1:71")[1] == {"names": ["worker/2"]}


def test_a_run_that_has_ended_cannot_be_reached(door):
    door.close()
    for reached in (("", door.spec.door[1]), (door.spec.door[0], "")):
        with (
            pytest.raises(UserError, match="The run cannot be reached"),
            admission.knock(reached, Security("right")),
        ):
            pass


def test_the_newest_workers_leave_first_and_one_stays(door):
    door.own = ["worker/0", "worker/1"]

    def leave(count):
        with admission.knock((door.spec.door[0], ""), Security()) as line:
            line.say(hello="leave", count=count)
            return line.hear()

    with admission.knock((door.spec.door[0], ""), Security()) as line:
        enter(line, "127.0.0.1:71", "127.0.0.1:72")
        assert "keeps at least one worker; this one has 4, so 4 cannot leave" in leave(4)["error"]
        assert leave(1) == {"left": 1}
        assert line.hear() == {"leave": ["worker/3"]}
        line.say(left=["worker/3"])
        until(lambda: door.guests[0].names == ["worker/2"])
        assert leave(2) == {"left": 2}
        assert line.hear() == {"leave": ["worker/2"]}
        assert door.leaves() == 1
        assert door.leaves() == 0


def test_a_machine_of_the_configuration_that_goes_is_missed_and_may_come_back(door):
    def come():
        line = stack.enter_context(admission.knock(("", door.spec.door[1]), Security("right")))
        line.say(hello="machine", host="127.0.0.2")
        return line, line.hear()["names"]

    with contextlib.ExitStack() as stack:
        line, names = come()
        assert names == ["worker/0", "server/0/a"]
        line.close()
        until(lambda: any(guest.lost for guest in door.guests))
        (lost,) = door.lost_hosts()
        assert (lost.host, lost.names) == ("127.0.0.2", names)
        assert {note.name for note in door.deaths()} == set(names)
        door.move("server/0/a", "127.0.0.1:6")
        assert come()[1] == ["worker/0"]
