"""The scheduler: hands out leases, decides commits, keeps the membership, ends the run; a state machine without I/O.

It writes down what it decides before anybody hears of it (effects.Append), and forgets the rest at will: leases, clocks
and staged pushes are asked of the workers and the shards again after a restart. What it knows is one object
(`scheduler_state`); what it does with a message is said by a module for each stage: `views`, `leases`, `commits`,
`cuts` and `ending`.
"""

from collections.abc import Callable, Iterable

from jaxdist.paramserver.protocol import effects, journal, messages
from jaxdist.paramserver.protocol.scheduler import commits, cuts, ending, leases, membership
from jaxdist.paramserver.protocol.scheduler.scheduler_state import SchedulerState
from jaxdist.paramserver.protocol.settings import Settings


class Scheduler:
    """Decides. `records` is the log of an earlier life, `resume` the manifest of an earlier run."""

    def __init__(
        self,
        *,
        settings: Settings,
        records: Iterable[messages.Message] = (),
        resume: journal.Manifest | None = None,
    ) -> None:
        self.state = SchedulerState(settings, resume)
        self._retry_at = 0.0
        self._restarted = False
        for record in records:
            self.state.replay(record)
            self._restarted = True

    @property
    def counters(self) -> dict[str, int]:
        """What run.json tells."""
        return self.state.counters

    def handle(self, message: messages.Message, now: float) -> tuple[list[effects.Send], list[effects.Effect]]:
        """Take in one message; return what to send after the effects are done."""
        out = effects.Output()
        state = self.state
        if self._restarted:
            self._restarted = False
            membership.recover(state, now, out)
        if isinstance(message, messages.Tick):
            self._tick(now, out)
        elif state.stop is not None:
            if (last := _STOPPED.get(type(message))) is not None:
                last(state, message, now, out)
        elif (action := _ACTIONS.get(type(message))) is not None:
            action(state, message, now, out)
        elif (freeing := _FREEING.get(type(message))) is not None and freeing(state, message, now, out) is not False:
            leases.dispatch(state, now, out)
        return out.replies, out.effects

    def _tick(self, now: float, out: effects.Output) -> None:
        state = self.state
        due = now >= self._retry_at
        if state.stop is not None:
            ending.on_tick(state, due, now, out)
        elif state.view is not None:
            membership.bury(state, now, out)
        if not due or state.view is None:
            return
        self._retry_at = now + state.settings.timers.retry
        if state.stop is None:
            self._repeat(now, out)

    def _repeat(self, now: float, out: effects.Output) -> None:
        """Say again what has not been answered."""
        state = self.state
        assert state.view is not None
        for number, place in enumerate(state.view.shards):
            if number not in state.acks:
                out.send(place.primary, state.view)
        if state.settled():
            commits.repeat(state, out)
            cuts.repeat(state, out)
            leases.dispatch(state, now, out)
            if cuts.is_due(state):
                leases.revoke(state, out)


_ACTIONS: dict[type, Callable[..., None]] = {
    messages.Register: membership.on_register,
    messages.Synced: membership.on_synced,
    messages.Norms: commits.on_norms,
    messages.ReadAnswer: cuts.on_read_answer,
}
_FREEING: dict[type, Callable[..., bool | None]] = {
    messages.Heartbeat: membership.on_heartbeat,
    messages.ViewAck: membership.on_view_ack,
    messages.Ask: leases.on_ask,
    messages.Done: leases.on_done,
    messages.CommitAck: commits.on_commit_ack,
    messages.SnapshotDone: cuts.on_snapshot_done,
    messages.Written: cuts.on_written,
    messages.Verdict: cuts.on_verdict,
    messages.Halt: cuts.on_halt,
}
"""Messages after which there may be something to hand out, unless the action returns False."""
_STOPPED: dict[type, Callable[..., None]] = {
    messages.Register: ending.answer,
    messages.Heartbeat: ending.answer,
    messages.StopAck: ending.on_stop_ack,
}
