"""The cuts stage: no lease while one is due, what it leaves on disk, and a log that stays short."""

import dataclasses

import pytest
import stages
from hypothesis import given
from hypothesis import settings as runs
from hypothesis import strategies as st

from jaxdist.paramserver.protocol import messages
from jaxdist.paramserver.protocol.messages import Trained
from jaxdist.paramserver.protocol.scheduler import cuts
from jaxdist.paramserver.protocol.settings import OBSERVER


def saving(**changes):
    return stages.Cast(stages.settings(durability="snapshot", snapshot_every=2, servers=2, **changes)).join()


def test_a_cut_is_saved_when_due_and_then_leases_are_granted_again():
    cast = saving()
    cast.step()
    assert not cast.state.saving
    cast.step()
    assert cast.state.saving.startswith("0000000002-")
    assert cast.ask(0, 2) is None
    sent, _ = cast.save_cut()
    assert stages.named(sent, "Grant")
    assert cast.state.saved_cut[1] == Trained(2, ())


def test_a_cut_that_cannot_be_written_is_named_and_the_one_before_stays():
    cast = saving()
    cast.step()
    cast.step()
    before = cast.state.saved_cut
    _, done = cast.tell(messages.CutSaved(1, cast.state.saving, 0, "No space left on device"))
    assert "No space left on device" in stages.named(done, "Warn")[0].text
    assert cast.state.saved_cut == before
    assert not cast.state.saving


def test_a_cut_that_was_given_up_waits_after_a_restart_for_the_step_that_is_under_way():
    """The log does not say that it was given up. A commit during the cut would make it one of two steps at once."""
    cast = saving(workers=2)
    for number in (0, 1):
        cast.ask(number)
    for _ in range(2):
        for number in (0, 1):
            cast.finish(number, cast.state.workers[number].lease, sequence=cast.state.workers[number].sequence)
        cast.applied(cast.state.step)
    cast.tell(messages.CutSaved(1, cast.state.saving, 0, "No space left on device"))
    leases = [cast.state.workers[number].lease for number in (0, 1)]
    back = cast.restarted()
    back.tick()
    back.enter_term()
    back.applied(2)
    for number, lease in enumerate(leases):
        beat = dataclasses.replace(back.beat(f"worker/{number}"), sequence=3, lease=lease)
        back.tell(beat)
    assert not back.state.saving
    back.finish(0, leases[0], sequence=3)
    assert not back.state.saving
    back.tell(messages.Died("worker/1", 1))
    back.enter_term()
    assert back.state.saving  # the step cannot be finished without another lease
    back.save_cut()
    assert back.state.saved_cut[1] == Trained(2, ())


def test_the_log_is_replaced_at_every_cut_and_says_the_same():
    cast = saving(read_every=(3,), max_steps=30)
    longest = 0
    for _ in range(20):
        cast.step()
        longest = max(longest, len(cast.log))
        if cast.state.saving:
            cast.save_cut()
        if cast.state.offered:
            cast.answer_cut()
        known, back = cast.state, cast.restarted().state
        assert back.membership == known.membership
        assert back.incarnations == known.incarnations
        assert back.lease_table.trained() == known.lease_table.trained()
        assert (back.saved_cut, back.saved_at, back.read_at) == (known.saved_cut, known.saved_at, known.read_at)
    assert longest < 12


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_the_log_of_a_run_without_cuts_stays_short_also_over_a_restart(mode):
    cast = stages.Cast(stages.settings(mode=mode, max_steps=1000)).join()
    for step in range(1, 3 * cuts.MOST_LOGGED_STEPS):
        worker = cast.state.workers[0]
        lease = worker.lease or cast.ask(0, worker.finished)
        cast.finish(0, lease, sequence=cast.state.workers[0].sequence)
        cast.applied(step)
        assert cast.state.step == step
        assert len(cast.log) < cuts.MOST_LOGGED_STEPS + 10  # some records of memberships
        if step == cuts.MOST_LOGGED_STEPS // 2:
            held, cast = cast.state.workers[0], cast.restarted()
            cast.tick()
            cast.enter_term()
            cast.applied(step)
            cast.tell(dataclasses.replace(cast.beat("worker/0"), sequence=held.sequence, lease=held.lease))


def test_batches_done_out_of_order_survive_in_a_compact_log():
    cast = stages.Cast(stages.settings(mode="async", workers=2, read_every=(1,))).join()
    cast.ask(0)
    lease = cast.ask(1)
    cast.finish(1, lease)
    for _ in range(3):
        cast.tick(0.5)
    cast.tell(messages.Ask(0, cast.state.workers[0].incarnation, 1))  # revoked: it gave its lease back
    assert cast.state.offered
    cast.answer_cut()
    assert len(cast.log) == 1
    assert cast.restarted().state.lease_table.trained() == Trained(0, (1,))


def test_a_resumed_run_that_lost_its_scheduler_still_knows_where_it_began():
    """A shard lost before the first cut of the resumed run returns to the cut it was resumed from."""
    from jaxdist.paramserver.protocol.journal import SavedCut

    resume = SavedCut("0000000004-start-1", 4, 3, Trained(4, ()), ())
    cast = stages.Cast(stages.settings(durability="snapshot", snapshot_every=3), resume=resume).join()
    back = cast.restarted()
    assert back.state.saved_cut == ("0000000004-start-1", Trained(4, ()))
    assert back.state.step == 4


def test_the_last_cut_is_shown_before_the_run_ends():
    cast = stages.Cast(stages.settings(max_steps=1)).join()
    cast.step()
    assert cast.state.offered
    assert cast.state.stop is None
    _, done = cast.answer_cut()
    assert cast.state.stop is not None
    assert [type(effect.record).__name__ for effect in stages.named(done, "Append")] == ["VerdictRecord", "StopRecord"]


def offers(sent):
    return [message for to, message in sent if to == OBSERVER]


def offered_later(cast):
    return [offer for _ in range(12) for offer in offers(cast.tick(0.25)[0])]


def test_a_cut_is_offered_until_the_verdict():
    cast = stages.Cast(stages.settings(read_every=(1,), servers=2)).join()
    sent, _ = cast.step()
    (offer,) = offers(sent)
    assert (offer.step, offer.trained, offer.end_reason) == (1, Trained(1, ()), "")
    assert offer.primaries == ("server/0/a", "server/1/a")
    assert cast.ask(0, 1) is None
    assert set(offered_later(cast)) == {offer}
    cast.answer_cut()
    assert not cast.state.offered
    assert not offered_later(cast)


def test_a_restarted_scheduler_offers_the_cut_in_its_own_term():
    """It numbers its offers from 1 again, and shards may have rolled back since."""
    cast = stages.Cast(stages.settings(max_steps=1)).join()
    (before,) = offers(cast.step()[0])
    back = cast.restarted()
    back.tick()
    back.enter_term()
    back.tell(back.beat("worker/0"))
    (after,) = offers(back.applied(1)[0])
    assert (after.number, after.step) == (before.number, before.step)
    assert after.term > before.term


@pytest.mark.parametrize("late", ["an earlier term", "an earlier offer of the term"])
def test_a_late_verdict_on_the_same_step_does_not_let_shards_change(late):
    """The observer reads the cut that is offered now. It was of two steps where a lease was granted meanwhile."""
    cast = stages.Cast(stages.settings(read_every=(1,))).join()
    (first,) = offers(cast.step()[0])
    if late == "an earlier term":
        cast.tell(messages.Register("worker/0", 2))
        cast.tick()
        (second,) = offers(cast.enter_term()[0])
    else:
        cast.tell(messages.Halt("preempted"))
        (second,) = offers(cast.answer_cut("")[0])
    assert (second.step, second.term, second.number) > (first.step, first.term, first.number)
    cast.ask(0)
    sent, done = cast.tell(messages.Verdict(first.term, first.number, ""))
    assert (sent, done) == ([], [])
    assert cast.state.offered == second.number
    assert cast.answer_cut()[1]
    assert not cast.state.offered


def test_a_halt_that_comes_before_a_verdict_gets_an_offer_of_its_own():
    """The observer has not ended the run with the first one: it waits for the last cut."""
    cast = stages.Cast(stages.settings(read_every=(1,))).join()
    (first,) = offers(cast.step()[0])
    cast.tell(messages.Halt("preempted"))
    (second,) = offers(cast.answer_cut("")[0])
    assert (first.end_reason, second.end_reason) == ("", "preempted")
    assert cast.state.stop is None
    cast.answer_cut("preempted")
    assert cast.state.stop.reason == "preempted"


def test_what_a_verdict_decided_survives_the_scheduler():
    cast = stages.Cast(stages.settings(read_every=(1,))).join()
    cast.step()
    cast.tell(messages.Halt("preempted"))
    cast.answer_cut("")
    back = cast.restarted().state
    assert (back.read_at, back.read_last, back.halted) == (1, False, "")


def test_a_verdict_may_end_the_run_at_this_cut():
    cast = stages.Cast(stages.settings(read_every=(1,))).join()
    cast.step()
    cast.answer_cut("patience")
    assert (cast.state.stop.step, cast.state.stop.reason) == (1, "patience")


@runs(max_examples=25, deadline=None)
@given(every=st.integers(1, 4), reads=st.lists(st.integers(1, 4), max_size=2), last=st.integers(1, 9))
def test_cuts_are_taken_at_every_multiple_of_their_periods_and_at_the_end(every, reads, last):
    chosen = {"durability": "snapshot", "snapshot_every": every, "read_every": tuple(reads), "max_steps": last}
    cast, saved, read = stages.Cast(stages.settings(**chosen)).join(), [], []
    for _ in range(40):
        if cast.state.stop is not None:
            break
        if cast.state.saving:
            saved.append(cast.state.step)
            _, done = cast.save_cut()
            assert cast.state.step == last or stages.named(done, "Compact")
        elif cast.state.offered:
            read.append(cast.state.step)
            cast.answer_cut()
        else:
            cast.step()
    assert cast.state.stop is not None
    steps = range(1, last + 1)
    assert saved == [step for step in steps if step % every == 0 or step == last]
    assert read == [step for step in steps if any(step % period == 0 for period in reads) or step == last]


def test_a_cut_is_complete_once_every_shard_has_saved_it_under_its_name():
    cast = stages.Cast(stages.settings(servers=2, durability="snapshot", snapshot_every=1)).join()
    cast.step()
    name = cast.state.saving
    others = (messages.CutSaved(shard, "another", 5, "") for shard in range(2))
    _, done = cast.tell(*others, messages.CutSaved(0, name, 5, ""))
    assert not stages.named(done, "Write")
    asked = [order for _ in range(6) for order in stages.named(cast.tick(0.25)[0], "SaveCut")]
    assert {order.shard for order in asked} == {1}
    _, done = cast.tell(messages.CutSaved(1, name, 6, ""))
    (written,) = stages.named(done, "Write")
    assert [shard.checksum for shard in written.content.shards] == [5, 6]


def test_the_first_reason_to_end_is_the_one():
    cast = stages.Cast(stages.settings()).join()
    cast.tell(messages.Halt("target_reached"), messages.Halt("patience"))
    assert cast.state.end_reason() == "target_reached"
