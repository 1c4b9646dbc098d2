"""How many processes a job should have, as they come, leave and are lost."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxdist.errors import UserError
from jaxdist.launch.supervising import roster


class Member:
    def __init__(self, num_processes, name):
        self.num_processes, self.lost, self.name = num_processes, False, name

    def offer(self, num_processes):
        self.num_processes = num_processes

    def start(self, command, environment, output):
        return self.name

    def lose(self):
        self.num_processes, self.lost = 0, True


def own_start(command, environment, output):
    return "own"


def names(starters):
    return [start([], {}, None) for start in starters]


def make(own):
    asked = []
    return roster.Roster(own, own_start, lambda: asked.append(True)), asked


@given(available=st.integers(0, 20), unsuitable=st.sets(st.integers(1, 20)))
def test_the_most_processes_that_suit_are_used(available, unsuitable):
    chosen = roster.usable(available, unsuitable)
    assert 0 <= chosen <= available
    assert chosen not in unsuitable
    assert set(range(chosen + 1, available + 1)) <= unsuitable


def test_members_take_part_in_the_order_in_which_they_came():
    people, asked = make(1)
    assert names(people.begin(1)) == ["own"]
    people.add(Member(1, "a"))
    people.add(Member(2, "b"))
    assert asked
    assert people.target() == 4
    assert names(people.begin(4)) == ["own", "a", "b", "b"]
    assert not people.is_due()


@pytest.mark.parametrize("way", ["leave", "lose"])
def test_a_member_that_goes_asks_for_a_change(way):
    people, asked = make(2)
    first, second = Member(1, "a"), Member(1, "b")
    people.add(first)
    people.add(second)
    people.begin(4)
    assert not asked
    first.offer(0) if way == "leave" else first.lose()
    people.changed()
    assert asked
    assert people.lost() == (way == "lose")
    assert names(people.begin(people.target())) == ["own", "own", "b"]


def test_a_member_that_is_replaced_at_once_is_still_a_change():
    people, asked = make(1)
    first = Member(1, "a")
    people.add(first)
    people.begin(2)
    first.offer(0)
    people.add(Member(1, "b"))
    assert people.target() == 2
    assert asked
    assert names(people.begin(2)) == ["own", "b"]


def test_a_number_that_does_not_suit_is_tried_once():
    people, asked = make(2)
    people.begin(2)
    people.judge(2, mistaken=False)
    people.add(Member(1, "a"))
    people.begin(3)
    people.judge(3, mistaken=True)
    assert people.target() == 2
    people.begin(2)
    asked.clear()
    people.add(spare := Member(1, "b"))
    assert people.target() == 4
    people.begin(4)
    spare.offer(0)
    people.changed()
    assert people.target() == 2


def test_the_users_mistake_on_the_first_number_is_no_reason_to_try_others():
    people, _ = make(2)
    people.begin(2)
    people.judge(2, mistaken=True)
    assert people.target() == 2
    people.judge(2, mistaken=False)
    people.judge(2, mistaken=True)  # an experiment file that was changed while it runs, for example
    assert people.target() == 2


def test_fewer_processes_after_failures_are_a_limit_until_others_come():
    people, asked = make(4)
    people.begin(4)
    people.begin(2)
    assert people.target() == 2
    assert not asked
    people.add(Member(1, "a"))
    assert people.target() == 5


def test_processes_that_come_between_two_attempts_are_no_limit():
    people, asked = make(1)
    people.begin(1)
    assert people.end() == 1
    people.add(Member(1, "a"))
    assert not asked
    people.begin(1)
    assert asked
    assert people.target() == 2


def test_a_spare_that_leaves_disturbs_no_attempt():
    people, asked = make(2)
    people.judge(2, mistaken=False)
    people.judge(3, mistaken=True)
    people.begin(2)
    spare = Member(1, "a")
    people.add(spare)
    spare.lose()
    people.changed()
    assert not asked


@given(own=st.integers(1, 4), members=st.lists(st.integers(1, 4), max_size=4), count=st.integers(0, 20))
def test_the_newest_leave_first_and_one_process_stays(own, members, count):
    people, _ = make(own)
    for number, size in enumerate(members):
        people.add(Member(size, number))
    before = names(people.begin(people.target()))
    if not 0 < count < len(before):
        with pytest.raises(UserError, match="keeps at least one process"):
            people.lower(count)
        return
    people.lower(count)
    assert names(people.begin(people.target())) == before[: len(before) - count]


def test_an_attempt_gets_no_more_processes_than_there_are():
    people, _ = make(1)
    assert len(people.begin(3)) == 1
