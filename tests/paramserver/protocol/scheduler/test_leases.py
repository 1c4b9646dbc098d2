"""The leases stage: who is granted what, what is repeated, and when nothing is granted."""

import dataclasses
import itertools

import pytest
import stages

from jaxdist.paramserver.protocol import messages, sums
from jaxdist.paramserver.protocol.scheduler import lease_table


def test_no_lease_before_every_shard_entered_the_term():
    cast = stages.Cast(stages.settings(servers=2, workers=2)).join()
    cast.tell(messages.Register("worker/1", 2))
    cast.tick()
    assert cast.ask(0) is None
    cast.tell(cast.entered(0))
    assert cast.ask(0) is None
    sent, _ = cast.tell(cast.entered(1))
    assert [grant.worker for grant in stages.named(sent, "Grant")] == [0]


def test_a_lost_grant_is_repeated_and_a_returned_lease_granted_again():
    cast = stages.Cast(stages.settings(workers=2)).join()
    lease = cast.ask(0)
    assert cast.ask(0) == lease
    assert cast.ask(1).slice == 1
    incarnation = cast.state.workers[0].incarnation
    sent, _ = cast.tell(messages.Ask(0, incarnation, 1))  # gave it back
    (grant,) = stages.named(sent, "Grant")
    assert (grant.lease, grant.sequence) == (lease, 2)


def test_a_worker_that_reports_its_push_is_granted_the_next_lease_without_asking():
    """The grants of the next step leave together with the commit of this one."""
    cast = stages.Cast(stages.settings(workers=2)).join()
    leases = [cast.ask(0), cast.ask(1)]
    sent, _ = cast.finish(0, leases[0])
    assert not stages.named(sent, "Grant")  # the step has no other slice
    sent, _ = cast.finish(1, leases[1])
    grants = stages.named(sent, "Grant")
    assert [(grant.worker, grant.sequence, grant.clock, grant.lease.step) for grant in grants] == [
        (0, 2, 1, 1),
        (1, 2, 1, 1),
    ]
    assert len(stages.named(sent, "Commit")) == 1
    assert not stages.named(cast.tell(messages.Ask(0, cast.state.workers[0].incarnation, 2))[0], "DoneAck")


def test_a_late_request_is_granted_nothing():
    cast = stages.Cast(stages.settings(workers=1)).join()
    cast.step()
    incarnation = cast.state.workers[0].incarnation
    assert cast.tell(messages.Ask(0, incarnation, 0)) == ([], [])
    back = cast.restarted()
    back.tick()
    back.enter_term()
    back.applied(1)
    back.tell(dataclasses.replace(back.beat("worker/0"), sequence=5))
    sent, _ = back.tell(messages.Ask(0, incarnation, 3))
    assert [grant.sequence for grant in stages.named(sent, "Grant")] == [6]


def test_a_late_copy_of_a_report_does_not_free_the_lease_that_its_worker_holds_now():
    cast = stages.Cast(stages.settings(workers=1, mode="async")).join()
    first = cast.ask(0)
    cast.finish(0, first)
    held = cast.state.workers[0].lease
    assert held.step == first.step + 1
    again = cast.restarted()
    again.enter_term()
    incarnation = again.state.workers[0].incarnation
    beat = messages.Heartbeat("worker/0", 1, again.state.term, 5, True, 2, 1, held)
    again.tell(beat, messages.Done(0, incarnation, 1, 0, first, 6.0, True, ()))
    assert (again.state.workers[0].lease, again.state.idle) == (held, set())
    again.tell(messages.Done(0, incarnation, 2, 1, held, 6.0, True, ()))
    assert again.state.step == 2


def reported(cast, number, lease):
    return messages.Done(number, cast.state.workers[number].incarnation, 1, 0, lease, 6.0, True, (), staged=False)


def staged(shard, *dones):
    """Return what a shard tells that has the pushes of `dones`."""
    return messages.Staged(shard, dones[0].lease.step, sums.fingerprint(lease_table.contributor(d) for d in dones))


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
def test_a_step_is_committed_once_all_is_computed_and_every_shard_has_it_in_any_order(order):
    cast = stages.Cast(stages.settings(servers=2, workers=2)).join()
    dones = [reported(cast, number, cast.ask(number)) for number in range(2)]
    told = [*dones, staged(0, *dones), staged(1, *dones)]
    for place, number in enumerate(order):
        sent, _ = cast.tell(told[number], told[number])
        assert len(stages.named(sent, "Commit")) == (2 if place == 3 else 0)
        assert not stages.named(sent, "DoneAck")
    assert cast.state.step == 1
    assert [grant.lease.step for grant in stages.named(sent, "Grant")] == [1, 1]
    assert cast.tell(*told) == ([], [])


def test_a_commit_is_brief_at_first_and_repeated_with_its_pushes():
    cast = stages.Cast(stages.settings(workers=2)).join()
    dones = [reported(cast, number, cast.ask(number)) for number in range(2)]
    sent, _ = cast.tell(*dones, staged(0, *dones))
    (brief,) = stages.named(sent, "Commit")
    assert (brief.contributors, brief.fingerprint) == ((), staged(0, *dones).fingerprint)
    again = next(commit for _ in range(4) for commit in stages.named(cast.tick(0.5)[0], "Commit"))
    assert [push.worker for push in again.contributors] == [0, 1]
    assert again.fingerprint == 0


def test_shards_that_have_other_pushes_do_not_decide():
    """A worker died after a part of its push; its slice was computed again, and a shard has told of the first."""
    cast = stages.Cast(stages.settings(servers=2)).join()
    done = reported(cast, 0, cast.ask(0))
    other = dataclasses.replace(done, incarnation=done.incarnation + 1)
    cast.tell(done, staged(0, done), staged(1, other))
    assert cast.state.step == 0
    cast.tell(staged(1, done))
    assert cast.state.step == 1


def test_what_a_worker_computed_does_not_count_once_it_has_left():
    cast = stages.Cast(stages.settings(servers=1, workers=2)).join()
    dones = [reported(cast, number, cast.ask(number)) for number in range(2)]
    cast.tell(dones[0], messages.Died("worker/0", 1), dones[1], staged(0, *dones))
    assert cast.state.step == 0


def test_what_a_worker_gave_back_after_its_report_does_not_count():
    cast = stages.Cast(stages.settings(servers=1, workers=2)).join()
    dones = [reported(cast, number, cast.ask(number)) for number in range(2)]
    cast.tell(dones[0], messages.Ask(0, dones[0].incarnation, 1), dones[1], staged(0, *dones))
    assert cast.state.step == 0


@pytest.mark.parametrize(("count", "reason"), [(0.0, ""), (0.5, "nonfinite"), (2.0, "nonfinite")])
def test_a_push_that_is_not_finite_ends_the_run_unless_it_counts_no_example(count, reason):
    cast = stages.Cast(stages.settings(mode="async", stop_on_nonfinite=True)).join()
    cast.finish(0, cast.ask(0), count=count, finite=False)
    assert cast.state.halted == reason


def test_a_worker_that_heard_all_shards_finishes_its_push_whatever_they_told():
    cast = stages.Cast(stages.settings(servers=2)).join()
    done = reported(cast, 0, cast.ask(0))
    cast.tell(done, staged(0, done))
    sent, _ = cast.tell(dataclasses.replace(done, staged=True))
    assert (len(stages.named(sent, "DoneAck")), cast.state.step) == (1, 1)


@pytest.mark.parametrize(("joined", "report"), [(2, False), (1, True)])
def test_a_worker_with_more_than_one_slice_is_to_report_each(joined, report):
    cast = stages.Cast(stages.settings(workers=2))
    cast.tell(*(messages.Register(name, 1) for name in cast.servers()))
    cast.tell(*(messages.Register(f"worker/{number}", 1) for number in range(joined)))
    cast.tick()
    cast.enter_term()
    sent, _ = cast.tell(messages.Ask(0, cast.state.workers[0].incarnation, 0))
    assert [grant.report for grant in stages.named(sent, "Grant")] == [report]


def test_the_fastest_worker_is_served_first():
    cast = stages.Cast(stages.settings(workers=3, backup_workers=2)).join()
    for number, seconds in ((0, 3.0), (1, 1.0), (2, 2.0)):
        cast.state.workers[number].seconds = seconds
        cast.state.idle.add(number)
    cast.state.workers[0].step = cast.state.workers[1].step = cast.state.workers[2].step = 0
    sent, _ = cast.tell(messages.Halt(""))
    assert [grant.worker for grant in stages.named(sent, "Grant")] == [1]


@pytest.mark.parametrize(("waited", "copies"), [(0.5, False), (1.5, True)])
def test_a_worker_that_had_its_part_waits_as_long_again_before_it_copies(waited, copies):
    cast = stages.Cast(stages.settings(workers=3, backup_workers=1)).join()
    cast.wait(2.0)
    first, _ = cast.ask(0), cast.ask(1)
    cast.wait(1.0)
    cast.finish(0, first)
    cast.wait(waited)
    assert (cast.ask(0, 1) is not None) == copies


def test_a_worker_without_a_part_of_the_step_copies_at_once():
    cast = stages.Cast(stages.settings(workers=3, backup_workers=1)).join()
    leases = [cast.ask(number) for number in range(3)]
    assert [lease.slice for lease in leases] == [0, 1, 0]


def test_leases_are_asked_back_from_those_that_hold_one_when_a_cut_is_due():
    """Its worker may wait for the clock of one that gets no lease before the cut."""
    chosen = stages.settings(workers=2, mode="async", durability="snapshot", snapshot_every=1)
    cast = stages.Cast(chosen).join()
    first, _ = cast.ask(0), cast.ask(1)
    cast.finish(0, first)
    sent = [message for _ in range(8) for message in cast.tick(0.25)[0]]
    assert {(each.worker, each.sequence) for each in stages.named(sent, "Revoke")} == {(1, 1)}


def test_no_lease_of_a_step_is_asked_back():
    cast = stages.Cast(stages.settings(workers=2)).join()
    cast.ask(0)
    cast.tell(messages.Halt("target_reached"))
    assert not [each for _ in range(8) for each in stages.named(cast.tick(0.25)[0], "Revoke")]


def test_a_worker_of_an_earlier_incarnation_gets_nothing():
    cast = stages.Cast(stages.settings()).join()
    assert cast.tell(messages.Ask(0, 99, 0)) == ([], [])
    assert cast.tell(messages.Done(0, 99, 1, 0, messages.Lease(0, 0, 0, 0, 6), 6.0, True, ())) == ([], [])


def test_without_work_a_bounded_worker_is_benched_and_returns_at_the_front():
    chosen = stages.settings(workers=2, mode="bounded", max_staleness=1, max_steps=1)
    cast = stages.Cast(chosen).join()
    cast.ask(0)
    cast.ask(1)
    cast.enter_term()
    cast.ask(0)
    cast.ask(1)
    floors = {member.worker: member.floor for member in cast.state.membership.members}
    assert sum(floor >= messages.BENCHED for floor in floors.values()) == 1
