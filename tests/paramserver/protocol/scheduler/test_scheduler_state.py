"""The scheduler's state: what a restart learns from the log, and what the processes must report again."""

import dataclasses

import pytest
import stages

from jaxdist.paramserver.protocol import journal, messages
from jaxdist.paramserver.protocol.scheduler import lease_table


def test_a_restarted_scheduler_repeats_its_commit_and_waits_for_reports():
    cast = stages.Cast(stages.settings(workers=2)).join()
    leases = [cast.ask(0), cast.ask(1)]
    for number in (0, 1):
        cast.finish(number, leases[number])
    back = cast.restarted()
    assert back.state.step == 1
    assert back.state.last_commit == cast.state.last_commit
    back.tick()
    assert back.state.unreported == {0, 1}
    sent, _ = back.enter_term()
    assert [commit.step for commit in stages.named(sent, "Commit")] == [1]
    back.applied(1)
    assert back.ask(0, 1) is None
    beats = [messages.Heartbeat(f"worker/{n}", 1, back.state.term, 0, False, 1) for n in (0, 1)]
    back.tell(*beats)
    assert back.ask(0, 1) is not None


def test_a_worker_reports_the_lease_it_holds():
    cast = stages.Cast(stages.settings(workers=2)).join()
    lease = cast.ask(0)
    back = cast.restarted()
    back.tick()
    back.enter_term()
    back.tell(messages.Heartbeat("worker/0", 1, back.state.term, 0, True, 1, 0, lease))
    back.tell(messages.Heartbeat("worker/1", 1, back.state.term, 0, False))
    assert back.ask(1).slice != lease.slice


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_a_late_report_on_an_earlier_lease_does_not_free_a_worker_that_holds_one(mode):
    """The worker would be granted another one, and the lease that it still computes would go to a second worker."""
    cast = stages.Cast(stages.settings(workers=3, mode=mode)).join()
    first = cast.ask(0)
    back = cast.restarted()
    back.tell(messages.Tick())
    back.enter_term()
    held = lease_table.lease(cast.settings, 0, 1) if mode == "sync" else lease_table.lease(cast.settings, 1)
    back.finish(0, first, sequence=1)
    back.tell(dataclasses.replace(back.beat("worker/0"), sequence=2, clock=1, lease=held))
    sent, _ = back.tell(back.beat("worker/1"), back.beat("worker/2"))
    assert stages.named(sent, "Grant") == []
    assert back.state.workers[0].lease == held
    assert back.ask(1) not in (first, held)


def test_the_end_is_remembered():
    cast = stages.Cast(stages.settings(max_steps=1)).join()
    cast.step()
    cast.answer_cut()
    assert cast.restarted().state.stop == journal.StopRecord(1, "max_steps")


def test_a_norm_is_remembered_with_its_commit():
    cast = stages.Cast(stages.settings()).join()
    cast.finish(0, cast.ask(0))
    cast.tell(messages.Norms(cast.state.term, 0, 1, (2.0,)))
    back = cast.restarted()
    back.tick()
    sent, _ = back.enter_term()
    assert [finish.norm_squared for finish in stages.named(sent, "Finish")] == [2.0]
