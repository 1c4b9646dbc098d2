"""The membership stage: joining, returning, being dropped, and losing a shard."""

import dataclasses

import pytest
import stages
from hypothesis import given
from hypothesis import strategies as st

from jaxdist.paramserver.protocol import effects, messages
from jaxdist.paramserver.protocol.messages import Trained
from jaxdist.paramserver.protocol.scheduler import lease_table
from jaxdist.paramserver.wire import encoding


def test_workers_that_join_together_begin_one_term():
    cast = stages.Cast(stages.settings(workers=4)).join()
    assert cast.state.term == 2
    assert [member.incarnation for member in cast.state.membership.members] == [1, 2, 3, 4]


def test_a_large_crew_joins_with_few_bytes():
    """256 workers and 16 servers, all at once: at most 5 MB for every message and record."""
    chosen = stages.settings(workers=256, servers=16, global_batch_size=256, num_examples=2560)
    cast = stages.Cast(chosen)
    sent, done = cast.tell(*(messages.Register(name, 1) for name in cast.servers()))
    for first in range(0, 256, 64):  # in four groups
        cast.tell(*(messages.Register(f"worker/{n}", 1) for n in range(first, first + 64)))
        more = cast.tick()
        sent, done = sent + more[0], done + more[1]
    size = sum(len(encoding.to_bytes(message)) for _, message in sent)
    size += sum(len(encoding.to_bytes(effect.record)) for effect in stages.named(done, "Append"))
    assert len(cast.state.membership.members) == 256
    assert size < 5e6


def test_a_shard_that_entered_an_earlier_term_only_is_waited_for():
    """Until it enters the new one, it takes pushes of workers that were dropped."""
    cast = stages.Cast(stages.settings()).join()
    late = cast.entered(0)
    cast.tell(messages.Register("worker/0", 2))
    cast.tick()
    cast.tell(late)
    assert not cast.state.settled()
    cast.enter_term()
    assert cast.state.settled()


def test_a_backup_that_was_synced_before_a_rollback_may_not_take_over():
    """The rollback left it behind: its primary has loaded a cut, which it has yet to send."""
    cast = stages.Cast(stages.settings(servers=2, durability="replicated", snapshot_every=2)).join()
    cast.tell(messages.Register("server/1/b", 2))
    note = messages.Synced(1, cast.state.term, "server/1/b", 2)
    cast.tell(messages.Died("server/0/b", 1), messages.Register("server/0/a", 2))
    assert cast.state.counters["rollbacks"] == 1
    term = cast.state.term
    cast.tell(note)
    assert (cast.state.term, cast.state.membership.shards[1].synced) == (term, False)
    cast.tell(dataclasses.replace(note, term=term))
    assert cast.state.membership.shards[1].synced


def test_a_process_that_did_not_hear_the_answer_gets_it_again():
    cast = stages.Cast(stages.settings()).join()
    ((to, again),) = cast.tell(messages.Register("worker/0", 1))[0]
    assert (to, again.incarnation, again.membership.term) == ("worker/0", 1, cast.state.term)
    assert cast.tell(messages.Register("worker/0", 0)) == ([], [])


def test_a_restarted_worker_gets_a_new_incarnation_and_its_lease_goes_on():
    cast = stages.Cast(stages.settings(workers=2)).join()
    lease = cast.ask(0)
    cast.tell(messages.Register("worker/0", 2))
    cast.tick()
    assert cast.state.workers[0].incarnation == 3
    cast.enter_term()
    assert cast.ask(1) == lease
    assert cast.state.counters["fenced"] == 1


@pytest.mark.parametrize("name", ["worker/0", "server/0/a"])
def test_a_start_with_a_smaller_boot_number_learns_the_newest_once_that_one_is_silent(name):
    cast = stages.Cast(stages.settings(workers=2, durability="snapshot", snapshot_every=2)).join()
    assert cast.tell(messages.Register(name, 0)) == ([], [])  # a late one, or a process that was replaced
    silent_for(cast, 6.0, *({"worker/0", "worker/1", "server/0/a"} - {name}))
    ((to, answer),) = cast.tell(messages.Register(name, 0))[0]
    assert (to, answer) == (name, messages.Fenced(name, 0, 1))
    cast.tell(messages.Register(name, 2))
    cast.tick()
    assert cast.state.boots[name] == 2


def silent_for(cast, seconds, *alive):
    done = []
    for _ in range(int(seconds / 0.25)):
        cast.now += 0.25
        cast.tell(*(cast.beat(name) for name in alive))
        done += cast.tell(messages.Tick())[1]
    return done


def test_silent_workers_are_dropped_together():
    cast = stages.Cast(stages.settings(workers=3)).join()
    term = cast.state.term
    done = silent_for(cast, 6.0, "worker/1", "server/0/a")
    assert set(cast.state.workers) == {member.worker for member in cast.state.membership.members} == {1}
    assert cast.state.term == term + 1
    assert len(stages.named(done, "Warn")) == 2
    assert not stages.named(done, "Replace")  # one that was only paused comes back by itself


def test_a_worker_that_is_busy_without_progress_is_dropped_and_started_again():
    cast = stages.Cast(stages.settings(workers=3)).join()
    done = []
    for turn in range(4 * 62):
        cast.now += 0.25
        stuck, computing = (dataclasses.replace(cast.beat(f"worker/{n}"), busy=True) for n in (0, 1))
        beats = stuck, dataclasses.replace(computing, progress=turn), cast.beat("worker/2"), cast.beat("server/0/a")
        cast.tell(*beats)
        done += cast.tell(messages.Tick())[1]
    assert {member.worker for member in cast.state.membership.members} == {1, 2}
    assert stages.named(done, "Replace") == [effects.Replace("worker/0")]
    assert "Worker 0 makes no progress" in stages.named(done, "Warn")[0].text


def test_starts_that_are_no_members_are_told_so_if_they_are_newer_and_passed_over_if_older():
    cast = stages.Cast(stages.settings(workers=2)).join()
    beat = cast.beat("worker/0")
    for strange in (dataclasses.replace(beat, name="worker/7", boot=3), dataclasses.replace(beat, boot=2)):
        fenced = messages.Fenced(strange.name, strange.boot)
        assert cast.tell(strange) == ([(strange.name, fenced)], [])
    server = cast.beat("server/0/a")
    for passed in (dataclasses.replace(beat, boot=0), dataclasses.replace(server, boot=2)):
        assert cast.tell(passed) == ([], [])
    assert cast.tell(dataclasses.replace(server, name="server/9/a")) == ([], [])
    cast.tell(messages.Died("worker/0", 1))
    fenced = [("worker/0", messages.Fenced("worker/0", 1))]
    assert cast.tell(beat)[0] == cast.tell(messages.Register("worker/0", 1))[0] == fenced


def test_of_two_starts_of_a_worker_within_one_tick_the_newer_joins():
    early = stages.Cast(stages.settings())
    early.tell(messages.Register("worker/0", 1))
    assert not early.state.joining  # it repeats its request once the servers have joined
    cast = stages.Cast(stages.settings()).join()
    cast.tell(messages.Register("worker/7", 5), messages.Register("worker/7", 4), messages.Register("worker/0", 2))
    assert cast.tell(messages.Register("worker/0", 1)) == ([], [])  # a late copy
    assert cast.state.joining == {7: 5, 0: 2}


def test_a_copy_that_does_not_hold_everything_yet_takes_over_nothing():
    cast = stages.Cast(stages.settings(durability="replicated")).join()
    cast.tell(messages.Register("server/0/b", 2))
    place = messages.ShardPlace("server/0/a", 1, "server/0/b", 2, False)
    cast.tell(messages.Synced(0, cast.state.term, "server/0/b", 1))  # of its earlier start
    silent_for(cast, 10.0, "worker/0", "server/0/b")
    cast.tell(messages.Died("server/0/a", 1))
    assert cast.state.membership.shards == (place,)
    assert cast.state.counters["failovers"] == 0


def test_a_shard_enters_a_term_once_by_its_primary():
    cast = stages.Cast(stages.settings(durability="replicated")).join()
    cast.finish(0, cast.ask(0))
    assert cast.tell(cast.entered(0)) == ([], [])  # nothing is said again
    cast.tell(messages.Register("worker/0", 2))
    cast.tick()
    cast.tell(dataclasses.replace(cast.entered(0), name="server/0/b"))
    assert not cast.state.settled()


def test_a_worker_that_registers_again_and_again_is_not_silent():
    """It sends no heartbeats before a Welcome reaches it."""
    cast = stages.Cast(stages.settings(workers=2)).join()
    for _ in range(4 * round(stages.TIMERS.stuck_after + 2)):
        cast.tell(messages.Register("worker/0", 1), cast.beat("worker/1"), cast.beat("server/0/a"))
        cast.tick(0.25)
    assert {number: worker.incarnation for number, worker in cast.state.workers.items()} == {0: 1, 1: 2}
    cast.tell(messages.Register("worker/0", 2))
    cast.tick()
    term = cast.state.term
    silent_for(cast, 3.0, "worker/1", "server/0/a")
    assert cast.tell(messages.Register("worker/0", 1)) == ([], [])  # a late copy says nothing of the newer start
    silent_for(cast, 3.0, "worker/1", "server/0/a")
    assert (set(cast.state.workers), cast.state.term) == ({1}, term + 1)


def test_a_scheduler_that_stood_still_drops_no_one():
    """After a pause it handles a tick before the heartbeats in its inbox."""
    cast = stages.Cast(stages.settings(workers=2, servers=2, durability="replicated")).join()
    term = cast.state.term
    for _ in range(5):
        cast.now += 1000.0
        cast.tell(messages.Tick())
        cast.tell(*(cast.beat(name) for name in [*cast.servers(), "worker/0", "worker/1"]))
    assert set(cast.state.workers) == {0, 1}
    assert cast.state.term == term


def test_a_clock_that_is_set_back_drops_no_one_and_still_counts():
    cast = stages.Cast(stages.settings(workers=2)).join()
    cast.now -= 500.0
    silent_for(cast, 3.0, "worker/0", "worker/1", "server/0/a")
    assert set(cast.state.workers) == {0, 1}
    silent_for(cast, 6.0, "worker/0", "server/0/a")
    assert set(cast.state.workers) == {0}


def test_a_silent_primary_hands_over_and_a_pair_of_silent_copies_does_not():
    cast = stages.Cast(stages.settings(durability="replicated")).join()
    silent_for(cast, 10.0, "worker/0")
    assert cast.state.membership.shards[0].primary == "server/0/a"
    silent_for(cast, 6.0, "worker/0", "server/0/b")
    assert cast.state.membership.shards[0].primary == "server/0/b"
    assert cast.state.counters["failovers"] == 1


def test_a_primary_that_starts_again_before_it_was_missed_becomes_the_backup_of_its_copy():
    cast = stages.Cast(stages.settings(durability="replicated", snapshot_every=2)).join()
    cast.tell(messages.Register("server/0/a", 2))
    place = cast.state.membership.shards[0]
    assert place == messages.ShardPlace("server/0/b", 1, "server/0/a", 2, False)
    assert (cast.state.counters["failovers"], cast.state.counters["rollbacks"]) == (1, 0)


def test_a_lost_shard_returns_all_to_the_saved_cut():
    cast = stages.Cast(stages.settings(durability="snapshot", snapshot_every=2)).join()
    cast.step()
    cast.step()
    cast.save_cut()
    name = cast.state.saved_cut[0]
    cast.step()
    cast.tell(messages.Register("server/0/a", 2))
    restored = cast.state.membership
    assert (restored.restore, restored.restore_term, restored.members) == (name, restored.term, ())
    assert cast.state.step == 2
    assert cast.restarted().state.lease_table.trained() == Trained(2, ())


def test_a_lost_shard_without_a_saved_cut_ends_the_run():
    cast = stages.Cast(stages.settings()).join()
    _, done = cast.tell(messages.Register("server/0/a", 2))
    assert cast.state.stop.reason == "error"
    assert "there is no saved cut" in stages.named(done, "Fail")[0].text


def test_copies_that_differ_end_the_run_and_are_named():
    cast = stages.Cast(stages.settings(durability="replicated")).join()
    assert cast.tell(messages.Diverged("server/0/b", 0, "an earlier boot")) == ([], [])
    _, done = cast.tell(messages.Diverged("server/0/b", 1, "The copies of shard 0 differ after update 4."))
    assert cast.state.stop.reason == "error"
    assert "shard 0 differ after update 4" in stages.named(done, "Fail")[0].text


def test_a_push_that_reached_some_shards_only_is_counted_as_torn_and_its_batch_granted_again():
    cast = stages.Cast(stages.settings(mode="async", workers=2, servers=2)).join()
    lease = cast.ask(0)
    cast.tell(messages.Register("worker/0", 2))
    cast.tick()
    row = messages.Seen(0, 1, 1, lease.step)
    cast.tell(cast.entered(0, seen=(row,)), cast.entered(1))
    assert cast.ask(1) == lease
    cast.tell(messages.Register("worker/0", 3))
    cast.tick()
    cast.tell(cast.entered(0, seen=(row,)), cast.entered(1))
    assert cast.state.counters["torn_pushes"] == 1
    assert cast.ask(0) != lease  # another worker still computes it


def test_a_push_that_reached_all_shards_counts_though_its_worker_died():
    cast = stages.Cast(stages.settings(mode="async", workers=2, servers=2)).join()
    lease = cast.ask(0)
    cast.tell(messages.Register("worker/0", 2))
    cast.tick()
    row = messages.Seen(0, 1, 1, lease.step)
    cast.tell(cast.entered(0, seen=(row,)), cast.entered(1, seen=(row,)))
    assert cast.state.lease_table.is_done(lease.step)
    assert cast.state.counters["torn_pushes"] == 0


def test_a_worker_whose_death_is_told_is_replaced_at_once():
    cast = stages.Cast(stages.settings(workers=2)).join()
    lease = cast.ask(0)
    cast.tell(messages.Died("worker/0", 1))
    assert [member.worker for member in cast.state.membership.members] == [1]
    cast.enter_term()
    assert cast.ask(1) == lease


def test_the_death_of_an_earlier_start_changes_nothing():
    cast = stages.Cast(stages.settings(workers=2)).join()
    cast.tell(messages.Register("worker/0", 7))
    cast.tick()
    before = cast.state.membership
    assert cast.tell(messages.Died("worker/0", 6), messages.Died("worker/9", 3)) == ([], [])
    assert cast.state.membership == before
    early = stages.Cast(stages.settings())
    assert early.tell(messages.Died("server/0/a", 3)) == ([], [])


def test_a_server_whose_death_is_told_is_followed_by_its_backup():
    cast = stages.Cast(stages.settings(durability="replicated")).join()
    cast.tell(messages.Died("server/0/a", 1))
    (place,) = cast.state.membership.shards
    assert (place.primary, place.backup, cast.state.counters["failovers"]) == ("server/0/b", "", 1)
    cast.tell(messages.Died("server/0/b", 1))  # the only copy now: it starts again, and then the run rolls back or ends
    assert cast.state.membership.shards == (place,)


def test_a_backup_whose_death_is_told_is_no_longer_waited_for():
    cast = stages.Cast(stages.settings(durability="replicated")).join()
    cast.tell(messages.Died("server/0/b", 1))
    (place,) = cast.state.membership.shards
    assert (place.primary, place.backup) == ("server/0/a", "")


def test_a_restarted_worker_is_not_taken_for_its_predecessor_by_a_restarted_scheduler():
    """Both count their leases from 1, so the table of applied pushes would take the new ones for copies of the old."""
    cast = stages.Cast(stages.settings(workers=2, mode="async")).join()
    cast.tell(messages.Register("worker/0", 2), messages.Died("worker/1", 1))  # a term before the tick
    again = cast.restarted()
    again.tell(messages.Register("worker/0", 2))
    again.tick()
    assert again.state.workers[0].incarnation == 3


def test_a_worker_that_leaves_is_answered_and_its_lease_goes_on():
    cast = stages.Cast(stages.settings(workers=2)).join()
    lease, term = cast.ask(0), cast.state.term
    sent, _ = cast.tell(messages.Leave("worker/0", 1))
    assert ("worker/0", messages.Fenced("worker/0", 1)) in sent
    assert (cast.state.term, set(cast.state.workers)) == (term + 1, {1})
    sent, _ = cast.tell(messages.Leave("worker/0", 1))  # the answer was lost
    assert sent == [("worker/0", messages.Fenced("worker/0", 1))]
    cast.enter_term()
    assert cast.ask(1) == lease
    assert (cast.state.counters["left"], cast.state.counters["fenced"]) == (1, 0)


def test_a_worker_that_left_and_does_not_end_is_ended_by_its_crew():
    cast = stages.Cast(stages.settings(workers=2)).join()
    cast.tell(messages.Leave("worker/0", 1))
    done = silent_for(cast, 40.0, "server/0/a", "worker/1")
    assert stages.named(done, "Replace") == [effects.Replace("worker/0")]


def test_a_worker_that_leaves_before_it_is_a_member_never_becomes_one():
    cast = stages.Cast(stages.settings(workers=1)).join()
    cast.tell(messages.Register("worker/7", 5), messages.Leave("worker/7", 5))
    cast.tick()
    assert set(cast.state.workers) == {0}
    cast.tell(messages.Register("worker/0", 9))
    cast.tick()
    # A late one of the process before, which no longer hears it; or one whose clock is behind: it was never a member.
    assert cast.tell(messages.Leave("worker/0", 1)) == ([("worker/0", messages.Fenced("worker/0", 1))], [])
    assert set(cast.state.workers) == {0}


@pytest.mark.parametrize(("died", "joins"), [(4, True), (5, False), (6, False)])
def test_a_worker_that_dies_before_it_is_a_member_never_becomes_one(died, joins):
    cast = stages.Cast(stages.settings(workers=1)).join()
    cast.tell(messages.Register("worker/7", 5), messages.Died("worker/7", died))
    cast.tick()
    assert (7 in cast.state.workers) == joins


@pytest.mark.parametrize("servers", [0, 1])
@pytest.mark.parametrize("name", ["worker/0", "worker/7"])
@pytest.mark.parametrize("boot", [0, 1, 2])
def test_a_worker_that_is_told_to_leave_before_it_has_joined_is_answered(servers, name, boot):
    """Also before the first membership, and whatever its clock says; it changes nothing."""
    cast = stages.Cast(stages.settings(workers=1))
    if servers:
        cast.join()
    before = cast.state.membership, set(cast.state.workers)
    if (servers, name, boot >= 1) == (1, "worker/0", True):
        return  # this one is a member
    assert cast.tell(messages.Leave(name, boot)) == ([(name, messages.Fenced(name, boot))], [])
    cast.tick()
    assert (cast.state.membership, set(cast.state.workers)) == before


@pytest.mark.parametrize(("boot", "stays"), [(0, True), (1, False), (2, False)])
def test_a_death_counts_unless_a_later_start_is_a_member(boot, stays):
    cast = stages.Cast(stages.settings(workers=2)).join()
    cast.tell(messages.Died("worker/0", boot))
    assert (0 in cast.state.workers) == stays


@given(st.data())
def test_joins_and_leaves_do_not_change_the_slices_of_a_step(data):
    """Sync mode: each step is committed from the same slices, with one worker or with many."""
    chosen = stages.settings(workers=3, max_steps=4)
    cast = stages.Cast(chosen).join()
    boots, there = dict.fromkeys(range(3), 1), {0, 1, 2}
    for _ in range(200):
        if cast.state.step == chosen.max_steps:
            break
        action = data.draw(st.sampled_from(("join", "leave", "work", "work", "work")))
        number = data.draw(st.integers(0, 5))
        if action == "join" and number not in there:
            there.add(number)
            boots[number] = boots.get(number, 0) + 1
            cast.tell(messages.Register(f"worker/{number}", boots[number]))
            cast.tick()
        elif action == "leave" and number in there and len(there) > 1:
            there.remove(number)
            cast.tell(messages.Leave(f"worker/{number}", boots[number]))
        elif action == "work" and number in there:
            worker = cast.state.workers[number]
            lease = worker.lease or cast.ask(number, worker.sequence)
            if lease is not None:
                cast.finish(number, lease, sequence=worker.sequence)
        cast.enter_term()
        cast.applied(cast.state.step)
    commits = [record for record in cast.log if type(record).__name__ == "CommitRecord"]
    for record in commits:
        leases = [push.lease for push in record.contributors]
        assert leases == [lease_table.lease(chosen, record.step - 1, part) for part in range(3)]
    assert [record.step for record in commits] == list(range(1, len(commits) + 1))
