"""The scheduler's cuts, taken while no push is under way: snapshots on disk, reads of all shards for the watcher."""

from jaxdist.paramserver.protocol import effects, journal, messages
from jaxdist.paramserver.protocol.effects import Output
from jaxdist.paramserver.protocol.journal import Manifest
from jaxdist.paramserver.protocol.scheduler import ending
from jaxdist.paramserver.protocol.scheduler.lease_table import StepLedger
from jaxdist.paramserver.protocol.scheduler.scheduler_state import SchedulerState
from jaxdist.paramserver.protocol.settings import manifest_file, shard_file


def is_due(state: SchedulerState) -> bool:
    """Return True while no lease may go out: a cut is due, or the end."""
    return _snapshot_due(state) or _read_due(state) or state.ending()


def _snapshot_due(state: SchedulerState) -> bool:
    every = state.settings.snapshot_every
    passed = bool(every) and state.step // every > state.snapshot_at // every
    return passed or (bool(every) and state.ending() and state.snapshot_at < state.step)


def _read_due(state: SchedulerState) -> bool:
    passed = any(state.step // every > state.read_at // every for every in state.settings.read_every)
    return passed or (state.ending() and not state.read_last)


def take(state: SchedulerState, now: float, out: Output) -> None:
    """Begin the cut that is due, or end the run, if no push can be on its way to a shard."""
    quiet = state.last_commit is None if isinstance(state.ledger, StepLedger) else not state.ledger.out
    if not quiet:
        return
    if _snapshot_due(state):
        if not state.snapshotting:
            state.attempts += 1
            state.snapshotting = f"{state.step:010d}-{state.epoch}-{state.attempts}"
            _order_snapshots(state, out)
    elif _read_due(state):
        if not state.reading and not state.judging:
            state.attempts += 1
            state.reading = state.attempts
            _order_reads(state, out)
    else:
        ending.end(state, state.end_reason(), now, out)


def repeat(state: SchedulerState, out: Output) -> None:
    """Ask again the shards that have not answered."""
    _order_snapshots(state, out)
    _order_reads(state, out)


# Snapshots.


def _order_snapshots(state: SchedulerState, out: Output) -> None:
    if not state.snapshotting or state.view is None:
        return
    for number, place in enumerate(state.view.shards):
        if number not in state.snapshot_done:
            out.send(place.primary, messages.Snapshot(state.epoch, number, state.attempts, state.snapshotting))


def on_snapshot_done(state: SchedulerState, done: messages.SnapshotDone, now: float, out: Output) -> None:
    """Take note of a shard's file; with the last one, write the manifest."""
    if not state.snapshotting or done.name != state.snapshotting:
        return
    if done.error:
        _give_up_snapshot(state, f"{shard_file(done.name, done.shard)}: {done.error}", out)
        return
    state.snapshot_done[done.shard] = done
    if len(state.snapshot_done) == state.settings.servers:
        shards = tuple(
            journal.ManifestShard(n, shard_file(done.name, n), state.snapshot_done[n].checksum)
            for n in sorted(state.snapshot_done)
        )
        manifest = Manifest(done.name, state.step, state.incarnations, state.ledger.state(), shards)
        out.do(effects.Write(manifest_file(done.name), manifest))


def on_written(state: SchedulerState, written: messages.Written, now: float, out: Output) -> None:
    """Put the snapshot in force whose manifest is on disk."""
    if not state.snapshotting or written.name != manifest_file(state.snapshotting):
        return
    if written.error:
        _give_up_snapshot(state, f"{written.name}: {written.error}", out)
        return
    state.snapshot = (state.snapshotting, state.ledger.state())
    out.do(effects.Append(journal.SnapshotRecord(*state.snapshot)))
    _close_snapshot(state)


def _give_up_snapshot(state: SchedulerState, why: str, out: Output) -> None:
    """Train on without this snapshot; the next one is tried at its time."""
    out.do(effects.Warn(f"the snapshot of step {state.step} was not written ({why}); the one before stays in force"))
    _close_snapshot(state)


def _close_snapshot(state: SchedulerState) -> None:
    state.snapshotting, state.snapshot_at, state.snapshot_done = "", state.step, {}


# Reads.


def _order_reads(state: SchedulerState, out: Output) -> None:
    if not state.reading or state.view is None:
        return
    for number, place in enumerate(state.view.shards):
        if number not in state.answers:
            out.send(place.primary, messages.Read(state.epoch, number, state.reading))


def on_read_answer(state: SchedulerState, answer: messages.ReadAnswer, now: float, out: Output) -> None:
    """Take in a shard's content; with the last one, hand the cut to the observer."""
    if not state.reading or (answer.epoch, answer.number) != (state.epoch, state.reading):
        return
    state.answers[answer.shard] = answer
    if len(state.answers) < state.settings.servers:
        return
    answers = tuple(state.answers[number] for number in sorted(state.answers))
    out.do(effects.Cut(state.step, state.end_reason(), state.ledger.state(), answers))
    state.reading, state.answers, state.judging = 0, {}, True


def on_verdict(state: SchedulerState, verdict: messages.Verdict, now: float, out: Output) -> None:
    """Go on after a cut, or let it be the last."""
    if not state.judging or verdict.step != state.step:
        return
    out.do(effects.Append(journal.VerdictRecord(verdict.step, verdict.end_reason)))
    state.judging, state.read_at, state.read_last = False, state.step, state.ending()
    if verdict.end_reason and not state.ending():
        # The params that were just looked at are the last ones.
        state.halted, state.read_last = verdict.end_reason, True


def on_halt(state: SchedulerState, halt: messages.Halt, now: float, out: Output) -> None:
    """Make no more steps."""
    state.halted = state.halted or halt.reason
