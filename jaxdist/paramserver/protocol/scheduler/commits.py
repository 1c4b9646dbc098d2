"""The commits stage: a step is committed once its slices are staged on all shards, and sent until all applied it."""

import math

from jaxdist.paramserver.protocol import effects, journal, messages, sums
from jaxdist.paramserver.protocol.effects import Output
from jaxdist.paramserver.protocol.scheduler import cuts
from jaxdist.paramserver.protocol.scheduler.lease_table import BatchLeases, StepLeases
from jaxdist.paramserver.protocol.scheduler.scheduler_state import SchedulerState


def decide(state: SchedulerState, out: Output) -> None:
    """Commit the step once every slice is staged on every shard and the step before is applied."""
    assert isinstance(state.lease_table, StepLeases)
    if not state.lease_table.is_complete() or state.last_commit is not None or state.halted:
        return
    contributors = state.lease_table.contributors()
    empty = note_empty(state, state.step + 1, state.lease_table.count(), out)
    record = journal.CommitRecord(state.step + 1, empty or not state.lease_table.finite(), contributors)
    out.do(effects.Append(record))
    examples = sum(c.lease.stop - c.lease.start for c in contributors)
    out.do(effects.Committed(record.step, examples, state.lease_table.metrics(), empty))
    state.lease_table.advance()
    state.note_commit(record)
    state.logged_steps += 1
    state.note_nonfinite(empty or not record.skip)
    state.norms, state.norm_squared, state.committed, state.squares = {}, None, set(), {}
    if state.settled():
        _send(state, sums.fingerprint(contributors), out)


def note_empty(state: SchedulerState, step: int, count: float, out: Output) -> bool:
    """Return whether the loss counts no example of a batch, and log it: no strategy makes an update then."""
    if count <= 0:
        # Logged before the step, because a step without an update would be taken for one that is not finite.
        out.do(effects.Append(journal.EmptyRecord(step)))
        if not state.empty_step:
            counted = "Further steps of this kind are counted in train/empty_batches."
            out.do(effects.Warn(f"The loss counted no example in step {step}, so no update was made. {counted}"))
        state.empty_step = step
    return count <= 0


def repeat(state: SchedulerState, out: Output) -> None:
    """Send the last commit to the shards that have not acknowledged it."""
    _send(state, 0, out)


def _send(state: SchedulerState, fingerprint: int, out: Output) -> None:
    """Send the last commit: briefly to shards that told this fingerprint, since there may be many pushes."""
    record = state.last_commit
    if record is None or state.membership is None:
        return
    for number, place in enumerate(state.membership.shards):
        if number in state.committed:
            continue
        note = state.staged.get(number)
        known = fingerprint != 0 and note == messages.Staged(number, record.step - 1, fingerprint)
        pushes = ((), fingerprint) if known else (record.contributors,)
        # A shard that has not summed yet ignores Finish; one that has summed ignores a second Commit.
        out.send(place.primary, messages.Commit(state.term, number, record.step, record.skip, *pushes))
        if state.norm_squared is not None:
            out.send(place.primary, messages.Finish(state.term, number, record.step, state.norm_squared))


def on_norms(state: SchedulerState, norms: messages.Norms, now: float, out: Output) -> None:
    """Add up the shards' parts of the gradient's global norm, and send them the sum."""
    if not _is_of_this_history(state, norms.term) or state.last_commit is None or state.norm_squared is not None:
        return
    if norms.step != state.last_commit.step:
        return
    state.norms[norms.shard] = norms.squares
    if len(state.norms) == state.settings.servers:
        # Logged, because a shard that has applied the step cannot report its part again.
        state.norm_squared = sum(sum(state.norms[number]) for number in sorted(state.norms))
        out.do(effects.Append(journal.NormRecord(state.norm_squared)))
        if state.settled():
            repeat(state, out)


def _is_of_this_history(state: SchedulerState, term: int) -> bool:
    """Return whether a message was sent since the last rollback: a step from before it is another one of its number."""
    return state.membership is not None and term >= state.membership.restore_term


def on_commit_ack(state: SchedulerState, ack: messages.CommitAck, now: float, out: Output) -> bool:
    """Note that a shard applied the step; return whether all have, so that the next may begin."""
    if not _is_of_this_history(state, ack.term) or state.last_commit is None or ack.step < state.last_commit.step:
        return False
    state.committed.add(ack.shard)
    state.squares[ack.shard] = ack.squares if ack.step == state.last_commit.step else -1.0
    if len(state.committed) < state.settings.servers:
        return False
    if min(state.squares.values()) >= 0:
        out.do(effects.GradNorm(state.last_commit.step, math.sqrt(sum(state.squares.values()))))
    state.last_commit = None
    cuts.shorten_log(state, out)
    decide(state, out)
    return True


def complete(state: SchedulerState, push: messages.Contributor, done: messages.Done | None, out: Output) -> None:
    """Note that every shard applied this push by itself (bounded and async); `done` is None if its worker died."""
    assert isinstance(state.lease_table, BatchLeases)
    if state.lease_table.complete(push.lease.step):
        empty = done is not None and note_empty(state, state.step, done.count, out)
        out.do(effects.Append(journal.CompleteRecord(push)))
        state.logged_steps += 1
        metrics = () if done is None else done.metrics
        out.do(effects.Committed(state.step, push.lease.stop - push.lease.start, metrics, empty))
        cuts.shorten_log(state, out)
