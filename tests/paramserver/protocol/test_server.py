"""A server and its copy: what is held back, what a rollback leaves behind, and copies that differ."""

import dataclasses

import numpy as np
import pytest
import workload
from copies import (
    BACKUP,
    FIRST,
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
from jaxdist.paramserver.protocol.shard import Shard


def test_an_answer_waits_for_the_backup():
    first, second = pair()
    sent = tell(first, push(1))
    assert kinds(sent) == ["Replicate"]
    assert kinds(deliver(first, second, sent)) == ["PushAck"]


def _requests():
    """Return requests by name; the last pull waits for the push, which answers it."""
    pull, later = (messages.Pull(0, 0, 1, 2, version, 0) for version in (0, 1))
    pushed, asked = {"push": [push(1)], "pull and push": [later, push(1)]}, {"pull": [pull]}
    return pushed | asked | {"read": [messages.Read(1, 0, 1, messages.PARAMS)], "membership": [membership(1)]}


@pytest.mark.parametrize("what", _requests())
def test_a_request_that_is_repeated_while_its_answer_waits_for_the_backup_needs_no_second_entry(what):
    """Or else a slow connection fills with entries, answers wait longer, and more requests are repeated."""
    first, second = pair()
    asked = _requests()[what]
    sent = tell(first, *asked)
    assert kinds(sent) == ["Replicate"]
    assert tell(first, *asked) == []
    answers = deliver(first, second, sent)
    assert len(answers) == len(asked)
    assert len(deliver(first, second, tell(first, *asked))) == len(asked)  # the answers may have been lost


def test_without_a_backup_an_answer_leaves_at_once():
    one = server(PRIMARY, durability="snapshot")
    tell(one, membership(1, backup=""))
    assert kinds(tell(one, push(1))) == ["PushAck"]


def test_a_step_that_is_complete_is_told_to_the_scheduler_and_again_with_every_copy():
    one = synchronous()
    first = dataclasses.replace(push(1), lease=messages.Lease(0, 0, 0, 0, 2))
    replies, todo = one.handle(first, 0.0)
    assert kinds(replies) == ["Staged"]
    (ready,) = [effect.message for effect in todo if isinstance(effect, effects.Continue)]
    assert kinds(tell(one, ready)) == ["Pulled"]
    replies, todo = one.handle(first, 1.0)
    assert kinds(replies) == ["Staged", "PushAck"]
    assert replies[1].message.status == "duplicate"


def tick(one):
    return [message for _, message in tell(one, messages.Tick()) if not isinstance(message, messages.Heartbeat)]


def test_a_staged_push_is_answered_at_the_next_tick_because_the_next_lease_tells_the_same():
    one = synchronous()
    assert "PushAck" not in kinds(tell(one, FIRST_PUSH))
    assert tick(one) == [messages.PushAck(0, 0, 1, 1, "staged")]
    assert tick(one) == []


def test_a_staged_push_is_answered_at_once_where_another_slice_waits_for_the_worker():
    one = server(PRIMARY, mode="sync", durability="snapshot", workers=2)
    tell(one, membership(1, backup=""))  # of one worker
    assert kinds(tell(one, FIRST_PUSH)) == ["PushAck"]
    assert tick(one) == []


def test_a_replaced_primary_answers_no_push_at_its_next_tick():
    """Another primary may have rolled back since, or have lost the push with this one."""
    one = synchronous()
    tell(one, FIRST_PUSH)
    place = messages.ShardPlace(BACKUP, 1, PRIMARY, 1, True)
    tell(one, dataclasses.replace(membership(2), shards=(place,)))
    assert tick(one) == []
    tell(one, membership(3, backup=""))
    assert tick(one) == []


def test_a_pull_that_waited_for_a_commit_is_answered_once_the_backup_has_it():
    """The answer needs no entry of its own: the copy of the commit shows that this is still the primary."""
    first, second = (server(name, mode="sync") for name in (PRIMARY, BACKUP))
    tell(second, membership(1))
    deliver(first, second, tell(first, membership(1)))
    one = dataclasses.replace(push(1), lease=messages.Lease(0, 0, 0, 0, 2))
    deliver(first, second, tell(first, one, messages.Pull(0, 0, 1, 2, 1, 0)))
    sent = tell(first, messages.Commit(1, 0, 1, False, (messages.Contributor(0, 1, 1, one.lease),)))
    assert kinds(sent) == ["Replicate"]
    assert sorted(kinds(deliver(first, second, sent))) == ["CommitAck", "Pulled"]


def test_a_brief_commit_means_the_pushes_that_the_shard_told_of():
    one = synchronous()
    first = dataclasses.replace(push(1), lease=messages.Lease(0, 0, 0, 0, 2))
    (note,) = tell(one, first)
    brief = messages.Commit(1, 0, 1, False, (), note.message.fingerprint)
    assert tell(one, dataclasses.replace(brief, fingerprint=brief.fingerprint + 1)) == []
    assert one.shard.version == 0
    _, todo = one.handle(brief, 0.0)
    (applied,) = [effect for effect in todo if isinstance(effect, effects.Applied)]
    assert applied.contributors == (messages.Contributor(0, 1, 1, first.lease),)
    assert kinds(tell(one, brief)) == ["CommitAck"]


def test_the_update_is_made_before_its_commit_arrives():
    one = synchronous()
    first = dataclasses.replace(push(1), lease=messages.Lease(0, 0, 0, 0, 2))
    before = one.shard.params
    *_, ahead = tell(one, first, messages.GetReady())
    assert (one.shard.version, one.shard.params) == (0, before)
    one.shard.updater.update = None  # is not called again
    sent = tell(one, FIRST_COMMIT)
    assert (kinds(sent), one.shard.version) == (["CommitAck"], 1)
    assert not np.array_equal(one.shard.params[0], before[0])
    # The params have travelled meanwhile.
    assert (ahead.message.sequence, ahead.message.version, ahead.message.ahead != 0) == (2, 1, True)
    assert np.array_equal(ahead.message.pieces[0], one.shard.params[0])
    (again,) = tell(one, messages.Pull(0, 0, 1, 2, 1, 0))  # they may be lost
    assert again.message == dataclasses.replace(ahead.message, ahead=0)


@pytest.mark.parametrize("backup", ["", BACKUP])
def test_pushes_of_params_that_travelled_ahead_may_come_before_the_commit(backup):
    """Their step is complete with the commit of the one before: the scheduler need not ask again a second later."""
    one = synchronous() if not backup else server(PRIMARY, mode="sync")
    second = server(BACKUP, mode="sync")
    tell(second, membership(1))
    deliver(one, second, tell(one, membership(1, backup=backup)))
    next_push = dataclasses.replace(push(2), lease=messages.Lease(1, 0, 0, 2, 4), version=1)
    deliver(one, second, tell(one, FIRST_PUSH, messages.GetReady(), next_push, messages.GetReady()))
    replies, todo = one.handle(FIRST_COMMIT, 0.0)
    assert effects.Continue(messages.GetReady()) in todo
    told = [message for _, message in deliver(one, second, replies) if isinstance(message, messages.Staged)]
    assert [(note.shard, note.step) for note in told] == [(0, 1)]


def test_params_sent_ahead_are_sent_again_if_the_step_is_made_of_other_pushes():
    """A worker died after its push, and another one has computed the slice again."""
    one = synchronous()
    one.shard.apply(messages.SetMembers(2, (messages.Member(0, 1, 0), messages.Member(1, 2, 0))))
    other = dataclasses.replace(FIRST_PUSH, worker=1, incarnation=2, pieces=(np.full(4, 2.0, np.float32),))
    early = tell(one, FIRST_PUSH, messages.GetReady(), other, messages.GetReady())
    sent = tell(one, dataclasses.replace(FIRST_COMMIT, contributors=(messages.Contributor(1, 2, 1, FIRST),)))
    answers = {m.worker: m for _, m in sent if isinstance(m, messages.Pulled)}
    assert [m.worker for _, m in early if isinstance(m, messages.Pulled)] == [0, 1]
    assert [answers[worker].ahead for worker in (0, 1)] == [0, 0]
    assert np.array_equal(answers[0].pieces[0], one.shard.params[0])


def test_a_backup_tells_the_scheduler_that_both_copies_have_a_step():
    first, second = (server(name, mode="sync") for name in (PRIMARY, BACKUP))
    tell(second, membership(1))
    deliver(first, second, tell(first, membership(1)))
    sent = tell(first, FIRST_PUSH)
    assert kinds(sent) == ["Replicate"]
    assert kinds(tell(second, sent[0].message)) == ["Staged", "Replicated"]


def test_a_push_asks_for_the_params_of_the_next_step():
    one = synchronous()
    tell(one, FIRST_PUSH, FIRST_PUSH)
    sent = tell(one, FIRST_COMMIT)
    answers = [m for _, m in sent if isinstance(m, messages.Pulled)]
    assert [(m.worker, m.sequence, m.version) for m in answers] == [(0, 2, 1)]
    assert kinds(tell(one, FIRST_PUSH)) == ["PushAck"]  # a late copy asks for nothing more
    assert one.waiting == {}


def test_a_primary_that_takes_over_answers_what_the_pushes_asked_for():
    one = server(PRIMARY, mode="sync", durability="none", snapshot_every=0, max_steps=3)
    one.shard.apply(messages.SetMembers(1, (messages.Member(0, 1, 0),)))
    one.shard.apply(FIRST_PUSH)
    one.restored = 1
    tell(one, membership(1, backup="", synced=False))
    assert kinds(tell(one, FIRST_COMMIT)) == ["CommitAck", "Pulled"]


def rolled_back(pushes):
    """Return a pair after a rollback in term 2, and a message of each kind that was sent before it."""
    first, second = pair()
    early = {}
    for sequence in range(1, pushes + 1):
        sent = tell(first, push(sequence))
        early["Replicate"] = sent[0].message
        early["Replicated"] = tell(second, early["Replicate"])[0].message
        tell(first, early["Replicated"])
    transfer = messages.Transfer(0, 1, first.index, first.shard.export())
    early["Transfer"] = transfer
    after = membership(2, restore_term=2)
    tell(second, after)
    deliver(first, second, tell(first, after))
    return first, second, early


@pytest.mark.parametrize("kind", ["Replicate", "Transfer"])
def test_a_backup_takes_nothing_from_before_a_rollback(kind):
    _, second, early = rolled_back(3)
    index, version = second.index, second.shard.version
    assert early[kind].index > index
    tell(second, early[kind])
    assert (second.index, second.shard.version, second.early, second.diverged) == (index, version, {}, "")


def test_an_acknowledgement_from_before_a_rollback_releases_nothing():
    first, second, early = rolled_back(3)
    sent = tell(first, push(1))
    assert kinds(sent) == ["Replicate"]
    assert early["Replicated"].index >= first.index
    assert tell(first, early["Replicated"]) == []
    assert kinds(deliver(first, second, sent)) == ["PushAck"]


def in_term_2(**changes):
    """Return a server without a backup that has rolled back in term 2, with one push of the first step."""
    one = server(PRIMARY, mode="sync", durability="snapshot", **changes)
    tell(one, membership(1, backup=""), membership(2, restore_term=2, backup=""))
    tell(one, dataclasses.replace(push(1), lease=FIRST))
    return one


def test_a_commit_from_before_a_rollback_is_ignored():
    """The pushes that it names are gone, and another worker may be computing the step."""
    one = in_term_2()
    late = FIRST_COMMIT
    assert (tell(one, late), one.shard.version) == ([], 0)
    assert kinds(tell(one, dataclasses.replace(late, term=2))) == ["CommitAck", "Pulled"]


def test_a_norm_from_before_a_rollback_is_ignored():
    """The step is trained again, with a push of a worker that is new, so its norm is another one."""
    one = in_term_2()
    one.shard.updater = workload.Momentum(clip=True)
    assert kinds(tell(one, messages.Commit(2, 0, 1, False, (messages.Contributor(0, 1, 1, FIRST),)))) == ["Norms"]
    assert (tell(one, messages.Finish(1, 0, 1, 4.0)), one.shard.version) == ([], 0)
    assert kinds(tell(one, messages.Finish(2, 0, 1, 4.0))) == ["CommitAck", "Pulled"]


def test_an_order_to_save_from_an_earlier_term_writes_nothing():
    """The cut of that name may be complete, and its file would be replaced by that of another step."""
    one = in_term_2()
    late = messages.SaveCut(1, 0, 1, "0000000000-1-1")
    assert one.handle(late, 0.0) == ([], [])
    _, (write,) = one.handle(dataclasses.replace(late, term=2), 0.0)
    assert isinstance(write, effects.Write)


@pytest.mark.parametrize("what", ["params", "opt_state"])
def test_copies_that_differ_are_found_at_the_next_check(what):
    """The updates are the same; the arrays are not."""
    first, second = pair()
    for sequence in (1, 2):
        if sequence == 2:
            arrays = getattr(second.shard, what)
            setattr(second.shard, what, tuple(np.nextafter(array, np.float32(9)) for array in arrays))
        outside = deliver(first, second, tell(first, push(sequence)))
        assert kinds(outside) == (["PushAck"] if sequence == 1 else ["Diverged"])
    assert "after update 2" in second.diverged
    assert kinds(tell(second, messages.Tick())) == ["Diverged"]
    assert tell(second, tell(first, push(3))[0].message) == []
    assert kinds(tell(second, messages.StopRun(3, "error"))) == ["StopAck"]


def test_copies_that_do_not_differ_go_on():
    first, second = pair()
    for sequence in range(1, 6):
        assert kinds(deliver(first, second, tell(first, push(sequence)))) == ["PushAck"]
    assert first.shard.chain == second.shard.chain


def test_a_new_backup_gets_the_whole_state():
    first, _ = pair()
    new = server(BACKUP)
    tell(new, dataclasses.replace(membership(2, synced=False)))
    tell(first, membership(2, backup=""))
    sent = tell(first, membership(3, synced=False))
    assert kinds(sent) == ["Transfer"]
    tell(new, membership(3, synced=False))
    assert "Synced" in kinds(deliver(first, new, sent))
    assert new.shard.chain == first.shard.chain


def test_a_state_that_takes_long_to_send_is_sent_again_as_it_is():
    """One of a newer index each time would never be acknowledged, and the connection would carry nothing else."""
    first, new = server(PRIMARY), server(BACKUP)
    tell(first, membership(1, backup=""), push(1))
    ((_, sent),) = tell(first, membership(2, synced=False))
    for second in range(1, 4):
        again = first.handle(messages.Tick(), 2.0 * second)[0] + tell(first, push(1 + second))
        assert [each for _, each in again if isinstance(each, messages.Transfer)] == [sent]
    tell(new, membership(2, synced=False))
    assert kinds(deliver(first, new, tell(new, sent))).count("PushAck") == 3
    assert (new.index, new.shard.chain) == (first.index, first.shard.chain)


def test_entries_are_sent_again_only_if_the_backup_acknowledges_nothing_for_a_while():
    """On a slow connection, copies of entries that are on their way would leave no room for new ones."""
    first, second = pair()
    sent = [tell(first, push(sequence))[0].message for sequence in range(1, 9)]
    for number, entry in enumerate(sent):
        now = 0.8 * (number + 1)
        (answer,) = tell(second, entry)
        assert kinds(first.handle(answer.message, now)[0]) == ["PushAck"]
        ticked = first.handle(messages.Tick(), now + 0.1)[0]
        assert "Replicate" not in kinds(ticked)
    tell(first, push(9))
    lost = tell(first, push(10))
    assert kinds(lost) == ["Replicate"]
    assert "Replicate" not in kinds(first.handle(messages.Tick(), now + 0.9)[0])
    assert kinds(first.handle(messages.Tick(), now + 1.1)[0]).count("Replicate") == 2


@pytest.mark.parametrize("entered", ["before the state arrives", "after it arrived"])
def test_a_state_reaches_the_backup_although_a_term_begins_meanwhile(entered):
    first, new = server(PRIMARY), server(BACKUP)
    tell(first, membership(1, backup=""), push(1))
    ((_, sent),) = tell(first, membership(2, synced=False))
    tell(new, membership(2, synced=False))
    arrived = tell(new, sent) if entered == "after it arrived" else []
    tell(first, membership(3, synced=False))
    tell(new, membership(3, synced=False))
    outside = deliver(first, new, arrived + tell(new, sent))
    for _ in range(2):
        outside += deliver(first, new, first.handle(messages.Tick(), 2.0)[0])
    assert {"MembershipAck", "Synced"} <= set(kinds(outside))
    assert (new.index, new.shard.chain) == (first.index, first.shard.chain)


def test_a_server_that_was_replaced_starts_over_under_a_new_boot():
    first, _ = pair()
    place = messages.ShardPlace(BACKUP, 1, "", 0, False)
    (again,) = tell(first, messages.Membership(2, (), (place,), 1, ""))
    assert again.message == messages.Register(PRIMARY, 2)
    assert first.shard.version == 0


def test_a_server_whose_boot_number_is_too_small_registers_with_a_larger_one_unless_it_has_joined():
    one = server(PRIMARY)
    assert tell(one, messages.Fenced(PRIMARY, 7, 9)) == []  # of another start
    (again,) = tell(one, messages.Fenced(PRIMARY, 1, 9))
    assert again.message == messages.Register(PRIMARY, 10)
    first, _ = pair()
    assert tell(first, messages.Fenced(PRIMARY, 1, 9)) == []
    assert (first.boot, first.term) == (1, 1)


def test_a_missing_file_of_a_saved_cut_ends_the_server_and_is_named():
    one = server(PRIMARY, durability="snapshot")
    _, todo = one.handle(membership(2, restore_term=2, restore="0000000004-1-1", backup=""), 0.0)
    assert [effect.name for effect in todo] == ["0000000004-1-1/shard-0"]
    _, (end,) = one.handle(messages.Loaded("0000000004-1-1/shard-0", None), 0.0)
    assert isinstance(end, effects.Exit)
    assert "0000000004-1-1/shard-0 is missing" in end.reason


def test_a_saved_shard_is_loaded_before_the_term_is_entered():
    saved = Shard(shard=0, settings=SETTINGS, updater=workload.Momentum(), params=PARAMS)
    saved.version = 7
    one = server(PRIMARY, durability="snapshot")
    assert tell(one, membership(2, restore_term=2, restore="c", backup="")) == []
    sent = tell(one, messages.Loaded("c/shard-0", saved.export()))
    assert [(message.term, message.version) for _, message in sent] == [(2, 7)]


def test_a_backup_that_a_rollback_left_behind_does_not_acknowledge_by_its_old_log():
    """Its primary would count new entries as copied, and name a backup that lacks them as one that may take over."""
    first, second = pair()
    deliver(first, second, tell(first, push(1), push(2), push(3)))
    after = membership(2, restore_term=2, synced=False)
    assert tell(second, after) == []
    assert second.index == 0
    entry = messages.Replicate(0, 2, 1, 0, messages.NoOp())
    assert tell(second, entry) == []
    deliver(first, second, tell(first, after))
    assert (second.index, second.restored, second.shard.version) == (first.index, 2, 0)


def test_a_server_stops_once_and_says_so_each_time():
    one = server(PRIMARY)
    stop, told = messages.StopRun(7, "max_steps"), [effects.Send("scheduler", messages.StopAck(PRIMARY))]
    assert one.handle(stop, 0.0) == (told, [effects.Exit(7, "max_steps")])
    assert one.handle(stop, 1.0) == (told, [])


def test_a_cut_is_written_once_and_its_answer_repeated():
    one = server(PRIMARY, durability="snapshot")
    tell(one, membership(1, backup=""))
    order = messages.SaveCut(1, 0, 3, "cut-3")
    (write,) = one.handle(order, 0.0)[1]
    assert (write.name, write.content.version) == ("cut-3/shard-0", 0)
    assert one.handle(order, 0.0) == ([], []), "it is not written yet"
    saved = [("scheduler", messages.CutSaved(0, "cut-3", 17, ""))]
    assert tell(one, messages.Written("cut-2/shard-0", 16, "")) == []
    assert tell(one, messages.Written("cut-3/shard-0", 17, "")) == saved
    assert one.handle(order, 0.0) == (saved, [])
    for late in (dataclasses.replace(order, term=0), dataclasses.replace(order, number=2, name="cut-2")):
        assert one.handle(late, 0.0) == ([], []), "of an earlier term, and an earlier order"
    assert len(one.handle(dataclasses.replace(order, number=4, name="cut-4"), 0.0)[1]) == 1
    assert server(BACKUP).handle(order, 0.0) == ([], []), "only the primary saves"


def test_a_push_that_does_not_fit_is_refused_with_its_reason_and_changes_nothing():
    one = server(PRIMARY, durability="snapshot")
    tell(one, membership(1, backup=""))
    before = one.shard.export()
    ((to, answer),) = tell(one, dataclasses.replace(push(1), pieces=(np.ones(5, np.float32),)))
    assert (to, answer.status) == ("worker/0", "refused")
    assert answer.reason == "Block 0 has shape (4,), its piece has (5,)."
    assert one.counters == {"duplicates_refused": 0, "fenced": 0, "refused": 1}
    assert one.shard.version == before.version == 0
    assert np.array_equal(one.shard.params[0], PARAMS[0])
    assert kinds(tell(one, push(1))) == ["PushAck"]


def test_a_server_without_a_membership_registers_and_then_says_that_it_is_alive():
    one, later = server(PRIMARY, durability="snapshot"), 100.0
    assert one.handle(messages.Tick(), 0.0)[0] == [("scheduler", messages.Register(PRIMARY, 1))]
    tell(one, membership(1, backup=""))
    assert one.handle(messages.Tick(), later)[0] == [("scheduler", messages.Heartbeat(PRIMARY, 1, 1, 1, False))]
    one.diverged = "block 0"
    assert one.handle(messages.Tick(), 2 * later)[0] == [("scheduler", messages.Diverged(PRIMARY, 1, "block 0"))]
