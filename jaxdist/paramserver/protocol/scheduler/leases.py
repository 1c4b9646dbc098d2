"""The leases stage: which worker computes what. No lease is granted before all shards have entered the term."""

import functools
from collections.abc import Sequence

from jaxdist.paramserver.protocol import messages, succession, sums
from jaxdist.paramserver.protocol.effects import Output
from jaxdist.paramserver.protocol.scheduler import commits, cuts, membership
from jaxdist.paramserver.protocol.scheduler.lease_table import BatchLeases, StepLeases, contributor
from jaxdist.paramserver.protocol.scheduler.scheduler_state import SchedulerState, WorkerStatus
from jaxdist.paramserver.protocol.settings import worker_name

OVERDUE = 2.0


def dispatch(state: SchedulerState, now: float, out: Output) -> None:
    """Begin the cut or the end that is due, or else grant leases to idle workers."""
    if state.unreported or not state.settled():
        return
    if cuts.is_due(state):
        cuts.take(state, now, out)
        return
    if not state.lease_table.is_idle():
        _grant_to_idle(state, now, out)
    if state.gated():
        _bench(state, now, out)


def _grant_to_idle(state: SchedulerState, now: float, out: Output) -> None:
    """Grant leases to idle workers, the fastest first, until there are no more of either."""
    free = [(state.workers[number].seconds, number) for number in state.idle if not state.workers[number].benched]
    for _, number in sorted(free):
        lease = state.lease_table.pick(number, functools.partial(_may_copy, state, now, number))
        if lease is None:
            continue
        worker = state.workers[number]
        state.idle.discard(number)
        worker.lease, worker.granted_at = lease, now
        worker.sequence += 1
        _grant(state, number, worker, out)


def _may_copy(state: SchedulerState, now: float, number: int, holders: Sequence[int]) -> bool:
    """Return whether an idle worker should compute a slice that others hold.

    A worker that has finished a lease of this step first waits as long again as that lease took. Otherwise it would
    still compute a copy that is not needed when the next step begins.
    """
    worker = state.workers[number]
    if worker.step < state.step:
        return True
    since = [state.workers[holder].granted_at for holder in holders if holder in state.workers]
    return now - min(since, default=now) > OVERDUE * worker.seconds


def _grant(state: SchedulerState, number: int, worker: WorkerStatus, out: Output) -> None:
    assert worker.lease is not None
    several = len(state.workers) < state.settings.num_slices  # some workers compute more than one slice of a step
    lease = worker.sequence, worker.clock, worker.lease
    grant = messages.Grant(number, worker.incarnation, state.term, *lease, several, state.made_of)
    out.send(worker_name(number), grant)


def _bench(state: SchedulerState, now: float, out: Output) -> None:
    """Bench workers without work, so that no reader waits for their clocks; with work, set them to the front."""
    assert isinstance(state.lease_table, BatchLeases)
    assert state.membership is not None
    work = state.lease_table.next_step() is not None
    wrong = {number: state.workers[number] for number in sorted(state.idle) if state.workers[number].benched == work}
    if not wrong:
        return
    front = _front(state)
    members = {}
    for number, worker in wrong.items():
        worker.benched, worker.clock = not work, front
        floor = messages.BENCHED if worker.benched else front
        members[number] = messages.Member(number, worker.incarnation, floor)
    membership.change(state, now, out, members=succession.with_members(state.membership.members, members))


def _front(state: SchedulerState) -> int:
    """Return the highest clock that any reader ever had: a worker that joins there owes no update."""
    clocks = [worker.clock for worker in state.workers.values()]
    return max([*clocks, *(ack.front for ack in state.acks.values())])


def revoke(state: SchedulerState, out: Output) -> None:
    """Ask workers to return leases that wait for a clock that no longer advances."""
    for number, worker in state.workers.items():
        if worker.lease is not None and isinstance(state.lease_table, BatchLeases):
            out.send(worker_name(number), messages.Revoke(number, worker.incarnation, worker.sequence))


def on_ask(state: SchedulerState, ask: messages.Ask, now: float, out: Output) -> bool:
    """Note that a worker is free; return whether it may be granted something new."""
    worker = state.worker(ask.worker, ask.incarnation)
    if worker is None or ask.sequence < worker.finished:
        return False
    if worker.lease is not None and ask.sequence < worker.sequence:
        _grant(state, ask.worker, worker, out)  # the first grant was lost
        return False
    if worker.lease is not None:
        state.lease_table.give_back(ask.worker, worker.lease)
        if isinstance(state.lease_table, StepLeases):
            state.lease_table.leave(ask.worker)
        worker.seconds = max(worker.seconds, now - worker.granted_at)  # the step was committed without it
        worker.lease = None
    worker.finished = worker.sequence = max(ask.sequence, worker.sequence)
    state.idle.add(ask.worker)
    return True


def on_done(state: SchedulerState, done: messages.Done, now: float, out: Output) -> bool:
    """Note a computed push, whose worker is free once every shard has it; return whether that is new."""
    worker = state.worker(done.worker, done.incarnation)
    if worker is None:
        return False
    if done.staged:
        out.send(worker_name(done.worker), messages.DoneAck(done.worker, done.incarnation, done.sequence))
    if done.sequence <= worker.finished:
        return False
    if done.staged:
        _finish(state, worker, done, now, out)
        return True
    assert isinstance(state.lease_table, StepLeases)
    return state.lease_table.note_computed(done) and _finish_staged(state, now, out)


def on_staged(state: SchedulerState, note: messages.Staged, now: float, out: Output) -> bool:
    """Note which pushes a shard has for a step; return whether the step is finished with that."""
    state.staged[note.shard] = note
    return _finish_staged(state, now, out)


def _finish_staged(state: SchedulerState, now: float, out: Output) -> bool:
    """Finish the step if each slice is computed, and every shard has just these pushes; return whether it is."""
    table, shards = state.lease_table, state.staged.values()
    assert isinstance(table, StepLeases)
    if sum(note.step == table.step for note in shards) < state.settings.servers:
        return False
    by_slice = table.done | table.computed
    wanted = sums.fingerprint(by_slice[slice_] for slice_ in sorted(by_slice))
    if any(note.fingerprint != wanted for note in shards):
        return False
    for done in list(table.computed.values()):
        worker = state.worker(done.worker, done.incarnation)
        assert worker is not None  # a worker that left gave its lease back
        _free(state, worker, done, now)
        table.finish(done)
    commits.decide(state, out)
    return True


def _finish(state: SchedulerState, worker: WorkerStatus, done: messages.Done, now: float, out: Output) -> None:
    """Note that the push of a worker is on every shard."""
    _free(state, worker, done, now)
    if isinstance(state.lease_table, StepLeases):
        state.lease_table.finish(done)
        commits.decide(state, out)
    else:
        commits.complete(state, contributor(done), done, out)
        state.note_nonfinite(done.finite or done.count <= 0)


def _free(state: SchedulerState, worker: WorkerStatus, done: messages.Done, now: float) -> None:
    """Free a worker whose push is on every shard."""
    worker.seconds, worker.step = now - worker.granted_at, done.lease.step
    worker.finished = done.sequence
    if done.sequence >= worker.sequence:  # else a late copy, from before the lease that the worker holds now
        worker.sequence, worker.lease = done.sequence, None
        state.idle.add(done.worker)
    worker.clock = max(worker.clock, done.clock + 1)
