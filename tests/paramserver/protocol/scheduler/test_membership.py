"""The membership stage: joining, returning, being dropped, and losing a shard."""

import stages

from jaxdist.paramserver.protocol import messages
from jaxdist.paramserver.protocol.journal import Trained
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
    assert set(cast.state.workers) == {1}
    assert cast.state.term == term + 1
    assert len(stages.named(done, "Warn")) == 2


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
    assert "there is no saved cut" in stages.named(done, "Warn")[0].text


def test_copies_that_differ_end_the_run_and_are_named():
    cast = stages.Cast(stages.settings(durability="replicated")).join()
    assert cast.tell(messages.Diverged("server/0/b", 0, "an earlier boot")) == ([], [])
    _, done = cast.tell(messages.Diverged("server/0/b", 1, "The copies of shard 0 differ after update 4."))
    assert cast.state.stop.reason == "error"
    assert "shard 0 differ after update 4" in stages.named(done, "Warn")[0].text


def test_a_push_that_reached_some_shards_only_is_counted_as_torn_and_its_batch_granted_again():
    cast = stages.Cast(stages.settings(mode="async", workers=2, servers=2)).join()
    lease = cast.ask(0)
    cast.tell(messages.Register("worker/0", 2))
    cast.tick()
    row = messages.Seen(0, 1, 1, lease.step)
    cast.tell(cast.entered(0, seen=(row,)), cast.entered(1))
    assert cast.state.counters["torn_pushes"] == 1
    assert cast.ask(1) == lease


def test_a_push_that_reached_all_shards_counts_though_its_worker_died():
    cast = stages.Cast(stages.settings(mode="async", workers=2, servers=2)).join()
    lease = cast.ask(0)
    cast.tell(messages.Register("worker/0", 2))
    cast.tick()
    row = messages.Seen(0, 1, 1, lease.step)
    cast.tell(cast.entered(0, seen=(row,)), cast.entered(1, seen=(row,)))
    assert cast.state.lease_table.is_done(lease.step)


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
