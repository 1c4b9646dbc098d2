"""The scheduler's last words: the end is written down, said until everybody has heard it, and then it leaves."""

from collections.abc import Iterable

from jaxdist.paramserver.protocol import effects, journal, messages
from jaxdist.paramserver.protocol.effects import Output
from jaxdist.paramserver.protocol.scheduler.scheduler_state import SchedulerState

LINGER = 4  # how many times `dead_after` the scheduler waits for the others to acknowledge the end


def end(state: SchedulerState, reason: str, now: float, out: Output) -> None:
    """End the run."""
    state.stop = journal.StopRecord(state.step, reason)
    out.do(effects.Append(state.stop))
    state.awaiting_stop = set(state.everybody())
    state.stopped_at = now
    _say(state, state.awaiting_stop, out)


def _say(state: SchedulerState, nodes: Iterable[str], out: Output) -> None:
    assert state.stop is not None
    for node in sorted(nodes):  # whatever the order of a set in this process: a simulation must replay
        out.send(node, messages.Stop(state.stop.step, state.stop.reason))


def answer(state: SchedulerState, message: messages.Register | messages.Heartbeat, now: float, out: Output) -> None:
    """Tell whoever speaks that the run is over."""
    _say(state, (message.node,), out)


def on_stop_ack(state: SchedulerState, ack: messages.StopAck, now: float, out: Output) -> None:
    """Take note that a process stops."""
    state.awaiting_stop.discard(ack.node)


def on_tick(state: SchedulerState, retry: bool, now: float, out: Output) -> None:
    """Say it until everybody has heard it; who has been gone for long is not waited for."""
    assert state.stop is not None
    if state.exited:
        return
    if not state.awaiting_stop or now - state.stopped_at > LINGER * state.settings.timers.dead_after:
        state.exited = True
        out.do(effects.Exit(state.stop.step, state.stop.reason))
    elif retry:
        _say(state, state.awaiting_stop, out)
