"""The membership stage: every process that joins or leaves starts a new term, which all shards acknowledge."""

import math
from dataclasses import replace

from jaxdist.paramserver.protocol import effects, messages, succession
from jaxdist.paramserver.protocol.effects import Output
from jaxdist.paramserver.protocol.messages import Contributor, Trained
from jaxdist.paramserver.protocol.scheduler import commits, ending, lease_table
from jaxdist.paramserver.protocol.scheduler.lease_table import StepLeases
from jaxdist.paramserver.protocol.scheduler.scheduler_state import ProcessStatus, SchedulerState, WorkerStatus
from jaxdist.paramserver.protocol.settings import server_shard, worker_name, worker_number

PATIENCE = 6
"""How many times `dead_after` a process may be silent before its crew is asked to restart it."""
_NO_CUT = (
    "and there is no saved cut. --resume continues from the last checkpoint; ps.durability=replicated keeps a copy of "
    "each shard."
)


def change(
    state: SchedulerState, now: float, out: Output, *, trained: Trained | None = None, **changes: object
) -> None:
    """Begin the next term; `trained` is what the run rolls back to."""
    assert state.membership is not None
    _announce(state, succession.next_membership(state.membership, **changes), trained, out)


def _announce(state: SchedulerState, membership: messages.Membership, trained: Trained | None, out: Output) -> None:
    state.membership = membership
    state.forget_progress()
    out.do(effects.Append(state.membership_record(trained)))
    for name in state.all_names():
        out.send(name, seen_by(name, membership))


def seen_by(name: str, membership: messages.Membership) -> messages.Membership:
    """Return the part of a membership that a process needs: workers get no member list, which may be long."""
    return membership if worker_number(name) is None else replace(membership, members=())


def recover(state: SchedulerState, now: float, out: Output) -> None:
    """Begin a new term after a restart of the scheduler: in it, every process reports what it holds."""
    if state.membership is None:
        return
    state.processes = {name: ProcessStatus(boot, now, progress_at=now) for name, boot in state.boots.items()}
    state.workers = {}
    for member in state.membership.members:
        benched = member.floor >= messages.BENCHED
        clock = 0 if benched else member.floor
        state.workers[member.worker] = WorkerStatus(member.incarnation, benched=benched, clock=clock)
    state.idle, state.unreported = set(), set(state.workers)
    state.awaiting_stop = set(state.all_names())
    state.stopped_at = now
    if state.stop is None:
        change(state, now, out)


# Processes that join.


def on_register(state: SchedulerState, request: messages.Register, now: float, out: Output) -> None:
    """Let a process join, or repeat the answer to one that did not receive it."""
    known = state.boots.get(request.name, -1)
    if request.boot < known:
        _tell_newest(state, request, known, now, out)
        return
    if request.boot == known:
        _greet_again(state, request, now, out)
        return
    worker = worker_number(request.name)
    if worker is not None and (state.membership is None or request.boot < state.joining.get(worker, -1)):
        return  # the servers join first, and the worker repeats its request; or a late copy of an older request
    state.processes[request.name] = ProcessStatus(request.boot, now, progress_at=now)
    if worker is not None:
        state.joining[worker] = request.boot
        return
    state.boots[request.name] = request.boot
    if state.membership is not None:
        _server_returns(state, request, now, out)
    elif all(name in state.boots for name in succession.server_names(state.settings)):
        name, trained = state.saved_cut
        shards = succession.first_shards(state.settings, state.boots)
        _announce(state, messages.Membership(1, (), shards, 1, name), trained, out)


def note_missing(state: SchedulerState, now: float, out: Output) -> None:
    """Tell once which servers have not joined for long. They may be slow, so they are waited for, not restarted."""
    if state.missing_at is None:
        state.missing_at = now + state.settings.timers.stuck_after
    if now >= state.missing_at:
        state.missing_at = math.inf
        missing = [name for name in succession.server_names(state.settings) if name not in state.boots]
        out.do(effects.Warn(f"The run waits for servers that have not joined yet: {', '.join(missing)}."))


def _tell_newest(state: SchedulerState, request: messages.Register, newest: int, now: float, out: Output) -> None:
    """Let a process whose boot number is too small take a larger one, unless the start with the newest one lives.

    Boot numbers come from the wall clock: on another machine, or without the numbers of earlier starts, it may be
    behind.
    """
    if now - state.processes[request.name].seen_at > state.settings.timers.dead_after:
        out.send(request.name, messages.Fenced(request.name, request.boot, newest))


def _greet_again(state: SchedulerState, request: messages.Register, now: float, out: Output) -> None:
    """Answer once more; until it has an answer, a process sends no heartbeats, so that its requests stand for them."""
    worker, status = worker_number(request.name), state.processes[request.name]
    if status.boot != request.boot:
        return  # the next tick answers a newer start
    if worker is not None and worker not in state.workers:
        out.send(request.name, messages.Fenced(request.name, request.boot))
        return
    status.hear(now)
    if worker is not None:
        _welcome(state, worker, out)
    elif state.membership is not None:
        out.send(request.name, state.membership)


def _welcome(state: SchedulerState, worker: int, out: Output) -> None:
    assert state.membership is not None
    name = worker_name(worker)
    seen, incarnation = seen_by(name, state.membership), state.workers[worker].incarnation
    out.send(name, messages.Welcome(name, state.boots[name], incarnation, seen))


def admit(state: SchedulerState, now: float, out: Output) -> None:
    """Make the workers that registered since the last tick members, all in one new term."""
    if not state.joining:
        return
    assert state.membership is not None
    members = state.membership.members
    # Its first clock is set once all clocks are known (see leases._bench); until then no reader waits for it.
    benched = state.gated()
    joining, state.joining = dict(sorted(state.joining.items())), {}
    for worker, boot in joining.items():
        state.boots[worker_name(worker)] = boot
        _fence(state, worker)
        state.incarnations += 1
        state.workers[worker] = WorkerStatus(state.incarnations, benched=benched)
    new = {w: messages.Member(w, state.workers[w].incarnation, messages.BENCHED if benched else 0) for w in joining}
    change(state, now, out, members=succession.with_members(members, new))
    for worker in joining:
        _welcome(state, worker, out)


def _server_returns(state: SchedulerState, request: messages.Register, now: float, out: Output) -> None:
    """Let a restarted server process join again; its former state is lost."""
    assert state.membership is not None
    number = server_shard(request.name)
    assert number is not None
    place = state.membership.shards[number]
    if place.primary == request.name:
        if not place.synced:
            _lost(state, number, request, now, out)
            return
        place = succession.without_primary(place)
        state.counters["failovers"] += 1
    place = succession.with_backup(place, request.name, request.boot)
    change(state, now, out, shards=succession.put(state.membership.shards, number, place))


def _lost(state: SchedulerState, number: int, request: messages.Register, now: float, out: Output) -> None:
    """Return all shards and the lease table to the last saved cut: no copy of a shard is left."""
    assert state.membership is not None
    if not state.settings.snapshot_every:
        ending.fail(state, f"Shard {number} was lost with {request.name}, {_NO_CUT}", now, out)
        return
    place = messages.ShardPlace(request.name, request.boot, *succession.NO_BACKUP, False)
    name, trained = state.saved_cut
    for worker in list(state.workers):
        _fence(state, worker)
    state.lease_table, state.last_commit = state.make_lease_table(trained), None
    state.saved_at = state.read_at = trained.step
    state.read_last = False
    state.counters["rollbacks"] += 1
    out.do(effects.Warn(f"Shard {number} was lost. All shards return to step {state.step}."))
    shards = succession.put(state.membership.shards, number, place)
    restore = {"restore_term": state.term + 1, "restore": name}
    change(state, now, out, trained=trained, members=(), shards=shards, **restore)


# Processes that stay.


def on_heartbeat(state: SchedulerState, beat: messages.Heartbeat, now: float, out: Output) -> bool:
    """Note that a process is alive; return whether a restarted scheduler learned what it holds."""
    worker = worker_number(beat.name)
    status = state.processes.get(beat.name)
    if status is None or status.boot != beat.boot:
        if worker is not None and (status is None or status.boot < beat.boot):
            out.send(beat.name, messages.Fenced(beat.name, beat.boot))
        return False
    if worker is not None and worker not in state.workers:
        out.send(beat.name, messages.Fenced(beat.name, beat.boot))
        return False
    status.note(beat, now)
    if state.membership is not None and beat.term < state.membership.term:
        out.send(beat.name, seen_by(beat.name, state.membership))
    elif worker is not None and worker in state.unreported:
        _hear(state, worker, beat, now)
        return True
    return False


def _hear(state: SchedulerState, number: int, beat: messages.Heartbeat, now: float) -> None:
    """Note what a worker holds, after a restart of the scheduler."""
    worker = state.workers[number]
    state.unreported.discard(number)
    worker.sequence = max(worker.sequence, beat.sequence)
    worker.clock = max(worker.clock, beat.clock)
    if beat.lease is not None and beat.sequence > worker.finished:
        worker.lease, worker.granted_at = beat.lease, now
        state.idle.discard(number)  # a late report on an earlier lease, repeated since the restart, may have freed it
        state.lease_table.hold(number, beat.lease)


def on_membership_ack(state: SchedulerState, ack: messages.MembershipAck, now: float, out: Output) -> bool:
    """Note that a shard entered the term; return whether it was the last one."""
    place = state.membership.shards[ack.shard] if state.membership else None
    if place is None or ack.term != state.term or ack.name != place.primary or ack.shard in state.acks:
        return False
    state.acks[ack.shard] = ack
    if not state.settled():
        return False
    _settle(state, out)
    commits.repeat(state, out)
    return True


def _settle(state: SchedulerState, out: Output) -> None:
    """Find out whether the last push of every worker that left was applied on all shards, on some, or on none."""
    if isinstance(state.lease_table, StepLeases):
        return
    for (worker, incarnation, sequence, step), copies in _last_pushes(state).items():
        if state.lease_table.is_done(step):
            continue
        if copies == state.settings.servers:
            lease = lease_table.lease(state.settings, step)
            commits.complete(state, Contributor(worker, incarnation, sequence, lease), None, out)
        elif (worker, incarnation, sequence) not in state.torn:
            state.torn.add((worker, incarnation, sequence))
            state.counters["torn_pushes"] += 1
    held = {w.lease.step for w in state.workers.values() if w.lease is not None}
    for step in [step for step in state.lease_table.out if step not in held]:
        del state.lease_table.out[step]


def _last_pushes(state: SchedulerState) -> dict[tuple[int, int, int, int], int]:
    """Return how many shards applied each (worker, incarnation, sequence, step) of workers that left."""
    last: dict[tuple[int, int, int, int], int] = {}
    for ack in state.acks.values():
        for row in ack.seen:
            if row.worker not in state.workers or state.workers[row.worker].incarnation != row.incarnation:
                key = (row.worker, row.incarnation, row.sequence, row.step)
                last[key] = last.get(key, 0) + 1
    return last


def on_synced(state: SchedulerState, note: messages.Synced, now: float, out: Output) -> None:
    """Note that a backup holds everything and may take over."""
    if note.term != state.term:
        return
    assert state.membership is not None
    place = state.membership.shards[note.shard]
    if (place.backup, place.backup_boot, place.synced) == (note.backup, note.backup_boot, False):
        synced = messages.ShardPlace(place.primary, place.primary_boot, place.backup, place.backup_boot, True)
        change(state, now, out, shards=succession.put(state.membership.shards, note.shard, synced))


def on_diverged(state: SchedulerState, note: messages.Diverged, now: float, out: Output) -> None:
    """End the run: two copies of a shard differ, and it is unknown which one is right."""
    if state.boots.get(note.name) == note.boot:
        ending.fail(state, f"{note.reason} One of them was computed wrongly. The newest checkpoint is kept.", now, out)


# Processes that leave.


def on_leave(state: SchedulerState, note: messages.Leave, now: float, out: Output) -> None:
    """Continue without a worker that leaves, and tell it so, even if it is no member: it may not have joined yet."""
    worker = worker_number(note.name)
    if worker is None:
        return
    if state.joining.get(worker, note.boot + 1) <= note.boot:
        del state.joining[worker]
    if worker in state.workers and state.boots.get(note.name, -1) <= note.boot:
        assert state.membership is not None
        state.counters["left"] += 1
        _drop_worker(state, worker)
        change(state, now, out, members=tuple(m for m in state.membership.members if m.worker != worker))
    out.send(note.name, messages.Fenced(note.name, note.boot))


def on_died(state: SchedulerState, note: messages.Died, now: float, out: Output) -> None:
    """Continue at once without a process that has certainly ended, unless it has joined again already.

    The crew knows the boot number that the process started with. If the scheduler had given it a larger one, because
    its clock was behind, this note cannot be told from a late one on an earlier start, and silence shows its death.
    """
    if state.membership is None or state.boots.get(note.name, -1) > note.boot:
        return
    worker, shard = worker_number(note.name), server_shard(note.name)
    if note.name in state.processes:
        state.processes[note.name].replaced_at = now  # its crew starts it again
    if worker is not None:
        if state.joining.get(worker, note.boot + 1) <= note.boot:
            del state.joining[worker]
        if worker in state.workers:
            _fence(state, worker)
            change(state, now, out, members=tuple(m for m in state.membership.members if m.worker != worker))
    elif shard is not None:
        place = state.membership.shards[shard]
        if place.primary == note.name and place.synced:
            state.counters["failovers"] += 1
            after = succession.without_primary(place)
        elif place.backup == note.name:
            after = succession.without_backup(place)
        else:
            return  # the only copy: its process starts again, and the run returns to the saved cut
        change(state, now, out, shards=succession.put(state.membership.shards, shard, after))


def drop_silent(state: SchedulerState, now: float, out: Output) -> None:
    """Continue without the processes that are silent, or busy without progress."""
    _drop_silent_workers(state, now, out)
    if state.settings.replicated:
        _drop_silent_servers(state, now, out)
    _replace_silent_servers(state, now, out)
    _replace_dropped(state, now, out)


def _drop_silent_workers(state: SchedulerState, now: float, out: Output) -> None:
    timers = state.settings.timers
    gone = set()
    for number in list(state.workers):
        status = state.processes[worker_name(number)]
        stuck = status.busy and now - status.progress_at > timers.stuck_after
        if now - status.seen_at > timers.dead_after or stuck:
            what = "makes no progress" if stuck else "is silent"
            out.do(effects.Warn(f"Worker {number} {what}. Its lease goes to another worker."))
            _fence(state, number)
            gone.add(number)
            if stuck:  # it answers, so it would join again, but cannot compute
                _replace(status, worker_name(number), now, out)
    if gone:
        assert state.membership is not None
        change(state, now, out, members=tuple(m for m in state.membership.members if m.worker not in gone))


def _fence(state: SchedulerState, worker: int) -> None:
    """Drop a worker that did not say that it leaves."""
    state.counters["fenced"] += worker in state.workers
    _drop_worker(state, worker)


def _drop_worker(state: SchedulerState, worker: int) -> None:
    gone = state.workers.pop(worker, None)
    state.idle.discard(worker)
    state.unreported.discard(worker)
    if gone is None or not isinstance(state.lease_table, StepLeases):
        return  # a batch may be on some shards, and stays leased until all have reported what they applied (_settle)
    state.lease_table.leave(worker)
    if gone.lease is not None:
        state.lease_table.give_back(worker, gone.lease)


def _replace(status: ProcessStatus, name: str, now: float, out: Output) -> None:
    """Ask the crew of a process to restart it, once until the process is heard again."""
    status.replaced_at = now
    out.do(effects.Replace(name))


def _replace_dropped(state: SchedulerState, now: float, out: Output) -> None:
    """Have processes restarted that were dropped and stay silent: a stopped one does not come back by itself.

    Among them are those that left: a process that hangs before it has ended would keep its memory and its devices. Its
    crew only ends it, and has nothing to do for one that has ended.
    """
    limit = PATIENCE * state.settings.timers.dead_after
    late = [name for name, each in state.processes.items() if now - each.seen_at > limit and each.replaced_at is None]
    for name in sorted(set(late).difference(state.all_names() if late else ())):
        _replace(state.processes[name], name, now, out)


def _replace_silent_servers(state: SchedulerState, now: float, out: Output) -> None:
    """Restart the only copy of a shard, or end the run, if it has been silent for long.

    The wait is long because a server that was only paused continues by itself, and a restart loses its shard.
    """
    dead = state.settings.timers.dead_after
    for number, place in enumerate(state.membership.shards if state.membership else ()):
        status = state.processes[place.primary]
        silent = now - status.seen_at
        if place.synced or silent <= dead or state.stop is not None:
            continue
        if not status.warned:
            status.warned = True
            out.do(effects.Warn(f"Server {place.primary} is silent. It holds the only copy of shard {number}."))
        if silent <= PATIENCE * dead:
            continue
        if not state.settings.snapshot_every:
            ending.fail(state, f"Server {place.primary} was silent for {silent:.0f} s, {_NO_CUT}", now, out)
        elif status.replaced_at is None:
            out.do(effects.Warn(f"Server {place.primary} was silent for {silent:.0f} s. It is restarted."))
            _replace(status, place.primary, now, out)
        elif now - status.replaced_at > state.settings.timers.stuck_after:
            ending.fail(state, f"Server {place.primary} did not restart. Resume the run without its machine.", now, out)


def _drop_silent_servers(state: SchedulerState, now: float, out: Output) -> None:
    assert state.membership is not None
    for number, place in enumerate(state.membership.shards):
        if not place.backup:
            continue
        primary, backup = (now - state.processes[name].seen_at for name in (place.primary, place.backup))
        dead = state.settings.timers.dead_after
        # The other copy must have been heard recently. If both are silent, the scheduler itself is disconnected, and
        # the process it would drop might hold the only copy.
        if primary > dead and backup < dead / 2 and place.synced:
            state.counters["failovers"] += 1
            after = succession.without_primary(place)
        elif backup > dead and primary < dead / 2:
            after = succession.without_backup(place)
        else:
            continue
        out.do(effects.Warn(f"Shard {number} is served by {after.primary} only."))
        change(state, now, out, shards=succession.put(state.membership.shards, number, after))
