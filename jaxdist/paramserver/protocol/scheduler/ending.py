"""The ending stage: the end is logged, sent until every process has acknowledged it, and then the scheduler exits."""

from collections.abc import Iterable

from jaxdist.paramserver.protocol import effects, journal, messages
from jaxdist.paramserver.protocol.effects import Output
from jaxdist.paramserver.protocol.scheduler.scheduler_state import SchedulerState

LINGER = 4
"""How many times `dead_after` the scheduler waits for the others to acknowledge the end."""


def end(state: SchedulerState, reason: str, now: float, out: Output) -> None:
    """End the run."""
    state.stop = journal.StopRecord(state.step, reason)
    out.do(effects.Append(state.stop))
    state.awaiting_stop = set(state.all_names())
    state.stopped_at = now
    _send_stop(state, state.awaiting_stop, out)


def fail(state: SchedulerState, text: str, now: float, out: Output) -> None:
    """End the run by an error, which `text` explains."""
    out.do(effects.Fail(text))
    end(state, "error", now, out)


def _send_stop(state: SchedulerState, names: Iterable[str], out: Output) -> None:
    assert state.stop is not None
    for name in sorted(names):  # sorted, so that a simulation replays in another process
        out.send(name, messages.StopRun(state.stop.step, state.stop.reason))


def answer(
    state: SchedulerState, message: messages.Register | messages.Heartbeat | messages.Leave, now: float, out: Output
) -> None:
    """Answer that the run is over."""
    _send_stop(state, (message.name,), out)


def on_stop_ack(state: SchedulerState, ack: messages.StopAck, now: float, out: Output) -> None:
    """Note that a process stops."""
    state.awaiting_stop.discard(ack.name)


def on_tick(state: SchedulerState, retry: bool, now: float, out: Output) -> None:
    """Repeat the end until every process has acknowledged it, or the time for that has passed."""
    assert state.stop is not None
    if state.exited:
        return
    if not state.awaiting_stop or now - state.stopped_at > LINGER * state.settings.timers.dead_after:
        state.exited = True
        out.do(effects.Exit(state.stop.step, state.stop.reason))
    elif retry:
        _send_stop(state, state.awaiting_stop, out)
