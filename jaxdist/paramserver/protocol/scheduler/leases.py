"""The scheduler's leases: who computes what next. No lease goes out before all shards work under the current view."""

import functools
from collections.abc import Sequence

from jaxdist.paramserver.protocol import messages, succession
from jaxdist.paramserver.protocol.effects import Output
from jaxdist.paramserver.protocol.messages import Contributor
from jaxdist.paramserver.protocol.scheduler import commits, cuts, membership
from jaxdist.paramserver.protocol.scheduler.lease_table import BatchLedger, StepLedger
from jaxdist.paramserver.protocol.scheduler.scheduler_state import SchedulerState, Worker
from jaxdist.paramserver.protocol.settings import worker_name

OVERDUE = 2.0


def dispatch(state: SchedulerState, now: float, out: Output) -> None:
    """Hand out whatever may be handed out; with something else due, do that instead."""
    if not state.settled() or not all(worker.heard for worker in state.workers.values()):
        return
    if cuts.is_due(state):
        cuts.take(state, now, out)
        return
    idle = [(w.seconds, number) for number, w in state.workers.items() if w.idle and not w.benched]
    for _, number in sorted(idle):
        lease = state.ledger.pick(number, functools.partial(_may_copy, state, now, number))
        if lease is None:
            continue
        worker = state.workers[number]
        worker.idle, worker.lease, worker.granted_at = False, lease, now
        worker.sequence += 1
        _grant(state, number, worker, out)
    if state.gated():
        _bench(state, now, out)


def _may_copy(state: SchedulerState, now: float, number: int, holders: Sequence[int]) -> bool:
    """Return whether an idle worker should compute what others are at.

    One that has had its part in this step waits for them as long again as it took itself: it would be busy with a copy
    nobody needs when the next step begins.
    """
    worker = state.workers[number]
    if worker.step < state.step:
        return True
    since = [state.workers[holder].granted_at for holder in holders if holder in state.workers]
    return now - min(since, default=now) > OVERDUE * worker.seconds


def _grant(state: SchedulerState, number: int, worker: Worker, out: Output) -> None:
    assert worker.lease is not None
    grant = messages.Grant(number, worker.incarnation, state.epoch, worker.sequence, worker.clock, worker.lease)
    out.send(worker_name(number), grant)


def _bench(state: SchedulerState, now: float, out: Output) -> None:
    """Let nobody wait for the clock of a worker without a lease, and let it back in at the front."""
    assert isinstance(state.ledger, BatchLedger)
    assert state.view is not None
    work = state.ledger.next_step() is not None
    wrong = {number: w for number, w in state.workers.items() if w.idle and w.benched == work}
    if not wrong:
        return
    floor = _front(state)
    members = state.view.members
    for number, worker in wrong.items():
        worker.benched = not work
        worker.clock = worker.clock if worker.benched else max(floor, worker.clock)
        bound = messages.BENCHED if worker.benched else worker.clock
        members = succession.with_member(members, messages.Member(number, worker.incarnation, bound))
    membership.change(state, now, out, members=members)


def _front(state: SchedulerState) -> int:
    """Return the clock no reader was ever beyond: whoever joins there owes nobody an update."""
    clocks = [worker.clock for worker in state.workers.values()]
    return max([*clocks, *(ack.front for ack in state.acks.values())], default=0)


def revoke(state: SchedulerState, out: Output) -> None:
    """Ask for the leases of workers that wait for a clock which will not move any more."""
    for number, worker in state.workers.items():
        if worker.lease is not None and isinstance(state.ledger, BatchLedger):
            out.send(worker_name(number), messages.Revoke(number, worker.incarnation, worker.sequence))


def on_ask(state: SchedulerState, ask: messages.Ask, now: float, out: Output) -> bool:
    """Take note that a worker is free; return whether it is to be given something new."""
    worker = state.worker(ask.worker, ask.incarnation)
    if worker is None or not worker.heard or ask.sequence < worker.finished:
        return False
    if worker.lease is not None and ask.sequence < worker.sequence:
        _grant(state, ask.worker, worker, out)  # the answer was lost
        return False
    if worker.lease is not None:
        state.ledger.give_back(ask.worker, worker.lease)
        worker.seconds = max(worker.seconds, now - worker.granted_at)  # the step was made without it
        worker.lease = None
    worker.finished = worker.sequence = max(ask.sequence, worker.sequence)
    worker.idle = True
    return True


def on_done(state: SchedulerState, done: messages.Done, now: float, out: Output) -> bool:
    """Take note that every shard acknowledged a push; return whether that was news."""
    worker = state.worker(done.worker, done.incarnation)
    if worker is None:
        return False
    out.send(worker_name(done.worker), messages.DoneAck(done.worker, done.incarnation, done.sequence))
    if done.sequence <= worker.finished:
        return False
    worker.seconds, worker.step = now - worker.granted_at, done.lease.step
    worker.sequence = max(worker.sequence, done.sequence)
    worker.finished, worker.lease = done.sequence, None
    worker.clock = max(worker.clock, done.clock + 1)
    contributor = Contributor(done.worker, done.incarnation, done.sequence, done.lease)
    if isinstance(state.ledger, StepLedger):
        state.ledger.finish(contributor, done.finite, done.metrics)
        commits.decide(state, out)
    else:
        commits.complete(state, contributor, done.metrics, out)
        state.note_nonfinite(done.finite)
    return True
