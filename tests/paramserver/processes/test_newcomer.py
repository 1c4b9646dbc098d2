"""The side of `jaxdist join` and `jaxdist leave`, with a crew without processes."""

import contextlib
import os
import pathlib
import socket
import threading

import pytest
import tiny_experiment

from jaxdist.cli import main
from jaxdist.paramserver.processes import admission, newcomer, peer_addresses, run_folder
from jaxdist.paramserver.protocol.settings import SCHEDULER
from jaxdist.paramserver.wire.security import TOKEN, Security, new_token
from jaxdist.rundir import lock

DOOR = (f"jaxdist-test-{new_token()}", "")


class FakeCrew:
    """Workers that leave when they are asked to."""

    def __init__(self, names, directory, token):
        self.names, self.directory, self.token, self.left = list(names), directory, token, []
        self.missed = []
        made.append(self)

    def start(self):
        pass

    def look_after(self):
        return {}

    def take_left(self):
        found, self.left = self.left, []
        return found

    def retire(self, names):
        self.left += names
        self.names = [name for name in self.names if name not in names]

    def note_missed(self, names):
        self.missed += names

    def add(self, name):
        self.names.append(name)

    def close(self, *, orderly):
        self.orderly = orderly


made = []


def spec_of(experiment):
    return run_folder.Spec("a", experiment, [], {}, {SCHEDULER: "127.0.0.1:9"}, "/run/ps", "", 1, "whole", "", DOOR)


@pytest.fixture
def run_dir(tmp_path, monkeypatch):
    """A run directory whose run is training, as far as a newcomer can see."""
    spec = spec_of(tiny_experiment.__file__)
    spec.write(tmp_path / "ps" / run_folder.SPEC_NAME)
    monkeypatch.setattr(newcomer, "LocalCrew", FakeCrew)
    made.clear()
    with lock.locked(tmp_path, purpose="a test"):
        yield tmp_path


@pytest.fixture
def door(run_dir):
    spec = run_folder.Spec.read(run_dir / "ps" / run_folder.SPEC_NAME)
    opened = admission.Admission(spec, run_dir / "ps", Security("right"), first_worker=2)
    opened.open()
    yield opened
    opened.close()


def when_joined(door, then):
    """Call `then` with the guest that comes first, in another thread."""

    def wait():
        while not door.guests:
            pass
        then(door.guests[0])

    threading.Thread(target=wait, daemon=True).start()


def test_workers_join_by_the_run_directory_and_leave_when_they_are_asked_to(run_dir, door, capsys):
    when_joined(door, lambda guest: newcomer.leave(run_dir, 1))
    door.own = ["worker/0"]
    assert main.run(["join", str(run_dir)]) == 0
    assert (made[0].token, made[0].left) == ("right", [])
    assert "1 worker joins the run" in (said := capsys.readouterr().err)
    assert "The workers have left the run." in said


@pytest.mark.parametrize(("how", "status"), [("close", 0), ("die", 75)])
def test_a_command_ends_with_the_run(run_dir, door, capsys, how, status):
    when_joined(door, lambda guest: door.close() if how == "close" else guest.line.close())
    assert newcomer.join(run_dir, 2) == status
    assert made[0].orderly == (how == "close")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["join", "RUN_DIR", "--experiment", "x.py"], "--experiment is for a run at an address"),
        (["join", "127.0.0.1:1"], "The run cannot be reached at 127.0.0.1:1"),
        (["join", "RUN_DIR"], "The run cannot be reached on this machine"),
        (["leave", "RUN_DIR", "--processes", "9"], "The run cannot be reached on this machine"),
    ],
)
def test_mistakes_are_told_in_a_sentence(run_dir, capsys, arguments, message):
    given = [str(run_dir) if each == "RUN_DIR" else each for each in arguments]
    assert main.run(given) == 2
    assert message in capsys.readouterr().err


def test_a_run_that_has_ended_is_said_to(tmp_path, run_dir, capsys):
    other = tmp_path / "ended"
    (other / "ps").mkdir(parents=True)
    (other / "ps" / run_folder.SPEC_NAME).write_bytes((run_dir / "ps" / run_folder.SPEC_NAME).read_bytes())
    for command in ("join", "leave"):
        assert main.run([command, str(other)]) == 2
        assert "Only a run that is training can be joined" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"door": 1}', b'{"other": 1}', b"\xff"])
def test_a_damaged_description_of_the_run_is_said_to_be(run_dir, capsys, content):
    path = run_dir / "ps" / run_folder.SPEC_NAME
    path.write_bytes(content)
    for command in ("join", "leave"):
        assert main.run([command, str(run_dir)]) == 2
        assert f"{path} says, and that file cannot be read" in " ".join(capsys.readouterr().err.split())


def test_a_machine_without_the_experiment_is_told_what_to_do(tmp_path):
    spec = spec_of("/nowhere/x.py")
    with pytest.raises(ValueError, match="This machine needs the experiment file of the run; there is no /nowhere"):
        newcomer._spec_here(spec, {}, tmp_path, None)
    here = newcomer._spec_here(spec, {}, tmp_path, pathlib.Path(tiny_experiment.__file__))
    assert (here.experiment, here.directory) == (tiny_experiment.__file__, str(tmp_path))


def test_an_address_that_others_reach_needs_a_token(monkeypatch, capsys):
    monkeypatch.delenv(TOKEN, raising=False)
    assert main.run(["join", "10.0.0.1:7809"]) == 2
    assert f"needs authentication, got 10.0.0.1 without any. Set {TOKEN}" in capsys.readouterr().err


def test_a_command_starts_workers_again_that_the_scheduler_misses(run_dir, door):
    def miss(guest):
        path = run_folder.silent_path(run_dir / "ps", guest.names[0])
        path.parent.mkdir()
        path.touch()
        door.tell_missed()
        while not (made and made[0].missed):
            pass
        door.close()

    when_joined(door, miss)
    assert newcomer.join(run_dir, 1) == 0
    assert made[0].missed == ["worker/2"]


def test_a_machine_starts_processes_of_a_lost_one_and_hears_where_others_are(tmp_path):
    ours, theirs = socket.socketpair()
    with ours, theirs, contextlib.suppress(OSError):
        crew = FakeCrew(["worker/1"], tmp_path, "")
        other = admission.Line(theirs)
        for message in ({"place": ["server/0/b"]}, {"moved": {"server/1/a": "127.0.0.1:5"}}, {"leave": ["worker/1"]}):
            other.say(**message)
        other.say(over="Done.")
        assert newcomer.Keeper(admission.Line(ours), crew, "127.0.0.1").run() == 0
    known = peer_addresses.Addresses({}, tmp_path)
    assert known["server/1/a"] == "127.0.0.1:5"
    assert "server/0/b" in known or crew.names == ["worker/1"]  # told in one go with the end
    assert os.listdir(tmp_path)
