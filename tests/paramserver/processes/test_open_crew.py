"""A crew that others may join: who is asked to leave, and where the processes of a lost machine go."""

import types

import pytest

from jaxdist.paramserver.processes import open_crew, peer_addresses
from jaxdist.paramserver.protocol import messages


class FakeCrew(open_crew.LocalCrew):
    """A crew without processes."""

    def __init__(self, directory):
        super().__init__(["scheduler", "worker/0", "worker/1"], directory, "")
        self.asked, self.added = [], []

    def look_after(self):
        return {"worker/0": 5}

    def retire(self, names):
        self.asked += names

    def add(self, name):
        self.names.append(name)
        self.added.append(name)


class FakeDoor:
    """A door with whom the test lets in."""

    def __init__(self, directory):
        self.guests, self.lost, self.dead, self.leaving, self.directory = [], [], [], 0, directory

    def deaths(self):
        return self.dead

    def leaves(self):
        count, self.leaving = self.leaving, 0
        return count

    def lost_hosts(self):
        found, self.lost = self.lost, []
        return found

    def tell_missed(self):
        pass

    def own_host(self):
        return "127.0.0.1"

    def move(self, name, address):
        peer_addresses.announce(self.directory, name, address)


@pytest.fixture
def made(tmp_path):
    door, crew = FakeDoor(tmp_path), FakeCrew(tmp_path)
    clock = types.SimpleNamespace(now=0.0)
    opened = open_crew.OpenCrew(crew, door, lost_after_seconds=10.0, clock=lambda: clock.now)
    return opened, crew, door, clock


def guest(host, *names):
    said = []
    return types.SimpleNamespace(
        host=host, names=list(names), line=types.SimpleNamespace(say=lambda **m: said.append(m), said=said)
    )


def test_deaths_of_all_are_told_and_the_own_workers_leave_last_first(made):
    opened, crew, door, _ = made
    door.dead, door.leaving = [messages.Died("worker/0", 9), messages.Died("worker/7", 2)], 1
    assert opened.look_after() == {"worker/0": 9, "worker/7": 2}
    assert crew.asked == ["worker/1"]


def test_a_machine_that_comes_back_in_time_keeps_its_processes(made):
    opened, crew, door, clock = made
    door.lost = [guest("10.0.0.2", "server/0/b", "worker/2")]
    opened.look_after()
    clock.now = 9.0
    door.guests = [guest("10.0.0.2", "server/0/b", "worker/2")]
    opened.look_after()
    clock.now, door.guests = 99.0, []
    opened.look_after()
    assert crew.added == []


def test_the_processes_of_a_lost_machine_are_placed_on_all_that_are_left(made, tmp_path, capsys):
    opened, crew, door, clock = made
    other, joined = guest("10.0.0.3", "server/1/b"), guest("", "worker/9")
    door.guests, door.lost = [joined, other], [guest("10.0.0.2", "server/0/b", "worker/2", "worker/3")]
    opened.look_after()
    clock.now = 9.9
    opened.look_after()
    assert crew.added == []
    clock.now = 10.0
    opened.look_after()
    assert crew.added == ["server/0/b", "worker/3"]
    assert other.line.said == [{"place": ["worker/2"]}]
    assert joined.line.said == []  # it has no directory in common with the run
    assert set(peer_addresses.Addresses({}, tmp_path)) == {"server/0/b", "worker/3"}
    assert "The machine 10.0.0.2 is lost" in capsys.readouterr().err


def test_a_run_without_workers_says_what_it_waits_for(made, capsys):
    opened, crew, _, _ = made
    crew.names[:] = ["scheduler"]
    crew._left = ["worker/0", "worker/1"]
    opened.look_after()
    opened.look_after()
    assert capsys.readouterr().err.count("No worker is left. The run waits") == 1
