"""The cuts stage: all shards at one version, saved to disk or offered to the observer, while no push is in flight."""

from jaxdist.paramserver.protocol import effects, journal, messages
from jaxdist.paramserver.protocol.effects import Output
from jaxdist.paramserver.protocol.journal import SavedCut
from jaxdist.paramserver.protocol.scheduler import ending
from jaxdist.paramserver.protocol.scheduler.lease_table import StepLeases
from jaxdist.paramserver.protocol.scheduler.scheduler_state import SchedulerState
from jaxdist.paramserver.protocol.settings import OBSERVER, saved_cut_file, shard_file

MOST_LOGGED_STEPS = 100
"""Steps in the log after which it is shortened although no cut is taken: a restart reads all of it."""


def is_due(state: SchedulerState) -> bool:
    """Return whether a cut or the end of the run is due, so that no lease may be granted."""
    return _save_due(state) or _read_due(state) or state.ending()


def _save_due(state: SchedulerState) -> bool:
    every = state.settings.snapshot_every
    passed = bool(every) and state.step // every > state.saved_at // every
    return passed or (bool(every) and state.ending() and state.saved_at < state.step)


def _read_due(state: SchedulerState) -> bool:
    passed = any(state.step // every > state.read_at // every for every in state.settings.read_every)
    return passed or (state.ending() and not state.read_last)


def take(state: SchedulerState, now: float, out: Output) -> None:
    """Begin the cut that is due, or end the run, once no shard can change."""
    if not _is_quiet(state):
        return
    if _save_due(state):
        if not state.saving:
            state.attempts += 1
            state.saving = f"{state.step:010d}-{state.term}-{state.attempts}"
            _order_saves(state, out)
    elif _read_due(state):
        if not state.offered:
            state.attempts += 1
            state.offered = state.attempts
            _offer(state, out)
    else:
        ending.end(state, state.end_reason(), now, out)


def _is_quiet(state: SchedulerState) -> bool:
    """Return whether every update is on all shards, and none can follow without another lease.

    Workers may hold leases although a cut is due: a scheduler that gave up a cut, granted them and was started again
    does not know that it gave up.
    """
    if isinstance(state.lease_table, StepLeases) and state.halted:
        return state.last_commit is None  # no step is committed any more
    return state.last_commit is None and not state.lease_table.is_under_way()


def repeat(state: SchedulerState, out: Output) -> None:
    """Ask those who have not answered again."""
    _order_saves(state, out)
    _offer(state, out)


# Saved cuts.


def _order_saves(state: SchedulerState, out: Output) -> None:
    if not state.saving or state.membership is None:
        return
    for number, place in enumerate(state.membership.shards):
        if number not in state.saved_shards:
            out.send(place.primary, messages.SaveCut(state.term, number, state.attempts, state.saving))


def on_cut_saved(state: SchedulerState, done: messages.CutSaved, now: float, out: Output) -> None:
    """Note that a shard's file is on disk; after the last one, write the file that names them all."""
    if not state.saving or done.name != state.saving:
        return
    if done.error:
        _give_up_save(state, f"{shard_file(done.name, done.shard)}: {done.error}", out)
        return
    state.saved_shards[done.shard] = done
    if len(state.saved_shards) == state.settings.servers:
        shards = tuple(
            journal.SavedShard(n, shard_file(done.name, n), state.saved_shards[n].checksum)
            for n in sorted(state.saved_shards)
        )
        saved = SavedCut(done.name, state.step, state.incarnations, state.lease_table.trained(), shards)
        out.do(effects.Write(saved_cut_file(done.name), saved))


def on_written(state: SchedulerState, written: messages.Written, now: float, out: Output) -> None:
    """Note that the saved cut is complete: from now on a lost shard returns to it."""
    if not state.saving or written.name != saved_cut_file(state.saving):
        return
    if written.error:
        _give_up_save(state, f"{written.name}: {written.error}", out)
        return
    state.saved_cut = (state.saving, state.lease_table.trained())
    out.do(effects.Append(journal.SavedCutRecord(*state.saved_cut)))
    _close_save(state)
    shorten_log(state, out, longest=0)


def shorten_log(state: SchedulerState, out: Output, *, longest: int = MOST_LOGGED_STEPS) -> None:
    """Replace the log, if it holds `longest` steps, by the state that a restart needs, small between two steps."""
    if state.logged_steps >= longest and not state.ending():  # the end needs its own records, which are few
        state.logged_steps = 0
        out.do(effects.Compact(state.state_record()))


def _give_up_save(state: SchedulerState, why: str, out: Output) -> None:
    """Continue without this saved cut; the next one is tried when it is due."""
    out.do(effects.Warn(f"The cut of step {state.step} was not saved ({why}). The saved cut before it stays in use."))
    _close_save(state)


def _close_save(state: SchedulerState) -> None:
    state.saving, state.saved_at, state.saved_shards = "", state.step, {}


# Reads.


def _offer(state: SchedulerState, out: Output) -> None:
    """Offer the cut to the observer, again and again until its verdict."""
    if not state.offered or state.membership is None:
        return
    primaries = tuple(place.primary for place in state.membership.shards)
    trained = state.lease_table.trained()
    out.send(OBSERVER, messages.Offer(state.term, state.offered, state.step, state.end_reason(), trained, primaries))


def on_verdict(state: SchedulerState, verdict: messages.Verdict, now: float, out: Output) -> None:
    """Continue after a cut, or end the run with it: the observer has its state already."""
    if (verdict.term, verdict.number) != (state.term, state.offered):
        return
    out.do(effects.Append(journal.VerdictRecord(state.step, verdict.end_reason)))
    # A halt that came after the offer is not in the verdict, so the observer gets another offer.
    state.offered, state.read_at, state.read_last = 0, state.step, bool(verdict.end_reason)
    state.halted = state.halted or verdict.end_reason
    shorten_log(state, out, longest=0)


def on_halt(state: SchedulerState, halt: messages.Halt, now: float, out: Output) -> None:
    """Commit no further step."""
    state.halted = state.halted or halt.reason
