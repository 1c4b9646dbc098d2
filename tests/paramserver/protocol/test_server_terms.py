"""What a server does not do: for other terms, other processes and other starts, before it has a state, and twice."""

import dataclasses

import numpy as np
import pytest
import workload
from copies import (
    BACKUP,
    FIRST_COMMIT,
    FIRST_PUSH,
    PARAMS,
    PRIMARY,
    SETTINGS,
    deliver,
    kinds,
    membership,
    pair,
    push,
    server,
    synchronous,
    tell,
)

from jaxdist.paramserver.protocol import effects, messages
from jaxdist.paramserver.protocol.server import MAX_EARLY
from jaxdist.paramserver.protocol.shard import Shard

PULL = messages.Pull(0, 0, 1, 2, 0, 5)
CUT = messages.SaveCut(1, 0, 1, "c")


def at(one, now, message):
    """Return the messages that a server sends when it is told `message` at the time `now`."""
    return [sent.message for sent in one.handle(message, now)[0]]


def saved(**changes):
    shard = Shard(shard=0, settings=SETTINGS, updater=workload.Momentum(), params=PARAMS)
    return dataclasses.replace(shard.export(), version=7, **changes)


def loading():
    """Return a server that waits for its shard of a saved cut, to enter term 3 with it."""
    one = server(PRIMARY, durability="snapshot")
    assert tell(one, membership(3, restore_term=3, restore="c", backup="")) == []
    return one


def test_a_stopped_server_and_one_that_differs_from_its_primary_take_nothing_more():
    one, other = synchronous(), synchronous()
    tell(one, messages.StopRun(7, "max_steps"))
    other.diverged = "block 0"
    for message in (messages.Tick(), FIRST_PUSH, PULL, membership(2, backup="")):
        assert one.handle(message, 9.0) == ([], [])
    for message in (FIRST_PUSH, PULL, membership(2, backup="")):
        assert other.handle(message, 9.0) == ([], [])


def test_a_server_is_heard_of_at_once_and_then_once_a_heartbeat():
    one = server(PRIMARY)
    times = (0.0, 0.4, 0.5, 0.9, 1.0, 1.4)
    assert [len(at(one, now, messages.Tick())) for now in times] == [1, 0, 1, 0, 1, 0]


def test_a_membership_that_is_not_newer_changes_nothing():
    first, second = pair()
    deliver(first, second, tell(first, membership(3)) + tell(second, membership(3)))
    place = messages.ShardPlace(BACKUP, 1, "", 0, False)
    for one in (first, second):
        index = one.index
        assert tell(one, dataclasses.replace(membership(2), shards=(place,))) == []
        assert (one.term, one.index, one.primary) == (3, index, one is first)
    assert tell(second, membership(3)) == [], "only the primary says that it has entered"


def test_a_server_that_waits_for_its_shard_keeps_waiting_for_that():
    one = loading()
    for message in (membership(2, backup=""), membership(3, restore_term=3, restore="c", backup="")):
        assert one.handle(message, 0.0) == ([], [])
    assert tell(one, messages.Fenced(PRIMARY, 1, 9)) == []
    assert at(one, 0.0, messages.Tick()) == [messages.Heartbeat(PRIMARY, 1, -1, 4, False)]
    assert tell(one, messages.Loaded("b/shard-0", saved())) == []
    assert kinds(tell(one, messages.Loaded("c/shard-0", saved()))) == ["MembershipAck"]
    assert (one.term, one.shard.version) == (3, 7)
    assert tell(one, messages.Loaded("c/shard-0", saved())) == [], "it waits for none"


def test_a_loaded_shard_has_neither_the_term_nor_the_staged_pushes_of_the_run_that_saved_it():
    one = loading()
    _, todo = one.handle(messages.Loaded("c/shard-0", saved(term=9, staged=(FIRST_PUSH,))), 0.0)
    assert (one.shard.term, one.shard.staged) == (3, {})
    assert effects.Leads(0, 3) in todo


def test_a_server_that_loads_is_replaced_like_any_other():
    one = loading()
    place = messages.ShardPlace(BACKUP, 1, "", 0, False)
    (again,) = tell(one, messages.Membership(4, (), (place,), 1, ""))
    assert again.message == messages.Register(PRIMARY, 2)
    assert tell(one, messages.Loaded("c/shard-0", saved())) == []


def test_a_server_that_was_replaced_has_nothing_of_its_earlier_start():
    one = synchronous()
    tell(one, FIRST_PUSH)
    place = messages.ShardPlace(BACKUP, 1, "", 0, False)
    tell(one, messages.Membership(2, (), (place,), 1, ""))
    assert (one.membership, one.index, one.primary, one.shard.staged, one.waiting) == (None, 0, False, {}, {})
    assert tell(one, messages.Membership(3, (), (place,), 1, "")) == [], "it has registered already"


def test_entries_in_flight_stay_so_through_a_term_with_the_same_backup():
    first, second = pair()
    (copied,) = tell(first, push(1))
    sent = tell(first, membership(2))
    assert kinds(sent) == ["Replicate"], "no state is sent to a backup that has one"
    resent = [message for message in at(first, 9.0, messages.Tick()) if isinstance(message, messages.Replicate)]
    assert [(each.index, each.term) for each in resent] == [(copied.message.index, 2), (copied.message.index + 1, 2)]
    tell(second, membership(2))
    assert kinds(deliver(first, second, [(BACKUP, each) for each in resent])) == ["PushAck", "MembershipAck"]


def test_answers_that_waited_for_a_backup_leave_when_there_is_none():
    first, _ = pair()
    tell(first, push(1))
    assert kinds(tell(first, membership(2, backup=""))) == ["PushAck", "MembershipAck"]
    assert kinds([(0, message) for message in at(first, 9.0, messages.Tick())]) == ["Heartbeat"]


def test_a_backup_that_has_the_state_by_a_new_term_is_sent_entries_again():
    first = server(PRIMARY)
    assert kinds(tell(first, membership(1, synced=False))) == ["Transfer"]
    assert kinds(tell(first, membership(2))) == ["Replicate"]


def test_an_acknowledgement_from_before_the_state_was_sent_does_not_stand_for_the_state():
    first = server(PRIMARY)
    tell(first, membership(1, backup=""), push(1))
    sent = tell(first, membership(2, synced=False))
    assert [type(each.message) for each in sent] == [messages.Transfer]
    assert (sent[0].message.shard, sent[0].message.term, sent[0].message.index) == (0, 2, 2)
    assert tell(first, messages.Replicated(0, 2, 1)) == []
    told = tell(first, messages.Replicated(0, 2, 2))
    assert kinds(told) == ["Replicate", "Synced"]
    assert told[1].message == messages.Synced(0, 2, BACKUP, 1)


@pytest.mark.parametrize(
    "asked",
    [
        FIRST_PUSH,
        PULL,
        FIRST_COMMIT,
        messages.Finish(1, 0, 1, 4.0),
        messages.Read(1, 0, 1, messages.PARAMS),
        CUT,
        messages.Replicated(0, 1, 9),
    ],
    ids=lambda asked: type(asked).__name__,
)
def test_a_backup_leaves_requests_to_the_primary(asked):
    second = server(BACKUP, mode="sync")
    tell(second, membership(1, synced=False))
    second.restored = 1
    assert second.handle(asked, 0.0) == ([], [])
    assert (second.index, second.shard.version, second.shard.staged, second.waiting) == (0, 0, {}, {})


@pytest.mark.parametrize(
    "changes", [{"worker": 1}, {"incarnation": 0}, {"incarnation": 2}], ids=lambda changes: str(changes)
)
def test_a_worker_that_is_no_member_reads_nothing(changes):
    one = synchronous()
    for version in (0, 1):
        assert one.handle(dataclasses.replace(PULL, version=version, **changes), 0.0) == ([], [])
    assert one.waiting == {}


def test_what_a_worker_asked_for_before_it_was_replaced_is_not_answered():
    one = synchronous()
    assert tell(one, dataclasses.replace(PULL, version=1)) == []
    assert list(one.waiting) == [0]
    tell(one, dataclasses.replace(membership(2, backup=""), members=(messages.Member(0, 2, 0),)))
    assert one.waiting == {}


def test_of_two_pulls_the_later_counts():
    one = synchronous()
    assert kinds(tell(one, dataclasses.replace(PULL, version=1), PULL)) == ["Pulled"]
    assert one.waiting == {}


def test_an_answered_pull_tells_observers_what_was_read():
    one = synchronous()
    _, todo = one.handle(PULL, 0.0)
    assert todo == [effects.Served(0, 1, 0, 5, 0, one.shard.chain)]


def test_a_read_is_answered_with_the_part_that_it_names():
    one = server(PRIMARY, durability="snapshot")
    tell(one, membership(1, backup=""), push(1))
    for part, arrays in ((messages.PARAMS, one.shard.params), ("opt_state", one.shard.opt_state)):
        ((to, answer),) = tell(one, messages.Read(1, 0, 4, part))
        assert to == "observer"
        assert dataclasses.replace(answer, arrays=()) == messages.ReadAnswer(1, 0, 4, part, 1, one.shard.chain, ())
        assert [array.tolist() for array in answer.arrays] == [array.tolist() for array in arrays]
    assert not np.array_equal(one.shard.params[0], one.shard.opt_state[0])
    assert tell(one, messages.Read(0, 0, 4, messages.PARAMS)) == [], "of a term before a rollback"


def test_pushes_that_change_nothing_are_counted_by_what_is_wrong_with_them():
    one = synchronous()
    tell(one, FIRST_PUSH)
    one.waiting.clear()
    assert kinds(tell(one, FIRST_PUSH)) == ["Staged", "PushAck"]
    assert list(one.waiting) == [0], "the worker may not have been told"
    fenced = dataclasses.replace(FIRST_PUSH, incarnation=0)
    ((_, answer),) = tell(one, fenced)
    assert answer.status == "fenced"
    assert one.counters == {"duplicates_refused": 1, "fenced": 1, "refused": 0}
    tell(one, FIRST_COMMIT)
    ((_, answer),) = tell(one, dataclasses.replace(FIRST_PUSH, sequence=2))
    assert answer.status == "obsolete"
    assert one.counters == {"duplicates_refused": 1, "fenced": 1, "refused": 0}, "a slow worker does no harm"


def test_a_file_that_nobody_asked_for_is_no_cut():
    assert synchronous().handle(messages.Written("c/shard-0", 1, ""), 0.0) == ([], [])


def test_a_backup_applies_entries_in_their_order_whatever_order_they_arrive_in():
    first, second = pair()
    entries = [tell(first, push(sequence))[0].message for sequence in (1, 2, 3)]
    for entry in (*reversed(entries), *entries):
        tell(second, entry)
    assert (second.index, second.shard.chain, second.early) == (first.index, first.shard.chain, {})


def test_a_backup_keeps_a_limited_number_of_entries_that_came_early():
    _, second = pair()
    entry = messages.Replicate(0, 1, 0, 0, messages.NoOp())
    for ahead in (MAX_EARLY, MAX_EARLY + 1):
        tell(second, dataclasses.replace(entry, index=second.index + ahead))
    assert list(second.early) == [second.index + MAX_EARLY]


def test_a_copy_makes_its_update_ready_with_the_pushes_and_not_with_other_entries():
    ready = effects.Continue(messages.GetReady())
    first, second = (server(name, mode="sync") for name in (PRIMARY, BACKUP))
    tell(second, membership(1))
    deliver(first, second, tell(first, membership(1)))
    for request, expected in ((PULL, 0), (FIRST_PUSH, 1)):
        sent, todo = first.handle(request, 0.0)
        assert todo.count(ready) == expected
        _, todo = second.handle(sent[0].message, 0.0)
        assert todo.count(ready) == expected


@pytest.mark.parametrize("behind", [0, 1])
def test_a_state_that_is_no_newer_than_the_copy_is_acknowledged_and_not_taken(behind):
    first, second = pair()
    deliver(first, second, tell(first, push(1)))
    params = second.shard.params
    other = dataclasses.replace(first.shard.export(), params=(np.zeros(4, np.float32),))
    ((to, answer),) = tell(second, messages.Transfer(0, 1, second.index - behind, other))
    assert (to, answer) == (PRIMARY, messages.Replicated(0, 1, second.index))
    assert second.shard.params is params


def test_what_is_not_acknowledged_is_sent_again_after_the_retry_time_and_not_before():
    first, _ = pair()
    tell(first, push(1))
    replacing = server(PRIMARY)
    tell(replacing, membership(1, synced=False))
    for one, kind in ((first, messages.Replicate), (replacing, messages.Transfer)):
        again = [sum(isinstance(each, kind) for each in at(one, now, messages.Tick())) for now in (0.9, 1.0, 1.9, 2.0)]
        assert again == [0, 1, 0, 1]


def test_no_more_entries_are_sent_again_than_a_backup_keeps():
    first, _ = pair()
    for sequence in range(1, MAX_EARLY + 2):
        tell(first, push(sequence))
    again = [each for each in at(first, 9.0, messages.Tick()) if isinstance(each, messages.Replicate)]
    assert [each.index for each in again] == list(range(2, MAX_EARLY + 2))


def test_a_replaced_primary_sends_its_entries_no_more():
    first, _ = pair()
    tell(first, push(1))
    place = messages.ShardPlace(BACKUP, 1, PRIMARY, 1, True)
    tell(first, dataclasses.replace(membership(2), shards=(place,)))
    assert [type(each) for each in at(first, 9.0, messages.Tick())] == [messages.Heartbeat]


def test_a_message_for_another_role_is_left_alone():
    assert synchronous().handle(messages.StopAck(PRIMARY), 0.0) == ([], [])
