import contextlib

import pytest

from jaxdist.launch.supervising.several_hosts import neighbours, taking_part
from jaxdist.rundir import lock

KEY = b"secret"


@pytest.fixture
def hosts(tmp_path):
    """Make the assembly of a host of three, with its keeper; `close(n)` is the end of one."""
    stacks = {}

    def make(number):
        stack = stacks[number] = contextlib.ExitStack()
        directory = tmp_path / f"memory-{number}"
        directory.mkdir(exist_ok=True)
        keeper = stack.enter_context(
            neighbours.CopyKeeper(directory, KEY, "127.0.0.1", is_running=lambda: False, ended=lambda term: None)
        )
        (tmp_path / neighbours.FOLDER_NAME).mkdir(exist_ok=True)
        made = taking_part.Assembly(tmp_path, number, 3, keeper.address, KEY, lambda: f"meet:{number + 1}", stack)
        made.begin()
        neighbours.announce(tmp_path / neighbours.FOLDER_NAME, number, keeper.address)
        return made

    make.close = lambda number: stacks[number].close()
    yield make
    for stack in stacks.values():
        stack.close()


def next_of(assembly, looks=3, patience_seconds=0.0):
    left = iter([False] * looks)
    return assembly.next(patience_seconds=patience_seconds, first_seconds=60.0, stopped=lambda: next(left, True))


def test_the_first_attempt_waits_for_all_and_host_0_decides(hosts):
    first, second = hosts(0), hosts(1)
    assert next_of(first) is None
    assert next_of(second) is None
    third = hosts(2)
    assert next_of(second) is None, "it waits for the decision"
    members = next_of(first)
    assert (members.term, list(members.hosts), members.coordinator) == (1, [0, 1, 2], "meet:1")
    assert next_of(third) == next_of(second) == members
    assert next_of(third) is None, "a decision counts once"
    assert [members.next_to(host) for host in range(3)] == [second.address, third.address, first.address]


def test_those_that_are_left_go_on_and_one_that_comes_back_is_taken_in(hosts):
    first, second, third = (hosts(number) for number in range(3))
    assert next_of(first) == next_of(second) == next_of(third)
    hosts.close(0)
    members = next_of(second)
    assert (members.term, list(members.hosts), members.coordinator) == (2, [1, 2], "meet:2")
    assert next_of(third) == members
    assert not second.newcomers()
    again = hosts(0)
    assert second.newcomers()
    assert next_of(again) is None, "another host decides now"
    members = next_of(second)
    assert list(members.hosts) == [1, 0, 2], "process 0 stays where the decisions are made"
    assert next_of(again) == next_of(third) == members


def test_a_host_that_is_cut_off_decides_nothing(hosts, monkeypatch):
    first, second, third = (hosts(number) for number in range(3))
    assert next_of(first) == next_of(second) == next_of(third)
    monkeypatch.setattr(neighbours, "ask", lambda *arguments, **options: None)
    assert next_of(second) is None, "host 0 still holds the lock"
    assert list(next_of(first).hosts) == [0]


def test_two_jobs_in_one_directory_are_refused(hosts, tmp_path):
    with lock.locked(tmp_path, purpose="another job"), pytest.raises(lock.LockedError):
        hosts(0)


def test_hosts_of_the_attempt_before_are_waited_for(hosts):
    first, second, third = (hosts(number) for number in range(3))
    assert next_of(first) == next_of(second) == next_of(third)
    hosts.close(2)
    assert next_of(first, patience_seconds=60.0) is None
    hosts(2)
    assert list(next_of(first, patience_seconds=60.0).hosts) == [0, 1, 2]
