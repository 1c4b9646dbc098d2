"""Faulty parts of a parameter server. Each must turn a number of simulated runs red, by the rule that it breaks.

A bug is what a simulation runs instead of the right part, the settings and faults in which it shows, and the rules that
may tell it. `found` says in which of how many seeds.
"""

import dataclasses
import math

import numpy as np
import workload

from jaxdist.paramserver.processes.driver import Driver
from jaxdist.paramserver.protocol import effects, journal, messages
from jaxdist.paramserver.protocol.reader import Reader
from jaxdist.paramserver.protocol.scheduler.scheduler import Scheduler
from jaxdist.paramserver.protocol.server import Server
from jaxdist.paramserver.protocol.settings import (
    OBSERVER,
    SCHEDULER,
    Settings,
    saved_cut_file,
    server_shard,
    shard_file,
)
from jaxdist.paramserver.protocol.shard import Shard
from jaxdist.paramserver.protocol.worker import Worker
from jaxdist.paramserver.simulator import FAST, Faults, Hardware, Roles
from jaxdist.paramserver.wire.outbox import Outbox

HARSH = Faults(until=3.0, drop=0.1, repeat=0.3, slow=0.3, partitions=0.5, kills=2.0, pauses=1.5, crash_at_append=0.05)
SLOW_WIRE = Hardware(bandwidth=2e4, small_bytes=140)


def settings(**changes):
    chosen = {"num_examples": 22, "global_batch_size": 7, "max_steps": 8, "timers": workload.TIMERS, **changes}
    return Settings(**chosen)


@dataclasses.dataclass(frozen=True)
class Bug:
    """A planted bug; an empty rule stands for any failure."""

    roles: Roles = dataclasses.field(default_factory=Roles)
    settings: dict = dataclasses.field(default_factory=dict)
    faults: dict = dataclasses.field(default_factory=dict)
    rule: str = ""
    hardware: Hardware = FAST
    updater: type = workload.Momentum
    clip: bool = False
    num_params: int = 9
    own_bits: bool = False

    def play(self, seed, *, planted=True):
        """Play a schedule of this bug, or the same without it."""
        healthy = {} if planted else {"roles": None, "updater": workload.Momentum}
        given = {"roles": self.roles, "updater": self.updater} | healthy
        return workload.play(
            seed,
            settings=settings(**self.settings),
            faults=dataclasses.replace(HARSH, **self.faults),
            hardware=self.hardware,
            clip=self.clip,
            num_params=self.num_params,
            own_bits=self.own_bits,
            halt_at=math.inf,
            target_step=math.inf,
            **given,
        )

    def shows(self, seed):
        """Return whether this seed shows the bug, and what was seen."""
        try:
            with np.errstate(all="ignore"):
                self.play(seed)
        except (AssertionError, KeyError) as error:
            text = str(error) if isinstance(error, AssertionError) else repr(error)
            return not self.rule or any(text.startswith(rule) for rule in self.rule.split("|")), text
        return False, ""

    def found(self, *, within=150):
        """Return the number of seeds until one shows this bug; raise AssertionError if none of `within` does."""
        seen = []
        for seed in range(within):
            right, text = self.shows(seed)
            if right:
                return seed + 1
            seen += [text] if text else []
        raise AssertionError(f"{within} schedules did not show it as {self.rule!r}; seen: {seen[:3]}")


def hearing(role, **rewritten):
    """Return `role` with what it hears rewritten: for each type of message a function of machine and message."""

    class Deceived(role):
        def handle(self, message, now):
            rewrite = rewritten.get(type(message).__name__)
            return super().handle(rewrite(self, message) if rewrite else message, now)

    return Deceived


def doing(role, change):
    """Return `role` with its effects changed: `change` returns the effects to do instead of one."""

    class Doing(role):
        def handle(self, message, now):
            replies, todo = super().handle(message, now)
            return replies, [each for effect in todo for each in change(effect)]

    return Doing


# Row 1: an optimizer that is right on one server.


class OwnNorm(workload.Momentum):
    """Clips by the norm of its own shard."""

    def update(self, params, opt_state, grads, *, step, scale, norm_squared):
        mine = sum(float((g.astype(np.float64) ** 2).sum()) for g in grads[: self.num_params])
        return super().update(params, opt_state, grads, step=step, scale=scale, norm_squared=mine)


class NormOfAll(Shard):
    """Counts the sums of model state as part of the gradient."""

    def _grads(self):
        return self.summed


class OneWeight(Shard):
    """Weights model state by what the loss counted."""

    def _push(self, outcome, push):
        super()._push(outcome, dataclasses.replace(push, num_examples=push.count))


# Row 2: what is sent again.


class StormyOutbox(Outbox):
    """Queues a message although the same one travels."""

    def put(self, parcel):
        self._waiting.append(parcel)
        self._waiting_bytes += parcel.num_bytes


# Row 3: a server that is silent for good.


class PatientScheduler(Scheduler):
    """Waits for the only copy of a shard, however long."""

    def handle(self, message, now):
        for name, status in self.state.processes.items():
            if server_shard(name) is not None:
                status.seen_at = 1e9
        return super().handle(message, now)


# Row 4: a scheduler that stood still.


class WallClockScheduler(Scheduler):
    """Counts the time of its own pause as silence of the others."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self._clock.advance = lambda now: now


class TickFirst(Driver):
    """Reads heartbeats in their turn, after a tick that is due."""

    def __init__(self, machine, world, **kwargs):
        class InTurn:
            def __getattr__(self, name):
                return getattr(world, name)

            def take_heartbeat(self):
                return None

            def take(self, seconds):
                return world.take_heartbeat() or world.take(seconds)

        super().__init__(machine, InTurn(), **kwargs)


class BackwardDriver(Driver):
    """Believes a clock that is set back."""

    def _advance(self):
        self._now = self.world.now()
        return self._now


# Row 5: what is silently wrong.


class UncountedScheduler(Scheduler):
    """Divides by what the loss counted without a look at it."""

    def handle(self, message, now):
        if isinstance(message, messages.Done):
            message = dataclasses.replace(message, count=1.0)
        return super().handle(message, now)


class Flaky(workload.Momentum):
    """Computes one update wrongly, on one of the copies."""

    computes_wrongly, made = True, 0

    def update(self, *args, **kwargs):
        Flaky.made += 1
        params, opt_state = super().update(*args, **kwargs)
        return ((params[0] + np.float32(1e-3), *params[1:]) if Flaky.made % 7 == 0 else params), opt_state


class NumberedAgain(Scheduler):
    """Counts incarnations from 0 after a restart."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.state.incarnations = 0


# Workers that join and leave, or are silent for good.


class HastyLeaver(Worker):
    """Leaves at once, whatever it is doing."""

    def _retire(self, message, now, out):
        self.retiring = True
        if self.phase not in ("leaving", "stopped"):
            self._enter("leaving", now, out)

    def handle(self, message, now):
        if isinstance(message, messages.Retire):
            out = effects.Output()
            self._retire(message, now, out)
            return out.replies, out.effects
        return super().handle(message, now)


def _deaf_while_busy(machine, retire):
    return retire if machine.phase == "joining" else messages.Tick()


class FromClockZero(Scheduler):
    """Has workers join at clock 0."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.state.gated = lambda: False


class SlicesByPresence(Scheduler):
    """Divides a batch by the workers that are there."""

    def handle(self, message, now):
        found = super().handle(message, now)
        state, table = self.state, self.state.lease_table
        if state.workers and not any(table.holders) and not table.done and not table.computed:
            table.settings = dataclasses.replace(state.settings, workers=len(state.workers))
            table._open()
        return found


def _not_restarted(effect):
    return [] if isinstance(effect, effects.Replace) else [effect]


# The exactly-once table, commits, reads, cuts and the log.


class UnfencedShard(Shard):
    def is_member(self, worker, incarnation):
        return True


class TwiceShard(Shard):
    """Does not know what it has applied."""

    def verdict(self, push):
        status = super().verdict(push)
        return "applied" if status == "duplicate" and not self.settings.synchronous else status


class ForgetfulShard(Shard):
    def export(self):
        return dataclasses.replace(super().export(), seen=())


class ForgetfulServer(Server):
    """Keeps its table outside the replicated state: a server that takes over has none."""

    def _enter(self, membership, now, out):
        if not self.primary and membership.shards[self.number].primary == self.name:
            self.shard.seen = {}
        super()._enter(membership, now, out)


class UnorderedShard(Shard):
    """Adds the slices as they arrive."""

    def _ready_for(self, commit):
        return None

    def _ordered(self, commit):
        arrived = list(self.staged)
        return sorted(commit.contributors, key=lambda c: arrived.index((c.worker, c.incarnation, c.sequence)))


class AnyUpdateShard(Shard):
    """Keeps the update that is ready, whichever pushes the commit names."""

    def _ready_for(self, commit):
        return None if commit.skip else self._ready


class AheadWorker(Worker):
    """Uses params that travel ahead of their commit, whichever pushes they were made of."""

    def _is_current(self, pulled):
        return pulled.version == self.lease.step


def _of_this_lease(worker, pulled):
    """Take params of an earlier lease for those of this one."""
    return dataclasses.replace(pulled, sequence=max(pulled.sequence, worker.sequence))


class GapServer(Server):
    """Applies an entry of the log although one before it is missing."""

    def handle(self, message, now):
        if isinstance(message, messages.Replicate) and self._is_my_primary(message.term) and self.restored >= 0:
            self.index = max(self.index, message.index - 1)
        return super().handle(message, now)


class EarlySynced(Server):
    """Says that its backup has everything before it has sent it anything."""

    def _change_backup(self, now, out):
        super()._change_backup(now, out)
        place = self._place
        if place.backup and not place.synced:
            out.send(SCHEDULER, messages.Synced(self.number, self.term, place.backup, place.backup_boot))


class OptimizerlessServer(Server):
    """Sends the params where the state of the optimizer is asked for."""

    def handle(self, message, now):
        if not isinstance(message, messages.Read):
            return super().handle(message, now)
        right, self.shard.opt_state = self.shard.opt_state, self.shard.params
        found = super().handle(message, now)
        self.shard.opt_state = right
        return found


class UnsettledScheduler(Scheduler):
    """Grants leases before all shards have entered the term."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.state.settled = lambda: True


class ForgetfulScheduler(Scheduler):
    """Grants leases after a restart before the workers have told what they hold."""

    def handle(self, message, now):
        found = super().handle(message, now)
        self.state.unreported = set()
        return found


def _no_last_pushes(scheduler, ack):
    """Do not count the last push of a worker that died, although all shards have it."""
    return dataclasses.replace(ack, seen=())


def _late_ask_is_new(scheduler, ask):
    """Take a late request for one of a worker that has returned its lease."""
    worker = scheduler.state.worker(ask.worker, ask.incarnation)
    return ask if worker is None else dataclasses.replace(ask, sequence=max(ask.sequence, worker.sequence))


def _unlogged_members(effect):
    """Act on a membership that is not logged."""
    is_change = isinstance(effect, effects.Append) and isinstance(effect.record, journal.MembershipRecord)
    return [] if is_change and effect.record.membership.term > 1 else [effect]


class UngatedShard(Shard):
    def may_read(self, pull):
        return self.version >= pull.version


class AnyTermServer(Server):
    """Answers a read that was asked before a roll-back."""

    def handle(self, message, now):
        if isinstance(message, messages.Read) and message.term != self.term:
            replies, todo = super().handle(dataclasses.replace(message, term=self.term), now)
            sent = [(to, dataclasses.replace(reply, term=message.term)) for to, reply in replies]
            return [effects.Send(*each) for each in sent], todo
        return super().handle(message, now)


class AnyCutReader(Reader):
    """Takes a part of an earlier cut for one of the cut that is offered."""

    def _keep(self, answer, out):
        if self._offer is not None:
            answer = dataclasses.replace(answer, term=self._offer.term, number=self._offer.number)
        super()._keep(answer, out)


class AnyVerdictScheduler(Scheduler):
    """Takes a late verdict on an earlier offer of the same step for one on the cut that is offered now."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.steps = {}

    def handle(self, message, now):
        state = self.state
        late = isinstance(message, messages.Verdict) and self.steps.get((message.term, message.number)) == state.step
        if late and state.offered:
            message = dataclasses.replace(message, term=state.term, number=state.offered)
        replies, todo = super().handle(message, now)
        self.steps |= {(offer.term, offer.number): offer.step for to, offer in replies if to == OBSERVER}
        return replies, todo


class HastyScheduler(Scheduler):
    """Writes the manifest first."""

    def handle(self, message, now):
        before = self.state.saving
        replies, todo = super().handle(message, now)
        name, state = self.state.saving, self.state
        if name and name != before:
            shards = tuple(journal.SavedShard(n, shard_file(name, n), 0) for n in range(state.settings.servers))
            manifest = journal.SavedCut(name, state.step, 0, state.lease_table.trained(), shards)
            todo.append(effects.Write(saved_cut_file(name), manifest))
        return replies, todo


class OldCutScheduler(Scheduler):
    """Does not keep the cut that was saved last."""

    def handle(self, message, now):
        if isinstance(message, messages.Register):
            self.state.saved_cut = ("", messages.Trained(0, ()))
        return super().handle(message, now)


def _unlogged_commit(effect):
    """Act on a commit that is not logged."""
    is_commit = isinstance(effect, effects.Append) and isinstance(effect.record, journal.CommitRecord)
    return [] if is_commit else [effect]


def _cut_too_short(effect):
    """Shorten the log to the start of the run."""
    if isinstance(effect, effects.Compact):
        return [effects.Compact(dataclasses.replace(effect.record, trained=messages.Trained(0, ())))]
    return [effect]


def _never_compact(effect):
    return [] if isinstance(effect, effects.Compact) else [effect]


class EagerServer(Server):
    """Answers before its backup has the entry."""

    def _submit(self, entry, extra, now, out, **kwargs):
        super()._submit(entry, extra, now, out, **kwargs)
        self._release(self.index, out)


ASYNC = {"mode": "async", "workers": 4, "servers": 2, "max_steps": 12}
REPLICATED = {**ASYNC, "durability": "replicated"}
SYNC_COPIES = {"workers": 3, "servers": 2, "durability": "replicated", "max_steps": 12}
BOUNDED = {"mode": "bounded", "max_staleness": 1, "workers": 3}
CHANGES = {"joins": 1.0, "leaves": 1.0}
LONG = {"until": 8.0, "kills": 6.0, "drop": 0.3, "pauses": 0.3, "partitions": 0.0}


def _without_newest(machine, fenced):
    """Or else the scheduler would help out with the newest boot number."""
    return dataclasses.replace(fenced, newest=0)


BUGS = {
    "1 norm of a shard alone": Bug(updater=OwnNorm, settings={"servers": 2}, clip=True, rule="same bits"),
    "1 model state in the norm": Bug(Roles(shard=NormOfAll), {"workers": 2}, clip=True, num_params=1, rule="same bits"),
    "2 resend storm": Bug(Roles(outbox=StormyOutbox), {"workers": 2}, {}, "resend storm", SLOW_WIRE),
    "3 a silent server hangs the run": Bug(Roles(scheduler=PatientScheduler), {}, {"vanish": 1.0}, "These processes"),
    "3 and with saved cuts": Bug(
        Roles(scheduler=PatientScheduler),
        {"durability": "snapshot", "snapshot_every": 2},
        {"vanish": 1.0},
        "These processes",
    ),
    "4 tick before inbox": Bug(
        Roles(scheduler=WallClockScheduler, driver=TickFirst),
        {"workers": 3},
        {"pauses": 4.0, "busy": 0.05},
        "needless eviction",
    ),
    "4 a clock that is set back": Bug(Roles(driver=BackwardDriver), {"workers": 2}, {"jumps": 3.0}, "These processes"),
    "5 nothing counted": Bug(
        Roles(scheduler=UncountedScheduler), {"num_examples": 210, "max_steps": 30}, {}, "These processes"
    ),
    "5 copies not compared": Bug(
        settings={**SYNC_COPIES, "check_copies_every": 0}, updater=Flaky, faults={"kills": 0.5}, rule="copies"
    ),
    "5 boot by the clock of the wall": Bug(
        Roles(boot=lambda wall, before: wall, worker=hearing(Worker, Fenced=_without_newest)),
        {"workers": 1},
        {"jumps": 8.0, "kills": 4.0},
        "These processes",
    ),
    "5 incarnations from 0": Bug(
        Roles(scheduler=NumberedAgain), {"workers": 3}, {"kills": 4.0}, "incarnations|fencing|exactly once|examples"
    ),
    "5 model state weighted by loss": Bug(Roles(shard=OneWeight), {"workers": 2}, num_params=1, rule="same bits"),
    "6 a log that grows": Bug(
        Roles(scheduler=doing(Scheduler, _never_compact)), {"workers": 2, "max_steps": 200}, {"until": 0.0}, "log"
    ),
    "a worker leaves in the middle": Bug(
        Roles(worker=HastyLeaver), {**ASYNC, "max_steps": 40}, {**CHANGES, "until": 8.0}, "leaving"
    ),
    "a worker does not leave": Bug(
        Roles(worker=hearing(Worker, Retire=_deaf_while_busy)), {"workers": 2, "max_steps": 150}, CHANGES, "leaving"
    ),
    "a worker joins at clock 0": Bug(
        Roles(scheduler=FromClockZero), {**BOUNDED, "max_steps": 40}, CHANGES, "bounded reads|These processes"
    ),
    "slices by who is there": Bug(Roles(scheduler=SlicesByPresence), {"workers": 2}, CHANGES),
    "a silent worker is not restarted": Bug(
        Roles(scheduler=doing(Scheduler, _not_restarted)), {}, {"vanish": 1.0, "kills": 0.0}, "These processes"
    ),
    "a silent copy is not restarted": Bug(
        Roles(scheduler=doing(Scheduler, _not_restarted)),
        {**SYNC_COPIES, "max_steps": 150},
        {"vanish": 1.0, "kills": 0.0},
        "silence",
    ),
    "no fencing": Bug(Roles(shard=UnfencedShard), ASYNC, {}, "fencing"),
    "applied twice": Bug(Roles(shard=TwiceShard), ASYNC, {}, "exactly once"),
    "dedup table not stored": Bug(
        Roles(shard=ForgetfulShard), {**ASYNC, "durability": "snapshot", "snapshot_every": 2}, {}, "snapshots"
    ),
    "dedup table not copied": Bug(
        Roles(server=ForgetfulServer), {**REPLICATED, "servers": 1, "max_steps": 40}, LONG, "exactly once|examples"
    ),
    "unordered sum": Bug(Roles(shard=UnorderedShard), {"workers": 3, "servers": 2}, {}, "same bits"),
    "an update of other pushes": Bug(
        Roles(shard=AnyUpdateShard), {"workers": 3, "servers": 2}, {}, "same bits", own_bits=True
    ),
    "params of other pushes": Bug(
        Roles(worker=AheadWorker), {"workers": 3, "servers": 2}, {}, "same bits", own_bits=True
    ),
    "params of an earlier lease": Bug(
        Roles(worker=hearing(Worker, Pulled=_of_this_lease)),
        {**BOUNDED, "max_steps": 40},
        {"late": 0.5, "repeat": 0.5, "slow": 0.7, "until": 6.0},
        "bounded reads",
    ),
    "an entry of the log is missing": Bug(Roles(server=GapServer), REPLICATED),
    "a backup without the state": Bug(
        Roles(server=EarlySynced), {**SYNC_COPIES, "max_steps": 30}, {"kills": 4.0, "until": 6.0}
    ),
    "no state of the optimizer": Bug(Roles(server=OptimizerlessServer), {"servers": 2}, {}, "same bits"),
    "leases before the term": Bug(
        Roles(scheduler=UnsettledScheduler), {**REPLICATED, "max_steps": 30}, {"kills": 4.0, "until": 6.0}
    ),
    "leases before the reports": Bug(
        Roles(scheduler=ForgetfulScheduler), {**ASYNC, "max_steps": 30}, {"kills": 4.0, "until": 6.0}, "examples"
    ),
    "a last push is not counted": Bug(
        Roles(scheduler=hearing(Scheduler, MembershipAck=_no_last_pushes)), ASYNC, {"kills": 4.0}, "examples"
    ),
    "a late request is a new one": Bug(
        Roles(scheduler=hearing(Scheduler, Ask=_late_ask_is_new)), ASYNC, {"late": 0.5, "slow": 0.7}, "examples"
    ),
    "members not logged": Bug(
        Roles(scheduler=doing(Scheduler, _unlogged_members)), {"workers": 2, "servers": 2}, {"kills": 4.0}
    ),
    "unbounded reads": Bug(Roles(shard=UngatedShard), BOUNDED, {}, "bounded reads"),
    "a cut of two terms": Bug(
        Roles(server=AnyTermServer),
        {"servers": 3, "durability": "snapshot", "snapshot_every": 3, "read_every": (1,), "max_steps": 60},
        {"until": 12.0, "kills": 3.0, "slow": 0.5},
        "cuts",
    ),
    "a cut with parts of another": Bug(
        Roles(reader=AnyCutReader),
        {"servers": 3, "read_every": (1,), "max_steps": 40},
        {"late": 0.5, "until": 9.0},
        "cuts",
    ),
    "a cut after a late verdict": Bug(
        Roles(scheduler=AnyVerdictScheduler),
        {**ASYNC, "servers": 3, "read_every": (1,), "max_steps": 60},
        {"joins": 3.0, "leaves": 3.0, "late": 0.5, "repeat": 0.9, "slow": 0.7, "kills": 1.0, "until": 9.0},
        "cuts",
    ),
    "manifest written first": Bug(
        Roles(scheduler=HastyScheduler), {"durability": "snapshot", "snapshot_every": 2}, {}, "snapshots"
    ),
    "saved cut forgotten": Bug(
        Roles(scheduler=OldCutScheduler),
        {"durability": "snapshot", "snapshot_every": 2, "max_steps": 20},
        {"until": 6.0, "kills": 3.0},
        "saved cuts",
    ),
    "commit not logged": Bug(Roles(scheduler=doing(Scheduler, _unlogged_commit)), {"workers": 2}, {"kills": 3.0}),
    "log cut too short": Bug(
        Roles(scheduler=doing(Scheduler, _cut_too_short)), {**ASYNC, "read_every": (3,)}, {"kills": 4.0}
    ),
    "acknowledged before copied": Bug(
        Roles(server=EagerServer), REPLICATED, {"kills": 4.0}, "acknowledged|reads|examples"
    ),
}
"""The bugs by name; a number is the row of what was wrong before."""
