"""A worker: asks for a lease, pulls, has the gradient computed, pushes, reports; a state machine without I/O.

One request is open at a time (to several shards at once), and any request may be repeated: it carries the sequence
number of its lease, so the receiver recognises a repeated one.
"""

from collections.abc import Callable

from jaxdist.paramserver.protocol import effects, messages
from jaxdist.paramserver.protocol.scheduler import lease_table
from jaxdist.paramserver.protocol.settings import SCHEDULER, Settings, worker_name


class Worker:
    """One worker process. `handle` is the whole interface."""

    def __init__(self, *, worker: int, boot: int, settings: Settings) -> None:
        self.worker, self.boot, self.settings = worker, boot, settings
        self.name = worker_name(worker)
        self.progress = 0
        self.heartbeat_at = 0.0
        self.retiring = False
        self._begin()

    def _begin(self) -> None:
        """Discard all state: this process is not a member yet."""
        self.phase = "joining"
        self.incarnation = 0
        self.membership: messages.Membership | None = None
        self.sequence = 0  # the last lease that was granted
        self.clock = 0
        self.lease: messages.Lease | None = None
        self.asked_at = float("-inf")
        self.pulled: dict[int, messages.Pulled] = {}
        self.pulled_early: dict[int, messages.Pulled] = {}  # for the lease that is not granted yet
        self.early = (0, 0)  # the sequence number and the version that the last push asked for
        self.made_of = 0  # see messages.Grant
        self.prepared: messages.Lease | None = None  # whose examples were asked for last
        self.computed: messages.Computed | None = None
        self.acknowledged: set[int] = set()
        self.reports = True  # whether it says itself that all shards have its push

    @property
    def term(self) -> int:
        """The newest term that this worker knows; -1 before the first."""
        return self.membership.term if self.membership else -1

    def handle(self, message: messages.Message, now: float) -> tuple[list[effects.Send], list[effects.Effect]]:
        """Handle one message; return what to send after the effects are done."""
        out = effects.Output()
        action = _ACTIONS.get(type(message))
        if action is not None and (self.phase != "stopped" or isinstance(message, messages.StopRun)):
            action(self, message, now, out)
        return out.replies, out.effects

    # Membership.

    def _tick(self, message: messages.Tick, now: float, out: effects.Output) -> None:
        if now >= self.heartbeat_at:
            self._beat(now, out)
        if self.phase != "computing" and now - self.asked_at >= self.settings.timers.retry:
            self._request(now, out)

    def _beat(self, now: float, out: effects.Output) -> None:
        self.heartbeat_at = now + self.settings.timers.heartbeat
        if self.phase == "joining":
            return
        busy = self.phase == "computing"
        out.send(
            SCHEDULER,
            messages.Heartbeat(
                self.name, self.boot, self.term, self.progress, busy, self.sequence, self.clock, self.lease
            ),
        )

    def _welcome(self, welcome: messages.Welcome, now: float, out: effects.Output) -> None:
        if self.phase == "joining" and welcome.boot == self.boot:
            self.incarnation, self.membership = welcome.incarnation, welcome.membership
            self._enter("asking", now, out)

    def _fenced(self, fenced: messages.Fenced, now: float, out: effects.Output) -> None:
        if fenced.boot != self.boot:
            return
        if self.retiring:
            self.phase = "stopped"
            out.do(effects.Exit(0, effects.LEFT))
        else:
            self.boot = max(self.boot, fenced.newest)
            self._rejoin(now, out)

    def _retire(self, message: messages.Retire, now: float, out: effects.Output) -> None:
        """Leave at once without a lease, or else when it is finished."""
        self.retiring = True
        if self.phase in ("joining", "asking"):
            self._enter("leaving", now, out)

    def _rejoin(self, now: float, out: effects.Output) -> None:
        """Start over with a new boot number and no state."""
        self.boot += 1
        self._begin()
        if self.retiring:
            self.phase = "leaving"
        self._request(now, out)

    def _on_membership(self, membership: messages.Membership, now: float, out: effects.Output) -> None:
        if self.phase == "joining" or membership.term <= self.term:
            return
        self.membership = membership
        self.reports = True  # a worker may have left whose slice waits for this one
        self._beat(now, out)
        if self.phase != "computing":
            self._request(now, out)

    # The phases of a lease.

    def _enter(self, phase: str, now: float, out: effects.Output) -> None:
        self.phase = phase
        self.progress += 1
        self._request(now, out)

    def _request(self, now: float, out: effects.Output) -> None:
        """Send, or repeat, the request whose answer this phase waits for."""
        self.asked_at = now
        if self.phase == "joining":
            out.send(SCHEDULER, messages.Register(self.name, self.boot))
        elif self.phase == "leaving":
            out.send(SCHEDULER, messages.Leave(self.name, self.boot))
        elif self.phase == "asking":
            out.send(SCHEDULER, messages.Ask(self.worker, self.incarnation, self.sequence))
        elif self.phase == "pulling":
            self._send_pulls(out)
        elif self.phase == "pushing":
            self._send_pushes(out)
        elif self.phase == "reporting":
            self._send_done(out)

    def _to_shards(self, done: object, out: effects.Output, make: Callable[[int], messages.Message]) -> None:
        assert self.membership is not None
        for number, place in enumerate(self.membership.shards):
            if number not in done:  # type: ignore[operator]
                out.send(place.primary, make(number))

    def _grant(self, grant: messages.Grant, now: float, out: effects.Output) -> None:
        current = grant.incarnation == self.incarnation and grant.term == self.term
        # While it is pushing, the servers may have told the scheduler already that they have it all.
        free = self.phase in ("asking", "reporting") or (self.phase == "pushing" and self.settings.shards_report)
        if not current or grant.sequence <= self.sequence or not free:
            return
        if self.retiring:  # granted before the scheduler could know; it gives the lease to another worker
            self._free(now, out)
            return
        self.lease, self.sequence, self.clock = grant.lease, grant.sequence, grant.clock
        self.computed, self.acknowledged = None, set()
        self.reports = grant.report or not self.settings.shards_report
        self.made_of = grant.made_of
        early, self.pulled_early = self.pulled_early, {}
        self.pulled = {n: each for n, each in early.items() if self._is_current(each)}
        self._prepare(self.lease, out)
        self.phase, self.asked_at = "pulling", now
        self.progress += 1
        if self.early != (self.sequence, self.lease.step):  # else the servers answer when they have this version
            self._send_pulls(out)
        self._maybe_compute(now, out)

    def _send_pulls(self, out: effects.Output) -> None:
        assert self.lease is not None
        version = self.lease.step if self.settings.synchronous else 0
        self._to_shards(
            self.pulled,
            out,
            lambda n: messages.Pull(n, self.worker, self.incarnation, self.sequence, version, self.clock),
        )

    def _on_pulled(self, pulled: messages.Pulled, now: float, out: effects.Output) -> None:
        if (pulled.incarnation, pulled.sequence) == (self.incarnation, self.sequence + 1):
            self.pulled_early[pulled.shard] = pulled
            return
        if self.phase != "pulling" or (pulled.incarnation, pulled.sequence) != (self.incarnation, self.sequence):
            return
        if self.settings.synchronous and not self._is_current(pulled):
            if not pulled.ahead:
                self._free(now, out)  # the step was committed without this lease
            return
        self.pulled[pulled.shard] = pulled
        self.progress += 1
        self._maybe_compute(now, out)

    def _is_current(self, pulled: messages.Pulled) -> bool:
        """Return whether these params are of the version that the lease is for, and committed."""
        assert self.lease is not None
        return pulled.version == self.lease.step and pulled.ahead in (0, self.made_of)

    def _maybe_compute(self, now: float, out: effects.Output) -> None:
        """Have the gradient computed once the params of all shards have arrived."""
        assert self.membership is not None
        assert self.lease is not None
        if len(self.pulled) == len(self.membership.shards):
            self.phase = "computing"
            params = tuple(self.pulled[n].pieces for n in range(len(self.pulled)))
            out.do(effects.Compute(self.incarnation, self.sequence, self.lease, params))

    def _on_computed(self, computed: messages.Computed, now: float, out: effects.Output) -> None:
        mine = (computed.incarnation, computed.sequence) == (self.incarnation, self.sequence)
        if mine and self.phase == "computing":
            self.computed = computed
            self._enter("pushing", now, out)
            if self.settings.synchronous:
                assert self.lease is not None
                self.early = (self.sequence + 1, self.lease.step + 1)
                self._look_ahead(out)

    def _look_ahead(self, out: effects.Output) -> None:
        """Have the examples of the same slice of the next step read while the servers and the scheduler are busy."""
        assert self.lease is not None
        if self.lease.step + 1 < self.settings.max_steps:
            self._prepare(lease_table.lease(self.settings, self.lease.step + 1, self.lease.slice), out)

    def _prepare(self, lease: messages.Lease, out: effects.Output) -> None:
        if lease != self.prepared:
            self.prepared = lease
            out.do(effects.Prepare(lease))

    def _send_pushes(self, out: effects.Output) -> None:
        self._to_shards(self.acknowledged, out, self._push)
        if self.settings.shards_report:
            self._send_done(out, staged=False)  # the servers tell the scheduler the rest

    def _push(self, shard: int) -> messages.Push:
        computed, lease = self.computed, self.lease
        assert computed is not None
        assert lease is not None
        return messages.Push(
            shard,
            self.worker,
            self.incarnation,
            self.sequence,
            self.pulled[shard].version,
            self.clock,
            lease,
            computed.count,
            computed.num_examples,
            computed.finite,
            computed.norm_squared,
            computed.pieces[shard],
        )

    def _push_ack(self, ack: messages.PushAck, now: float, out: effects.Output) -> None:
        if self.phase != "pushing" or (ack.incarnation, ack.sequence) != (self.incarnation, self.sequence):
            return
        assert self.membership is not None
        if ack.status == "refused":
            self.phase = "stopped"
            out.do(effects.Exit(-1, f"Shard {ack.shard} refused a push of {self.name}: {ack.reason}"))
        elif ack.status == "fenced":
            self._rejoin(now, out)
        elif ack.status == "obsolete":
            self.early = (0, 0)
            self._free(now, out)
        else:
            self.acknowledged.add(ack.shard)
            self.progress += 1
            if len(self.acknowledged) < len(self.membership.shards):
                return
            if self.reports or self.retiring:
                self._enter("reporting", now, out)
            else:
                self.phase, self.asked_at = "reporting", now  # the servers have told it; said again if that takes long

    def _send_done(self, out: effects.Output, *, staged: bool = True) -> None:
        assert self.lease is not None
        assert self.computed is not None
        c = self.computed
        done = messages.Done(
            self.worker, self.incarnation, self.sequence, self.clock, self.lease, c.count, c.finite, c.metrics, staged
        )
        out.send(SCHEDULER, done)

    def _done_ack(self, ack: messages.DoneAck, now: float, out: effects.Output) -> None:
        if self.phase == "reporting" and (ack.incarnation, ack.sequence) == (self.incarnation, self.sequence):
            self.clock += 1
            self.lease, self.computed, self.pulled = None, None, {}
            if self.retiring:
                self._enter("leaving", now, out)
                return
            # The scheduler grants the next lease without being asked; the request is only sent when that takes long.
            self.phase, self.asked_at = "asking", now
            self.progress += 1

    def _revoke(self, revoke: messages.Revoke, now: float, out: effects.Output) -> None:
        mine = (revoke.incarnation, revoke.sequence) == (self.incarnation, self.sequence)
        if mine and self.phase == "pulling":
            self._free(now, out)

    def _free(self, now: float, out: effects.Output) -> None:
        """Release the lease without finishing it, and ask for the next one."""
        self.lease, self.computed, self.pulled = None, None, {}
        self._enter("leaving" if self.retiring else "asking", now, out)

    def _stop(self, stop: messages.StopRun, now: float, out: effects.Output) -> None:
        out.send(SCHEDULER, messages.StopAck(self.name))
        if self.phase != "stopped":
            self.phase = "stopped"
            out.do(effects.Exit(stop.step, stop.reason))


_ACTIONS: dict[type, Callable[..., None]] = {
    messages.Tick: Worker._tick,
    messages.Welcome: Worker._welcome,
    messages.Fenced: Worker._fenced,
    messages.Retire: Worker._retire,
    messages.Membership: Worker._on_membership,
    messages.Grant: Worker._grant,
    messages.Pulled: Worker._on_pulled,
    messages.Computed: Worker._on_computed,
    messages.PushAck: Worker._push_ack,
    messages.DoneAck: Worker._done_ack,
    messages.Revoke: Worker._revoke,
    messages.StopRun: Worker._stop,
}
