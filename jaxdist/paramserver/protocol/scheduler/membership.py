"""The scheduler's membership: who takes part is a view, every change of it a new epoch that all shards acknowledge."""

from jaxdist.paramserver.protocol import effects, journal, messages, succession
from jaxdist.paramserver.protocol.effects import Output
from jaxdist.paramserver.protocol.journal import LedgerState
from jaxdist.paramserver.protocol.messages import Contributor
from jaxdist.paramserver.protocol.scheduler import commits, ending, lease_table
from jaxdist.paramserver.protocol.scheduler.lease_table import StepLedger
from jaxdist.paramserver.protocol.scheduler.scheduler_state import Life, SchedulerState, Worker
from jaxdist.paramserver.protocol.settings import server_shard, worker_name, worker_number


def change(
    state: SchedulerState, now: float, out: Output, *, books: LedgerState | None = None, **changes: object
) -> None:
    """Move to the next epoch; `books` are those the run goes back to."""
    assert state.view is not None
    _announce(state, succession.next_view(state.view, **changes), books, out)


def _announce(state: SchedulerState, view: messages.View, books: LedgerState | None, out: Output) -> None:
    state.view = view
    state.forget_progress()
    boots = tuple(messages.Register(node, boot) for node, boot in state.boots.items())
    out.do(effects.Append(journal.ViewRecord(view, state.incarnations, boots, books)))
    for node in state.everybody():
        out.send(node, view)


def recover(state: SchedulerState, now: float, out: Output) -> None:
    """Come back after a restart: a new epoch, under which everybody says what they hold."""
    if state.view is None:
        return
    state.lives = {node: Life(boot, now, progress_at=now) for node, boot in state.boots.items()}
    state.workers = {}
    for member in state.view.members:
        benched = member.floor >= messages.BENCHED
        clock = 0 if benched else member.floor
        state.workers[member.worker] = Worker(member.incarnation, heard=False, benched=benched, clock=clock)
    state.awaiting_stop = set(state.everybody())
    state.stopped_at = now
    if state.stop is None:
        change(state, now, out)


# Those who come.


def on_register(state: SchedulerState, request: messages.Register, now: float, out: Output) -> None:
    """Take in a process that starts, or answer one that did not hear the answer."""
    known = state.boots.get(request.node, -1)
    if request.boot < known:
        return
    if request.boot == known and request.node in state.lives:
        _greet_again(state, request, out)
        return
    worker = worker_number(request.node)
    if worker is not None and state.view is None:
        return  # no server yet: it will ask again
    state.boots[request.node] = request.boot
    state.lives[request.node] = Life(request.boot, now, progress_at=now)
    if worker is not None:
        _worker_joins(state, request, worker, now, out)
    elif state.view is not None:
        _server_returns(state, request, now, out)
    elif all(node in state.boots for node in succession.server_nodes(state.settings)):
        name, books = state.snapshot
        shards = succession.first_shards(state.settings, state.boots)
        _announce(state, messages.View(1, (), shards, 1, name), books, out)


def _greet_again(state: SchedulerState, request: messages.Register, out: Output) -> None:
    worker = worker_number(request.node)
    if state.view is None:
        return
    if worker is None:
        out.send(request.node, state.view)
    elif worker in state.workers:
        incarnation = state.workers[worker].incarnation
        out.send(request.node, messages.Welcome(request.node, request.boot, incarnation, state.view))
    else:
        out.send(request.node, messages.Fenced(request.node, request.boot))


def _worker_joins(state: SchedulerState, request: messages.Register, worker: int, now: float, out: Output) -> None:
    assert state.view is not None
    _drop_worker(state, worker)
    state.incarnations += 1
    # Its first clock is decided when everybody's clock is known (leases), until then nobody waits for it.
    benched = state.gated()
    state.workers[worker] = Worker(state.incarnations, benched=benched)
    member = messages.Member(worker, state.incarnations, messages.BENCHED if benched else 0)
    change(state, now, out, members=succession.with_member(state.view.members, member))
    out.send(request.node, messages.Welcome(request.node, request.boot, state.incarnations, state.view))


def _server_returns(state: SchedulerState, request: messages.Register, now: float, out: Output) -> None:
    """Take in a server process that started anew: whatever it held is gone."""
    assert state.view is not None
    number = server_shard(request.node)
    assert number is not None
    place = state.view.shards[number]
    if place.primary == request.node:
        if not place.synced:
            _lost(state, number, request, now, out)
            return
        place = succession.without_primary(place)
        state.counters["failovers"] += 1
    place = succession.with_backup(place, request.node, request.boot)
    change(state, now, out, shards=succession.put(state.view.shards, number, place))


def _lost(state: SchedulerState, number: int, request: messages.Register, now: float, out: Output) -> None:
    """Go back, with no copy of a shard left, to the last snapshot, all shards and the books together."""
    assert state.view is not None
    if not state.settings.snapshot_every:
        out.do(effects.Warn(f"shard {number} was lost with {request.node}, and there is no snapshot"))
        ending.end(state, "error", now, out)
        return
    place = messages.ShardView(request.node, request.boot, *succession.NO_BACKUP, False)
    name, books = state.snapshot
    for worker in list(state.workers):
        _drop_worker(state, worker)
    state.ledger, state.last_commit = state.books(books), None
    state.snapshot_at = state.read_at = books.step
    state.read_last = False
    state.counters["rollbacks"] += 1
    out.do(effects.Warn(f"shard {number} was lost; all shards return to step {state.step}"))
    shards = succession.put(state.view.shards, number, place)
    restore = {"restore_epoch": state.epoch + 1, "restore": name}
    change(state, now, out, books=books, members=(), shards=shards, **restore)


# Those who stay.


def on_heartbeat(state: SchedulerState, beat: messages.Heartbeat, now: float, out: Output) -> bool:
    """Take note that a process is alive; return whether that told something a restarted scheduler waited for."""
    worker = worker_number(beat.node)
    life = state.lives.get(beat.node)
    if life is None or life.boot != beat.boot:
        if worker is not None and (life is None or life.boot < beat.boot):
            out.send(beat.node, messages.Fenced(beat.node, beat.boot))
        return False
    if worker is not None and worker not in state.workers:
        out.send(beat.node, messages.Fenced(beat.node, beat.boot))
        return False
    life.note(beat, now)
    if state.view is not None and beat.epoch < state.view.epoch:
        out.send(beat.node, state.view)
    elif worker is not None and not state.workers[worker].heard:
        _hear(state, worker, beat, now)
        return True
    return False


def _hear(state: SchedulerState, number: int, beat: messages.Heartbeat, now: float) -> None:
    """Learn, after a restart, what a worker holds."""
    worker = state.workers[number]
    worker.heard = True
    worker.sequence = max(worker.sequence, beat.sequence)
    worker.clock = max(worker.clock, beat.clock)
    if beat.lease is not None and beat.sequence > worker.finished:
        worker.lease, worker.granted_at = beat.lease, now
        state.ledger.hold(number, beat.lease)


def on_view_ack(state: SchedulerState, ack: messages.ViewAck, now: float, out: Output) -> bool:
    """Take note that a shard works under the view; return whether it was the last one."""
    place = state.view.shards[ack.shard] if state.view else None
    if place is None or ack.epoch != state.epoch or ack.node != place.primary or ack.shard in state.acks:
        return False
    state.acks[ack.shard] = ack
    if not state.settled():
        return False
    _settle(state, out)
    commits.repeat(state, out)
    return True


def _settle(state: SchedulerState, out: Output) -> None:
    """Decide what became of the last push of every worker that left: on all shards, on some, or on none."""
    if isinstance(state.ledger, StepLedger):
        return
    for (worker, incarnation, sequence, step), copies in _last_pushes(state).items():
        if state.ledger.is_done(step):
            continue
        if copies == state.settings.servers:
            lease = lease_table.lease(state.settings, step)
            commits.complete(state, Contributor(worker, incarnation, sequence, lease), (), out)
        elif (worker, incarnation, sequence) not in state.torn:
            state.torn.add((worker, incarnation, sequence))
            state.counters["torn_pushes"] += 1
    held = {w.lease.step for w in state.workers.values() if w.lease is not None}
    for step in [step for step in state.ledger.out if step not in held]:
        del state.ledger.out[step]


def _last_pushes(state: SchedulerState) -> dict[tuple[int, int, int, int], int]:
    """Return, for each (worker, incarnation, sequence, step) of workers that left, how many shards applied it."""
    last: dict[tuple[int, int, int, int], int] = {}
    for ack in state.acks.values():
        for row in ack.seen:
            if row.worker not in state.workers or state.workers[row.worker].incarnation != row.incarnation:
                key = (row.worker, row.incarnation, row.sequence, row.step)
                last[key] = last.get(key, 0) + 1
    return last


def on_synced(state: SchedulerState, note: messages.Synced, now: float, out: Output) -> None:
    """Take note that a backup holds everything, and may take over."""
    if state.view is None or note.epoch != state.epoch:
        return
    place = state.view.shards[note.shard]
    if (place.backup, place.backup_boot, place.synced) == (note.backup, note.backup_boot, False):
        synced = messages.ShardView(place.primary, place.primary_boot, place.backup, place.backup_boot, True)
        change(state, now, out, shards=succession.put(state.view.shards, note.shard, synced))


# Those who go.


def bury(state: SchedulerState, now: float, out: Output) -> None:
    """Go on without those who are silent, or busy without progress."""
    _bury_workers(state, now, out)
    if state.settings.replicated:
        _bury_servers(state, now, out)


def _bury_workers(state: SchedulerState, now: float, out: Output) -> None:
    timers = state.settings.timers
    for number in list(state.workers):
        life = state.lives[worker_name(number)]
        stuck = life.busy and now - life.progress_at > timers.stuck_after
        if now - life.seen_at > timers.dead_after or stuck:
            what = "makes no progress" if stuck else "is silent"
            out.do(effects.Warn(f"worker {number} {what}: its lease goes to another"))
            assert state.view is not None
            _drop_worker(state, number)
            change(state, now, out, members=tuple(m for m in state.view.members if m.worker != number))


def _drop_worker(state: SchedulerState, worker: int) -> None:
    gone = state.workers.pop(worker, None)
    if gone is None:
        return
    state.counters["fenced"] += 1
    # A batch that may be on some shards stays out until all of them said what they applied (_settle).
    if gone.lease is not None and isinstance(state.ledger, StepLedger):
        state.ledger.give_back(worker, gone.lease)


def _bury_servers(state: SchedulerState, now: float, out: Output) -> None:
    assert state.view is not None
    for number, place in enumerate(state.view.shards):
        if not place.backup:
            continue
        primary, backup = (now - state.lives[node].seen_at for node in (place.primary, place.backup))
        dead = state.settings.timers.dead_after
        # The survivor must have been heard of lately: with both silent it is the scheduler that is cut off, and
        # whoever it dropped now might be the only one left. It waits.
        if primary > dead and backup < dead / 2 and place.synced:
            state.counters["failovers"] += 1
            after = succession.without_primary(place)
        elif backup > dead and primary < dead / 2:
            after = succession.without_backup(place)
        else:
            continue
        out.do(effects.Warn(f"shard {number} is served by {after.primary} alone"))
        change(state, now, out, shards=succession.put(state.view.shards, number, after))
