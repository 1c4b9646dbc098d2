"""The scheduler: grants leases, commits steps, keeps the membership, ends the run; a state machine without I/O.

It logs each decision before it sends it to any process (effects.Append). The rest need not be durable: after a restart,
workers and shards report their leases, clocks and staged pushes. Its state is one object (`scheduler_state`), and each
stage is one module: `membership`, `leases`, `commits`, `cuts`, `ending`.
"""

from collections.abc import Callable, Iterable

from jaxdist.paramserver.protocol import effects, journal, messages
from jaxdist.paramserver.protocol.scheduler import commits, cuts, ending, leases, membership
from jaxdist.paramserver.protocol.scheduler.scheduler_state import SchedulerState
from jaxdist.paramserver.protocol.settings import Settings


class AwakeClock:
    """Counts the time in which this process could receive messages: at most `longest` between two messages.

    A scheduler that was paused (a slow disk, a suspended machine) handles its next tick before the heartbeats that
    arrived meanwhile. By the wall clock, every process would seem silent then, and would be dropped.
    """

    def __init__(self, longest: float) -> None:
        self._longest, self._read_at = longest, 0.0
        self._now: float | None = None

    def advance(self, now: float) -> float:
        """Return the time of this clock at `now`; if `now` is set back, the time does not change."""
        passed = min(max(now - self._read_at, 0.0), self._longest)
        self._now = now if self._now is None else self._now + passed
        self._read_at = now
        return self._now


class Scheduler:
    """The scheduler. `records` is its log from before a restart, `resume` the saved cut that a run resumes from."""

    def __init__(
        self,
        *,
        settings: Settings,
        records: Iterable[messages.Message] = (),
        resume: journal.SavedCut | None = None,
    ) -> None:
        self.state = SchedulerState(settings, resume)
        self._clock = AwakeClock(settings.timers.heartbeat)
        self._retry_at = 0.0
        self._restarted = False
        for record in records:
            self.state.replay(record)
            self._restarted = True

    @property
    def counters(self) -> dict[str, int]:
        """The counters that run.json reports."""
        return self.state.counters

    def handle(self, message: messages.Message, now: float) -> tuple[list[effects.Send], list[effects.Effect]]:
        """Handle one message; return what to send after the effects are done."""
        out = effects.Output()
        state = self.state
        now = self._clock.advance(now)
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
        # Workers wait for their leases; a shard has made the step, and needs the commit when they have pushed again.
        out.replies.sort(key=lambda reply: isinstance(reply.message, messages.Commit))
        return out.replies, out.effects

    def _tick(self, now: float, out: effects.Output) -> None:
        state = self.state
        due = now >= self._retry_at
        if state.stop is not None:
            ending.on_tick(state, due, now, out)
        elif state.membership is not None:
            membership.drop_silent(state, now, out)
            membership.admit(state, now, out)
        else:
            membership.note_missing(state, now, out)
        if not due or state.membership is None:
            return
        self._retry_at = now + state.settings.timers.retry
        if state.stop is None:
            self._repeat(now, out)

    def _repeat(self, now: float, out: effects.Output) -> None:
        """Repeat the requests that have not been answered."""
        state = self.state
        assert state.membership is not None
        for number, place in enumerate(state.membership.shards):
            if number not in state.acks:
                out.send(place.primary, state.membership)
        if state.settled():
            commits.repeat(state, out)
            cuts.repeat(state, out)
            leases.dispatch(state, now, out)
            if cuts.is_due(state):
                leases.revoke(state, out)


_ACTIONS: dict[type, Callable[..., None]] = {
    messages.Register: membership.on_register,
    messages.Synced: membership.on_synced,
    messages.Diverged: membership.on_diverged,
    messages.Died: membership.on_died,
    messages.Leave: membership.on_leave,
    messages.Norms: commits.on_norms,
}
_FREEING: dict[type, Callable[..., bool | None]] = {
    messages.Heartbeat: membership.on_heartbeat,
    messages.MembershipAck: membership.on_membership_ack,
    messages.Ask: leases.on_ask,
    messages.Done: leases.on_done,
    messages.Staged: leases.on_staged,
    messages.CommitAck: commits.on_commit_ack,
    messages.CutSaved: cuts.on_cut_saved,
    messages.Written: cuts.on_written,
    messages.Verdict: cuts.on_verdict,
    messages.Halt: cuts.on_halt,
}
"""Messages that may free a lease to grant, unless the action returns False."""
_STOPPED: dict[type, Callable[..., None]] = {
    messages.Register: ending.answer,
    messages.Heartbeat: ending.answer,
    messages.Leave: ending.answer,
    messages.StopAck: ending.on_stop_ack,
}
