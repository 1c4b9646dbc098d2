"""The scheduler: hands out leases, decides commits, keeps the membership, ends the run; a state machine without I/O.

It writes down what it decides before anybody hears of it (effects.Append), and forgets the rest at will: leases, clocks
and staged pushes are asked of the workers and the shards again after a restart. Every change of membership is a new
*epoch*; no lease is handed out before all shards work under the current one.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from jaxdist.paramserver import effects, ledger, membership, messages
from jaxdist.paramserver.ledger import FRESH, BatchLedger, StepLedger
from jaxdist.paramserver.messages import Contributor, Lease, LedgerState, Manifest
from jaxdist.paramserver.settings import Settings, manifest_file, server_shard, shard_file, worker_name, worker_number

LINGER = 4  # how many times `dead_after` the scheduler waits for the others to acknowledge the end


@dataclass(slots=True)
class Life:
    """What is known of a process: when it was heard of, and when it last got anywhere."""

    boot: int
    seen_at: float
    progress: int = -1
    progress_at: float = 0.0
    busy: bool = False

    def note(self, beat: messages.Heartbeat, now: float) -> None:
        """Take in a heartbeat."""
        if beat.progress != self.progress or not beat.busy:
            self.progress, self.progress_at = beat.progress, now
        self.seen_at, self.busy = now, beat.busy


@dataclass(slots=True)
class Worker:
    """What the scheduler knows of one incarnation."""

    incarnation: int
    heard: bool = True  # False after a restart of the scheduler, until the worker says what it holds
    idle: bool = False
    benched: bool = False
    sequence: int = 0  # the last lease handed out
    finished: int = 0  # the last lease that came back
    clock: int = 0
    lease: Lease | None = None
    granted_at: float = 0.0
    seconds: float = 0.0  # how long its last lease took


class Scheduler:
    """Decides. `records` is the log of an earlier life, `resume` the manifest of an earlier run."""

    def __init__(
        self,
        *,
        settings: Settings,
        records: Iterable[messages.Message] = (),
        resume: Manifest | None = None,
    ) -> None:
        self.settings = settings
        self.lives: dict[str, Life] = {}
        self.boots: dict[str, int] = {}
        self.workers: dict[int, Worker] = {}
        self.incarnations = resume.incarnations if resume else 0
        self.view: messages.View | None = None
        self.snapshot = (resume.name, resume.ledger) if resume else ("", FRESH)
        self.ledger = self._books(self.snapshot[1])
        self.last_commit: messages.CommitRecord | None = None  # until every shard has it
        self.committed: set[int] = set()
        self.norms: dict[int, tuple[float, ...]] = {}
        self.norm_squared: float | None = None
        self.stop: messages.StopRecord | None = None
        self.halted = ""
        self.counters = {"torn_pushes": 0, "failovers": 0, "fenced": 0, "rollbacks": 0}
        self._forget_progress()
        self.snapshot_at = self.read_at = self.ledger.step
        self.read_last = False
        self.attempts = 0
        self.retry_at = 0.0
        self.torn: set[tuple[int, int, int]] = set()
        self.awaiting_stop: set[str] = set()
        self.stopped_at = 0.0
        self.exited = False
        self.restarted = False
        for record in records:
            self._replay(record)
            self.restarted = True

    def _books(self, state: LedgerState) -> StepLedger | BatchLedger:
        return (StepLedger if self.settings.synchronous else BatchLedger)(self.settings, state)

    def _forget_progress(self) -> None:
        """Drop whatever belongs to one epoch only."""
        self.acks: dict[int, messages.ViewAck] = {}
        self.snapshotting = ""
        self.snapshot_done: dict[int, messages.SnapshotDone] = {}
        self.reading = 0
        self.judging = False
        self.answers: dict[int, messages.ReadAnswer] = {}

    def _replay(self, record: messages.Message) -> None:
        if isinstance(record, messages.ViewRecord):
            self.view, self.incarnations = record.view, record.incarnations
            self.boots = {row.node: row.boot for row in record.boots}
            if record.ledger is not None:
                self.ledger, self.last_commit = self._books(record.ledger), None
        elif isinstance(record, messages.CommitRecord):
            assert isinstance(self.ledger, StepLedger)
            self.last_commit, self.norm_squared = record, None
            self.ledger.advance()
            self._note_nonfinite(not record.skip)
        elif isinstance(record, messages.NormRecord):
            self.norm_squared = record.norm_squared
        elif isinstance(record, messages.CompleteRecord):
            assert isinstance(self.ledger, BatchLedger)
            self.ledger.complete(record.contributor.lease.step)
        elif isinstance(record, messages.SnapshotRecord):
            self.snapshot, self.snapshot_at = (record.name, record.ledger), self.ledger.step
        elif isinstance(record, messages.VerdictRecord):
            self.read_at, self.halted = record.step, record.end_reason
            self.read_last = self._ending()
        elif isinstance(record, messages.StopRecord):
            self.stop = record

    @property
    def epoch(self) -> int:
        """The current epoch; 0 before the first view."""
        return self.view.epoch if self.view else 0

    @property
    def step(self) -> int:
        """Steps done."""
        return self.ledger.step

    def handle(self, message: messages.Message, now: float) -> tuple[list[effects.Send], list[effects.Effect]]:
        """Take in one message; return what to send after the effects are done."""
        out = effects.Output()
        if self.restarted:
            self._recover(now, out)
        action = (_ACTIONS if self.stop is None else _STOPPED).get(type(message))
        if action is not None:
            action(self, message, now, out)
        return out.replies, out.effects

    # Membership.

    def _recover(self, now: float, out: effects.Output) -> None:
        """First thing after a restart: a new epoch, under which everybody says what they hold."""
        self.restarted = False
        if self.view is None:
            return
        self.lives = {node: Life(boot, now, progress_at=now) for node, boot in self.boots.items()}
        self.workers = {}
        for member in self.view.members:
            benched = member.floor >= messages.BENCHED
            clock = 0 if benched else member.floor
            self.workers[member.worker] = Worker(member.incarnation, heard=False, benched=benched, clock=clock)
        self.awaiting_stop = set(self._everybody())
        self.stopped_at = now
        if self.stop is None:
            self._change(now, out)

    def _change(self, now: float, out: effects.Output, *, ledger: LedgerState | None = None, **changes: object) -> None:
        """Move to the next epoch."""
        assert self.view is not None
        self._announce(membership.next_view(self.view, **changes), ledger, out)

    def _announce(self, view: messages.View, ledger: LedgerState | None, out: effects.Output) -> None:
        self.view = view
        self._forget_progress()
        boots = tuple(messages.Register(node, boot) for node, boot in self.boots.items())
        out.do(effects.Append(messages.ViewRecord(view, self.incarnations, boots, ledger)))
        for node in self._everybody():
            out.send(node, view)

    def _everybody(self) -> list[str]:
        assert self.view is not None
        servers = [name for place in self.view.shards for name in (place.primary, place.backup) if name]
        return servers + [worker_name(member.worker) for member in self.view.members]

    def _register(self, request: messages.Register, now: float, out: effects.Output) -> None:
        known = self.boots.get(request.node, -1)
        if request.boot < known:
            return
        if request.boot == known and request.node in self.lives:
            self._greet_again(request, out)
            return
        worker = worker_number(request.node)
        if worker is not None and self.view is None:
            return  # no server yet: it will ask again
        self.boots[request.node] = request.boot
        self.lives[request.node] = Life(request.boot, now, progress_at=now)
        if worker is not None:
            self._worker_joins(request, worker, now, out)
        elif self.view is None:
            if all(node in self.boots for node in membership.server_nodes(self.settings)):
                shards = membership.first_shards(self.settings, self.boots)
                self._announce(messages.View(1, (), shards, 1, self.snapshot[0]), self.snapshot[1], out)
        else:
            self._server_returns(request, now, out)

    def _greet_again(self, request: messages.Register, out: effects.Output) -> None:
        worker = worker_number(request.node)
        if self.view is None:
            return
        if worker is None:
            out.send(request.node, self.view)
        elif worker in self.workers:
            incarnation = self.workers[worker].incarnation
            out.send(request.node, messages.Welcome(request.node, request.boot, incarnation, self.view))
        else:
            out.send(request.node, messages.Fenced(request.node, request.boot))

    def _worker_joins(self, request: messages.Register, worker: int, now: float, out: effects.Output) -> None:
        assert self.view is not None
        self._drop_worker(worker)
        self.incarnations += 1
        # Its first clock is decided when everybody's clock is known (_bench), until then nobody waits for it.
        benched = self._gated()
        self.workers[worker] = Worker(self.incarnations, benched=benched)
        member = messages.Member(worker, self.incarnations, messages.BENCHED if benched else 0)
        self._change(now, out, members=membership.with_member(self.view.members, member))
        out.send(request.node, messages.Welcome(request.node, request.boot, self.incarnations, self.view))

    def _front(self) -> int:
        """Return the clock no reader was ever beyond: whoever joins there owes nobody an update."""
        clocks = [worker.clock for worker in self.workers.values()]
        return max([*clocks, *(ack.front for ack in self.acks.values())], default=0)

    def _gated(self) -> bool:
        """Return True when readers wait for each other's clocks."""
        return self.settings.mode == "bounded" and not self.settings.synchronous

    def _drop_worker(self, worker: int) -> None:
        gone = self.workers.pop(worker, None)
        if gone is None:
            return
        self.counters["fenced"] += 1
        # A batch that may be on some shards stays out until all of them said what they applied (_settle).
        if gone.lease is not None and isinstance(self.ledger, StepLedger):
            self.ledger.give_back(worker, gone.lease)

    def _remove_worker(self, worker: int, now: float, out: effects.Output) -> None:
        assert self.view is not None
        self._drop_worker(worker)
        self._change(now, out, members=tuple(m for m in self.view.members if m.worker != worker))

    def _server_returns(self, request: messages.Register, now: float, out: effects.Output) -> None:
        """A server process started anew: whatever it held is gone."""
        assert self.view is not None
        number = server_shard(request.node)
        assert number is not None
        place = self.view.shards[number]
        if place.primary == request.node:
            if not place.synced:
                self._lost(number, request, now, out)
                return
            place = membership.without_primary(place)
            self.counters["failovers"] += 1
        place = membership.with_backup(place, request.node, request.boot)
        self._change(now, out, shards=membership.put(self.view.shards, number, place))

    def _lost(self, number: int, request: messages.Register, now: float, out: effects.Output) -> None:
        """No copy of a shard is left: go back to the last snapshot, all shards and the books together."""
        assert self.view is not None
        if not self.settings.snapshot_every:
            self._end("error", out, now, f"shard {number} was lost with {request.node}, and there is no snapshot")
            return
        place = messages.ShardView(request.node, request.boot, *membership.NO_BACKUP, False)
        name, books = self.snapshot
        for worker in list(self.workers):
            self._drop_worker(worker)
        self.ledger, self.last_commit = self._books(books), None
        self.snapshot_at = self.read_at = books.step
        self.read_last = False
        self.counters["rollbacks"] += 1
        out.do(effects.Warn(f"shard {number} was lost; all shards return to step {self.ledger.step}"))
        shards = membership.put(self.view.shards, number, place)
        restore = {"restore_epoch": self.epoch + 1, "restore": name}
        self._change(now, out, ledger=books, members=(), shards=shards, **restore)

    def _heartbeat(self, beat: messages.Heartbeat, now: float, out: effects.Output) -> None:
        worker = worker_number(beat.node)
        life = self.lives.get(beat.node)
        if life is None or life.boot != beat.boot:
            if worker is not None and (life is None or life.boot < beat.boot):
                out.send(beat.node, messages.Fenced(beat.node, beat.boot))
            return
        if worker is not None and worker not in self.workers:
            out.send(beat.node, messages.Fenced(beat.node, beat.boot))
            return
        life.note(beat, now)
        if self.view is not None and beat.epoch < self.view.epoch:
            out.send(beat.node, self.view)
        elif worker is not None and not self.workers[worker].heard:
            self._hear(worker, beat, now, out)

    def _hear(self, number: int, beat: messages.Heartbeat, now: float, out: effects.Output) -> None:
        """Learn, after a restart, what a worker holds."""
        worker = self.workers[number]
        worker.heard = True
        worker.sequence = max(worker.sequence, beat.sequence)
        worker.clock = max(worker.clock, beat.clock)
        if beat.lease is not None and beat.sequence > worker.finished:
            worker.lease, worker.granted_at = beat.lease, now
            self.ledger.hold(number, beat.lease)
        self._dispatch(now, out)

    def _view_ack(self, ack: messages.ViewAck, now: float, out: effects.Output) -> None:
        place = self.view.shards[ack.shard] if self.view else None
        if place is None or ack.epoch != self.epoch or ack.node != place.primary or ack.shard in self.acks:
            return
        self.acks[ack.shard] = ack
        if self._settled():
            self._settle(out)
            self._repeat_commit(out)
            self._dispatch(now, out)

    def _settled(self) -> bool:
        return len(self.acks) == self.settings.servers

    def _settle(self, out: effects.Output) -> None:
        """Decide what became of the last push of every worker that left: on all shards, on some, or on none."""
        if isinstance(self.ledger, StepLedger):
            return
        last: dict[tuple[int, int, int, int], int] = {}
        for ack in self.acks.values():
            for row in ack.seen:
                if row.worker not in self.workers or self.workers[row.worker].incarnation != row.incarnation:
                    key = (row.worker, row.incarnation, row.sequence, row.step)
                    last[key] = last.get(key, 0) + 1
        for (worker, incarnation, sequence, step), copies in last.items():
            if self.ledger.is_done(step):
                continue
            if copies == self.settings.servers:
                lease = ledger.lease(self.settings, step)
                self._complete(Contributor(worker, incarnation, sequence, lease), (), out)
            elif (worker, incarnation, sequence) not in self.torn:
                self.torn.add((worker, incarnation, sequence))
                self.counters["torn_pushes"] += 1
        held = {w.lease.step for w in self.workers.values() if w.lease is not None}
        for step in [step for step in self.ledger.out if step not in held]:
            del self.ledger.out[step]

    def _synced(self, note: messages.Synced, now: float, out: effects.Output) -> None:
        if self.view is None or note.epoch != self.epoch:
            return
        place = self.view.shards[note.shard]
        if (place.backup, place.backup_boot, place.synced) == (note.backup, note.backup_boot, False):
            synced = messages.ShardView(place.primary, place.primary_boot, place.backup, place.backup_boot, True)
            self._change(now, out, shards=membership.put(self.view.shards, note.shard, synced))

    def _tick(self, message: messages.Tick, now: float, out: effects.Output) -> None:
        if self.view is None:
            return
        self._bury_workers(now, out)
        if self.settings.replicated:
            self._bury_servers(now, out)
        if now < self.retry_at:
            return
        self.retry_at = now + self.settings.timers.retry
        for number, place in enumerate(self.view.shards):
            if number not in self.acks:
                out.send(place.primary, self.view)
        if self._settled():
            self._repeat_commit(out)
            self._order_snapshots(out)
            self._order_reads(out)
            self._dispatch(now, out)
            if self._draining():
                self._revoke(out)

    def _bury_workers(self, now: float, out: effects.Output) -> None:
        timers = self.settings.timers
        for number in list(self.workers):
            life = self.lives[worker_name(number)]
            stuck = life.busy and now - life.progress_at > timers.stuck_after
            if now - life.seen_at > timers.dead_after or stuck:
                what = "makes no progress" if stuck else "is silent"
                out.do(effects.Warn(f"worker {number} {what}: its lease goes to another"))
                self._remove_worker(number, now, out)

    def _bury_servers(self, now: float, out: effects.Output) -> None:
        assert self.view is not None
        for number, place in enumerate(self.view.shards):
            if not place.backup:
                continue
            primary, backup = self._silence(place.primary, now), self._silence(place.backup, now)
            dead = self.settings.timers.dead_after
            # The survivor must have been heard of lately: with both silent it is the scheduler that is cut off, and
            # whoever it dropped now might be the only one left. It waits.
            if primary > dead and backup < dead / 2 and place.synced:
                self.counters["failovers"] += 1
                after = membership.without_primary(place)
            elif backup > dead and primary < dead / 2:
                after = membership.without_backup(place)
            else:
                continue
            out.do(effects.Warn(f"shard {number} is served by {after.primary} alone"))
            self._change(now, out, shards=membership.put(self.view.shards, number, after))

    def _silence(self, node: str, now: float) -> float:
        return now - self.lives[node].seen_at

    # Leases.

    def _ask(self, ask: messages.Ask, now: float, out: effects.Output) -> None:
        worker = self._worker(ask.worker, ask.incarnation)
        if worker is None or not worker.heard or ask.sequence < worker.finished:
            return
        if worker.lease is not None and ask.sequence < worker.sequence:
            self._grant(ask.worker, worker, out)  # the answer was lost
            return
        if worker.lease is not None:
            self.ledger.give_back(ask.worker, worker.lease)
            worker.lease = None
        worker.finished = worker.sequence = max(ask.sequence, worker.sequence)
        worker.idle = True
        self._dispatch(now, out)

    def _worker(self, number: int, incarnation: int) -> Worker | None:
        worker = self.workers.get(number)
        return worker if worker is not None and worker.incarnation == incarnation else None

    def _draining(self) -> bool:
        """Return True while no lease may go out: a snapshot is due, or the end."""
        return self._snapshot_due() or self._read_due() or self._ending()

    def _ending(self) -> bool:
        return bool(self.halted) or self.step >= self.settings.max_steps

    def _snapshot_due(self) -> bool:
        every = self.settings.snapshot_every
        passed = bool(every) and self.step // every > self.snapshot_at // every
        return passed or (bool(every) and self._ending() and self.snapshot_at < self.step)

    def _read_due(self) -> bool:
        passed = any(self.step // every > self.read_at // every for every in self.settings.read_every)
        return passed or (self._ending() and not self.read_last)

    def _quiet(self) -> bool:
        """Return True when no push can be on its way to a shard."""
        if isinstance(self.ledger, StepLedger):
            return self.last_commit is None
        return not self.ledger.out

    def _dispatch(self, now: float, out: effects.Output) -> None:
        """Hand out whatever may be handed out; with nothing out and something due, do that instead."""
        if not self._settled() or not all(worker.heard for worker in self.workers.values()):
            return
        if self._draining():
            if self._quiet():
                self._drained(now, out)
            return
        idle = [(w.seconds, number) for number, w in self.workers.items() if w.idle and not w.benched]
        for _, number in sorted(idle):
            lease = self.ledger.pick(number)
            if lease is None:
                break
            worker = self.workers[number]
            worker.idle, worker.lease, worker.granted_at = False, lease, now
            worker.sequence += 1
            self._grant(number, worker, out)
        if self._gated():
            self._bench(now, out)

    def _grant(self, number: int, worker: Worker, out: effects.Output) -> None:
        assert worker.lease is not None
        grant = messages.Grant(number, worker.incarnation, self.epoch, worker.sequence, worker.clock, worker.lease)
        out.send(worker_name(number), grant)

    def _bench(self, now: float, out: effects.Output) -> None:
        """Let nobody wait for the clock of a worker without a lease, and let it back in at the front."""
        assert isinstance(self.ledger, BatchLedger)
        assert self.view is not None
        work = self.ledger.next_step() is not None
        wrong = {number: w for number, w in self.workers.items() if w.idle and w.benched == work}
        if not wrong:
            return
        floor = self._front()
        members = self.view.members
        for number, worker in wrong.items():
            worker.benched = not work
            worker.clock = worker.clock if worker.benched else max(floor, worker.clock)
            bound = messages.BENCHED if worker.benched else worker.clock
            members = membership.with_member(members, messages.Member(number, worker.incarnation, bound))
        self._change(now, out, members=members)

    def _revoke(self, out: effects.Output) -> None:
        """Ask for the leases of workers that wait for a clock which will not move any more."""
        for number, worker in self.workers.items():
            if worker.lease is not None and isinstance(self.ledger, BatchLedger):
                out.send(worker_name(number), messages.Revoke(number, worker.incarnation, worker.sequence))

    def _done(self, done: messages.Done, now: float, out: effects.Output) -> None:
        worker = self._worker(done.worker, done.incarnation)
        if worker is None:
            return
        out.send(worker_name(done.worker), messages.DoneAck(done.worker, done.incarnation, done.sequence))
        if done.sequence <= worker.finished:
            return
        worker.seconds = now - worker.granted_at
        worker.sequence = max(worker.sequence, done.sequence)
        worker.finished, worker.lease = done.sequence, None
        worker.clock = max(worker.clock, done.clock + 1)
        contributor = Contributor(done.worker, done.incarnation, done.sequence, done.lease)
        if isinstance(self.ledger, StepLedger):
            self.ledger.finish(contributor, done.finite, done.metrics)
            self._decide(out)
        else:
            self._complete(contributor, done.metrics, out)
            self._note_nonfinite(done.finite)
        self._dispatch(now, out)

    def _complete(self, push: Contributor, metrics: tuple[messages.Metric, ...], out: effects.Output) -> None:
        assert isinstance(self.ledger, BatchLedger)
        if self.ledger.complete(push.lease.step):
            out.do(effects.Append(messages.CompleteRecord(push)))
            out.do(effects.Committed(self.step, push.lease.stop - push.lease.start, metrics))

    # Commits.

    def _decide(self, out: effects.Output) -> None:
        """Commit the step once every slice is staged everywhere."""
        assert isinstance(self.ledger, StepLedger)
        contributors = self.ledger.contributors()
        if contributors is None or self.last_commit is not None or self.halted:
            return
        record = messages.CommitRecord(self.step + 1, not self.ledger.finite(), contributors)
        out.do(effects.Append(record))
        examples = sum(c.lease.stop - c.lease.start for c in contributors)
        out.do(effects.Committed(record.step, examples, self.ledger.metrics()))
        self.ledger.advance()
        self.last_commit = record
        self._note_nonfinite(not record.skip)
        self.norms, self.norm_squared, self.committed = {}, None, set()
        if self._settled():
            self._repeat_commit(out)

    def _note_nonfinite(self, finite: bool) -> None:
        if not finite and self.settings.stop_on_nonfinite:
            self.halted = self.halted or "nonfinite"

    def _repeat_commit(self, out: effects.Output) -> None:
        record = self.last_commit
        if record is None or self.view is None:
            return
        for number, place in enumerate(self.view.shards):
            if number in self.committed:
                continue
            # A shard that has not summed yet ignores Finish, one that has ignores a second Commit's sum.
            commit = messages.Commit(self.epoch, number, record.step, record.skip, record.contributors)
            out.send(place.primary, commit)
            if self.norm_squared is not None:
                out.send(place.primary, messages.Finish(self.epoch, number, record.step, self.norm_squared))

    def _norms(self, norms: messages.Norms, now: float, out: effects.Output) -> None:
        if self.last_commit is None or norms.step != self.last_commit.step or self.norm_squared is not None:
            return
        self.norms[norms.shard] = norms.squares
        if len(self.norms) == self.settings.servers:
            # Written down, because a shard that finished cannot tell its share a second time.
            self.norm_squared = sum(sum(self.norms[number]) for number in sorted(self.norms))
            out.do(effects.Append(messages.NormRecord(self.norm_squared)))
            if self._settled():
                self._repeat_commit(out)

    def _commit_ack(self, ack: messages.CommitAck, now: float, out: effects.Output) -> None:
        if self.last_commit is None or ack.step < self.last_commit.step:
            return
        self.committed.add(ack.shard)
        if len(self.committed) == self.settings.servers:
            self.last_commit = None
            self._decide(out)
            self._dispatch(now, out)

    # Snapshots and the end.

    def _drained(self, now: float, out: effects.Output) -> None:
        """Nothing is under way: take the snapshot that is due, or end the run."""
        if self._snapshot_due():
            if not self.snapshotting:
                self.attempts += 1
                self.snapshotting = f"{self.step:010d}-{self.epoch}-{self.attempts}"
                self._order_snapshots(out)
        elif self._read_due():
            if not self.reading and not self.judging:
                self.attempts += 1
                self.reading = self.attempts
                self._order_reads(out)
        else:
            self._end(self.halted or "max_steps", out, now)

    def _order_reads(self, out: effects.Output) -> None:
        if not self.reading or self.view is None:
            return
        for number, place in enumerate(self.view.shards):
            if number not in self.answers:
                out.send(place.primary, messages.Read(self.epoch, number, self.reading))

    def _read_answer(self, answer: messages.ReadAnswer, now: float, out: effects.Output) -> None:
        if not self.reading or (answer.epoch, answer.number) != (self.epoch, self.reading):
            return
        self.answers[answer.shard] = answer
        if len(self.answers) < self.settings.servers:
            return
        answers = tuple(self.answers[number] for number in sorted(self.answers))
        out.do(effects.Cut(self.step, self._ending(), self.ledger.state(), answers))
        self.reading, self.answers, self.judging = 0, {}, True

    def _verdict(self, verdict: messages.Verdict, now: float, out: effects.Output) -> None:
        if not self.judging or verdict.step != self.step:
            return
        out.do(effects.Append(messages.VerdictRecord(verdict.step, verdict.end_reason)))
        self.judging, self.read_at, self.read_last = False, self.step, self._ending()
        if verdict.end_reason and not self._ending():
            # The params that were just looked at are the last ones.
            self.halted, self.read_last = verdict.end_reason, True
        self._dispatch(now, out)

    def _order_snapshots(self, out: effects.Output) -> None:
        if not self.snapshotting or self.view is None:
            return
        for number, place in enumerate(self.view.shards):
            if number not in self.snapshot_done:
                out.send(place.primary, messages.Snapshot(self.epoch, number, self.attempts, self.snapshotting))

    def _snapshot_written(self, done: messages.SnapshotDone, now: float, out: effects.Output) -> None:
        if not self.snapshotting or done.name != self.snapshotting:
            return
        if done.error:
            self._give_up_snapshot(f"{shard_file(done.name, done.shard)}: {done.error}", now, out)
            return
        self.snapshot_done[done.shard] = done
        if len(self.snapshot_done) == self.settings.servers:
            shards = tuple(
                messages.ManifestShard(n, shard_file(done.name, n), self.snapshot_done[n].checksum)
                for n in sorted(self.snapshot_done)
            )
            manifest = Manifest(done.name, self.step, self.incarnations, self.ledger.state(), shards)
            out.do(effects.Write(manifest_file(done.name), manifest))

    def _manifest_written(self, written: messages.Written, now: float, out: effects.Output) -> None:
        if not self.snapshotting or written.name != manifest_file(self.snapshotting):
            return
        if written.error:
            self._give_up_snapshot(f"{written.name}: {written.error}", now, out)
            return
        self.snapshot = (self.snapshotting, self.ledger.state())
        out.do(effects.Append(messages.SnapshotRecord(*self.snapshot)))
        self.snapshotting, self.snapshot_at, self.snapshot_done = "", self.step, {}
        self._dispatch(now, out)

    def _give_up_snapshot(self, why: str, now: float, out: effects.Output) -> None:
        """Train on without this snapshot; the next one is tried at its time."""
        out.do(effects.Warn(f"the snapshot of step {self.step} was not written ({why}); the one before stays in force"))
        self.snapshotting, self.snapshot_at, self.snapshot_done = "", self.step, {}
        self._dispatch(now, out)

    def _halt(self, halt: messages.Halt, now: float, out: effects.Output) -> None:
        self.halted = self.halted or halt.reason
        self._dispatch(now, out)

    def _end(self, reason: str, out: effects.Output, now: float, text: str = "") -> None:
        if text:
            out.do(effects.Warn(text))
        self.stop = messages.StopRecord(self.step, reason)
        out.do(effects.Append(self.stop))
        self.awaiting_stop = set(self._everybody())
        self.stopped_at = now
        self._send_stop(self.awaiting_stop, out)

    def _send_stop(self, nodes: Iterable[str], out: effects.Output) -> None:
        assert self.stop is not None
        for node in nodes:
            out.send(node, messages.Stop(self.stop.step, self.stop.reason))

    def _answer_stop(self, message: messages.Register | messages.Heartbeat, now: float, out: effects.Output) -> None:
        self._send_stop((message.node,), out)

    def _stop_ack(self, ack: messages.StopAck, now: float, out: effects.Output) -> None:
        self.awaiting_stop.discard(ack.node)

    def _stop_tick(self, message: messages.Tick, now: float, out: effects.Output) -> None:
        """Say it until everybody has heard it; who has been gone for long is not waited for."""
        assert self.stop is not None
        if self.exited:
            return
        if not self.awaiting_stop or now - self.stopped_at > LINGER * self.settings.timers.dead_after:
            self.exited = True
            out.do(effects.Exit(self.stop.step, self.stop.reason))
        elif now >= self.retry_at:
            self.retry_at = now + self.settings.timers.retry
            self._send_stop(self.awaiting_stop, out)


_ACTIONS: dict[type, Callable[..., None]] = {
    messages.Tick: Scheduler._tick,
    messages.Register: Scheduler._register,
    messages.Heartbeat: Scheduler._heartbeat,
    messages.ViewAck: Scheduler._view_ack,
    messages.Synced: Scheduler._synced,
    messages.Ask: Scheduler._ask,
    messages.Done: Scheduler._done,
    messages.Norms: Scheduler._norms,
    messages.CommitAck: Scheduler._commit_ack,
    messages.SnapshotDone: Scheduler._snapshot_written,
    messages.ReadAnswer: Scheduler._read_answer,
    messages.Written: Scheduler._manifest_written,
    messages.Verdict: Scheduler._verdict,
    messages.Halt: Scheduler._halt,
}
_STOPPED: dict[type, Callable[..., None]] = {
    messages.Tick: Scheduler._stop_tick,
    messages.Register: Scheduler._answer_stop,
    messages.Heartbeat: Scheduler._answer_stop,
    messages.StopAck: Scheduler._stop_ack,
}
