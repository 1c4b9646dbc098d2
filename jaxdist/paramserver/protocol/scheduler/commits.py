"""The scheduler's commits: a step is made once its slices are staged on all shards, and told until all have it."""

from jaxdist.paramserver.protocol import effects, journal, messages
from jaxdist.paramserver.protocol.effects import Output
from jaxdist.paramserver.protocol.scheduler.lease_table import BatchLedger, StepLedger
from jaxdist.paramserver.protocol.scheduler.scheduler_state import SchedulerState


def decide(state: SchedulerState, out: Output) -> None:
    """Commit the step once every slice is staged everywhere and the step before is done with."""
    assert isinstance(state.ledger, StepLedger)
    contributors = state.ledger.contributors()
    if contributors is None or state.last_commit is not None or state.halted:
        return
    record = journal.CommitRecord(state.step + 1, not state.ledger.finite(), contributors)
    out.do(effects.Append(record))
    examples = sum(c.lease.stop - c.lease.start for c in contributors)
    out.do(effects.Committed(record.step, examples, state.ledger.metrics()))
    state.ledger.advance()
    state.last_commit = record
    state.note_nonfinite(not record.skip)
    state.norms, state.norm_squared, state.committed = {}, None, set()
    if state.settled():
        repeat(state, out)


def repeat(state: SchedulerState, out: Output) -> None:
    """Tell the shards that do not have the last commit yet."""
    record = state.last_commit
    if record is None or state.view is None:
        return
    for number, place in enumerate(state.view.shards):
        if number in state.committed:
            continue
        # A shard that has not summed yet ignores Finish, one that has ignores a second Commit's sum.
        commit = messages.Commit(state.epoch, number, record.step, record.skip, record.contributors)
        out.send(place.primary, commit)
        if state.norm_squared is not None:
            out.send(place.primary, messages.Finish(state.epoch, number, record.step, state.norm_squared))


def on_norms(state: SchedulerState, norms: messages.Norms, now: float, out: Output) -> None:
    """Add up the shards' shares of the gradient's global norm, and tell them the sum."""
    if state.last_commit is None or norms.step != state.last_commit.step or state.norm_squared is not None:
        return
    state.norms[norms.shard] = norms.squares
    if len(state.norms) == state.settings.servers:
        # Written down, because a shard that finished cannot tell its share a second time.
        state.norm_squared = sum(sum(state.norms[number]) for number in sorted(state.norms))
        out.do(effects.Append(journal.NormRecord(state.norm_squared)))
        if state.settled():
            repeat(state, out)


def on_commit_ack(state: SchedulerState, ack: messages.CommitAck, now: float, out: Output) -> bool:
    """Take note that a shard has the step; return whether all have it, so that the next may begin."""
    if state.last_commit is None or ack.step < state.last_commit.step:
        return False
    state.committed.add(ack.shard)
    if len(state.committed) < state.settings.servers:
        return False
    state.last_commit = None
    decide(state, out)
    return True


def complete(
    state: SchedulerState, push: messages.Contributor, metrics: tuple[messages.Metric, ...], out: Output
) -> None:
    """Note that every shard applied this push by itself (bounded and async)."""
    assert isinstance(state.ledger, BatchLedger)
    if state.ledger.complete(push.lease.step):
        out.do(effects.Append(journal.CompleteRecord(push)))
        out.do(effects.Committed(state.step, push.lease.stop - push.lease.start, metrics))
