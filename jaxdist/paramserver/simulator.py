"""Simulates a whole run in one thread: seeded clock, network, disk and kills around the unchanged state machines.

All random numbers come from one generator, so a seed replays a run exactly. The network drops, repeats, reorders and
delays, and isolates processes; a disk write may be torn or lost when its process dies around the fsync; processes are
killed, paused (and continue with outdated state) and restarted. After `Faults.until` no fault happens any more, so the
run must end. The idea is that of FoundationDB's simulation (Zhou et al., 2021).
"""

import heapq
import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from jaxdist.paramserver.protocol import effects, journal, messages, succession
from jaxdist.paramserver.protocol.scheduler.scheduler import Scheduler
from jaxdist.paramserver.protocol.server import Server
from jaxdist.paramserver.protocol.settings import SCHEDULER, Settings, server_shard, worker_name, worker_number
from jaxdist.paramserver.protocol.shard import Shard, Updater
from jaxdist.paramserver.protocol.worker import Worker
from jaxdist.paramserver.wire import encoding

Gradient = Callable[[messages.Lease, tuple[tuple[np.ndarray, ...], ...]], messages.Computed]

TICK = 0.05
MOST_WAITING = 16
"""Capacity of the inbox of a process, as in the driver."""


@dataclass(frozen=True)
class Faults:
    """The faults until `until` (seconds); rates are per message, per append, or per second of the run.

    Attributes:
      until: afterwards no fault happens.
      drop: share of messages lost.
      repeat: share of messages delivered twice.
      slow: share of messages delayed by up to 0.3 s, and thereby overtaken.
      partitions: partitions a second; each isolates one process for up to 1 s.
      kills: kills a second.
      pauses: SIGSTOPs a second; each lasts up to 2 s.
      crash_at_append: share of log appends during which the process dies.
      disk_full: share of file writes that fail.
      busy: share of messages that take up to 0.3 s to handle; meanwhile others wait, and a due tick comes first.
      jumps: forward jumps of a process's clock, by up to 1,000 s, a second.
      slow_worker: how many times slower worker 0 computes.
    """

    until: float = 3.0
    drop: float = 0.0
    repeat: float = 0.0
    slow: float = 0.0
    partitions: float = 0.0
    kills: float = 0.0
    pauses: float = 0.0
    crash_at_append: float = 0.0
    disk_full: float = 0.0
    busy: float = 0.0
    jumps: float = 0.0
    slow_worker: float = 1.0


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened: an effect, a logged record, or a message that was received by `process`."""

    time: float
    process: str
    boot: int
    what: Any


@dataclass
class Roles:
    """The state machines a simulation runs; a test may plant a faulty one."""

    scheduler: Callable[..., Scheduler] = Scheduler
    server: Callable[..., Server] = Server
    worker: Callable[..., Worker] = Worker
    shard: Callable[..., Shard] = Shard


@dataclass(slots=True)
class _Process:
    name: str
    role: Any = None
    life: int = 0  # grows with every kill, so that actions scheduled before it are recognised
    paused_until: float = 0.0
    clock_ahead: float = 0.0
    backlog: list[messages.Message] = field(default_factory=list)
    exit: effects.Exit | None = None


class Stuck(AssertionError):
    """A run did not end although no fault happened any more."""


class _Died(Exception):
    """The process died during an effect."""


class Simulation:
    """One run. `run` simulates it to its end; `events` is the history for a checker."""

    def __init__(
        self,
        *,
        seed: int,
        settings: Settings,
        faults: Faults,
        params: tuple[tuple[np.ndarray, ...], ...],
        gradient: Gradient,
        make_updater: Callable[[], Updater],
        roles: Roles | None = None,
        compute_seconds: Callable[[random.Random, int], float] = lambda rng, worker: rng.uniform(0.02, 0.2),
        judge: Callable[[journal.Cut], str] = lambda cut: "",
    ) -> None:
        self.seed, self.settings, self.faults = seed, settings, faults
        self.params, self.gradient, self.make_updater = params, gradient, make_updater
        self.roles = roles or Roles()
        self.compute_seconds = compute_seconds
        self.judge = judge
        self.rng = random.Random(seed)
        self.now = 0.0
        self.queue: list[tuple[float, int, Callable[[], None]]] = []
        self.scheduled = 0
        self.boots = 0
        self.log = bytearray()
        self.files: dict[str, bytes] = {}
        self.events: list[Event] = []
        self.isolated: dict[str, float] = {}
        names = [SCHEDULER, *succession.server_names(settings), *map(worker_name, range(settings.workers))]
        self.processes = {name: _Process(name) for name in names}

    # Running.

    def run(self, *, patience: float = 60.0) -> "Simulation":
        """Run until every process has exited.

        Raises:
          Stuck: this did not happen within `patience` seconds after the last fault.
        """
        for name in self.processes:
            self._at(self.rng.uniform(0.0, 0.1), lambda name=name: self._boot(name))  # type: ignore[misc]
        self._plan(self.faults.partitions, self._partition)
        self._plan(self.faults.kills, self._kill_one)
        self._plan(self.faults.pauses, self._pause_one)
        self._plan(self.faults.jumps, self._jump)
        deadline = self.faults.until + patience
        while self.queue and not all(process.exit for process in self.processes.values()):
            self.now, _, action = heapq.heappop(self.queue)
            if self.now > deadline:
                left = {name: _brief(p.role) for name, p in self.processes.items() if not p.exit}
                raise Stuck(f"These processes have not ended at {self.now:.1f} s: {left}.")
            action()
        return self

    def _at(self, delay: float, action: Callable[[], None]) -> None:
        self.scheduled += 1
        heapq.heappush(self.queue, (self.now + delay, self.scheduled, action))

    def _plan(self, rate: float, action: Callable[[], None]) -> None:
        time = 0.0
        while rate and (time := time + self.rng.expovariate(rate)) < self.faults.until:
            self._at(time, action)

    @property
    def _troubled(self) -> bool:
        return self.now < self.faults.until

    # Processes.

    def _boot(self, name: str) -> None:
        process = self.processes[name]
        self.boots += 1
        boot = self.boots * 1000  # room for the boot numbers of a process that rejoins
        process.life += 1
        process.backlog = []
        process.paused_until = 0.0
        process.role = self._make(name, boot)
        life = process.life
        self._at(self.rng.uniform(0, TICK), lambda: self._tick(process, life))

    def _make(self, name: str, boot: int) -> Any:
        if name == SCHEDULER:
            records = [encoding.decode(payload) for payload in encoding.unframe(bytes(self.log))]
            # An incomplete record is removed before anything is appended after it.
            self.log = bytearray(b"".join(encoding.frame(encoding.to_bytes(record)) for record in records))
            return self.roles.scheduler(settings=self.settings, records=records)
        worker = worker_number(name)
        if worker is not None:
            return self.roles.worker(worker=worker, boot=boot, settings=self.settings)
        number = server_shard(name)
        assert number is not None
        return self.roles.server(
            name=name, boot=boot, settings=self.settings, make_shard=lambda: self._make_shard(number)
        )

    def _make_shard(self, number: int) -> Shard:
        return self.roles.shard(
            shard=number, settings=self.settings, updater=self.make_updater(), params=self.params[number]
        )

    def _tick(self, process: _Process, life: int) -> None:
        if process.life != life or process.exit:
            return
        if process.paused_until <= self.now:
            self._feed(process, messages.Tick())
        self._at(TICK, lambda: self._tick(process, life))

    def _kill(self, process: _Process) -> None:
        process.life += 1
        self._tell_death(process)
        process.role = None
        self._at(self.rng.uniform(0.05, 0.8), lambda: self._boot(process.name))

    def _tell_death(self, process: _Process) -> None:
        """Let the crew tell the scheduler of every other death, as far as it saw which process it was."""
        boot = getattr(process.role, "boot", None)
        if boot is not None and process.life % 2:
            self._at(TICK, lambda: self._deliver(SCHEDULER, messages.Died(process.name, boot)))

    def _victims(self) -> list[_Process]:
        """Return the processes that may be killed or paused without breaking a promise of this durability."""
        alive = [p for p in self.processes.values() if p.role is not None and not p.exit]
        victims = [p for p in alive if p.paused_until <= self.now]
        s = self.settings
        # With saved cuts the promise is a rollback, however many copies of a shard are lost at once.
        rollback = s.durability == "snapshot" or (bool(s.snapshot_every) and self.rng.random() < 0.3)
        if not rollback and (s.durability == "none" or not self._servers_whole()):
            return [p for p in victims if server_shard(p.name) is None]
        return victims

    def _servers_whole(self) -> bool:
        """Return whether the loss of any one server loses nothing: every shard has two full copies."""
        if not self.settings.replicated:
            return True
        role = self.processes[SCHEDULER].role
        if role is None or role.state.membership is None or not all(p.synced for p in role.state.membership.shards):
            return False
        state = role.state
        boots = {name: b for p in state.membership.shards for name, b in _both(p)}
        servers = [p for p in self.processes.values() if server_shard(p.name) is not None]
        return all(
            p.role is not None
            and p.paused_until <= self.now
            and p.name in state.processes
            and self.now - state.processes[p.name].seen_at < self.settings.timers.dead_after / 2
            and boots.get(p.name) == p.role.boot
            and p.role.term == state.membership.term
            for p in servers
        )

    def _kill_one(self) -> None:
        victims = self._victims()
        if victims:
            self._kill(self.rng.choice(victims))

    def _pause_one(self) -> None:
        victims = self._victims()
        if victims:
            self._pause(self.rng.choice(victims), self.rng.uniform(0.1, 2.0))

    def _pause(self, process: _Process, seconds: float) -> None:
        process.paused_until = self.now + seconds
        life = process.life
        self._at(seconds + 1e-6, lambda: self._wake(process, life))

    def _jump(self) -> None:
        self.rng.choice(list(self.processes.values())).clock_ahead += self.rng.uniform(0.0, 1000.0)

    def _wake(self, process: _Process, life: int) -> None:
        if process.life != life or process.paused_until > self.now:
            return
        # As in the driver: a tick that is due comes before the messages that wait.
        backlog, process.backlog = [messages.Tick(), *process.backlog], []
        while backlog and process.life == life and process.paused_until <= self.now:
            self._feed(process, backlog.pop(0))
        if process.life == life:
            process.backlog = backlog + process.backlog

    def _partition(self) -> None:
        name = self.rng.choice(list(self.processes))
        self.isolated[name] = self.now + self.rng.uniform(0.1, 1.0)

    # The network.

    def _send(self, source: str, to: str, message: messages.Message) -> None:
        faults, rng = self.faults, self.rng
        copies = 1
        if self._troubled:
            if max(self.isolated.get(source, 0.0), self.isolated.get(to, 0.0)) > self.now:
                return
            if rng.random() < faults.drop:
                return
            copies += rng.random() < faults.repeat
            if rng.random() < 0.02:  # a message must survive its encoding
                message = encoding.decode(encoding.to_bytes(message))
        for _ in range(copies):
            delay = rng.uniform(0.001, 0.005)
            if self._troubled and rng.random() < faults.slow:
                delay += rng.uniform(0.0, 0.3)
            self._at(delay, lambda: self._deliver(to, message))

    def _deliver(self, to: str, message: messages.Message) -> None:
        process = self.processes[to]
        if process.role is None:
            return
        if process.paused_until > self.now and len(process.backlog) >= MOST_WAITING:
            self._at(0.01, lambda: self._deliver(to, message))  # it waits in the network
        elif process.paused_until > self.now:
            process.backlog.append(message)
        else:
            self._feed(process, message)

    # Effects.

    def _feed(self, process: _Process, message: messages.Message) -> None:
        if process.role is None:
            return
        if type(message) in _HEARD:
            self._note(process, message)
        replies, todo = process.role.handle(message, self.now + process.clock_ahead)
        try:
            for effect in todo:
                _DO.get(type(effect), Simulation._note)(self, process, effect)
        except _Died:
            self._kill(process)
            return
        for to, reply in replies:
            self._send(process.name, to, reply)
        if self._troubled and self.faults.busy and self.rng.random() < self.faults.busy and not process.exit:
            self._pause(process, self.rng.uniform(0.0, 0.3))

    def _note(self, process: _Process, what: Any) -> None:
        self.events.append(Event(self.now, process.name, getattr(process.role, "boot", 0), what))

    def _append(self, process: _Process, effect: effects.Append) -> None:
        data = encoding.frame(encoding.to_bytes(effect.record))
        crash = self._troubled and self.rng.random() < self.faults.crash_at_append
        if crash and self.rng.random() < 0.7:
            self.log += data[: self.rng.randrange(len(data))]  # before the fsync: any part may have reached the disk
            raise _Died
        self.log += data
        self._note(process, effect.record)
        if crash:
            raise _Died

    def _compact(self, process: _Process, effect: effects.Compact) -> None:
        crash = self._troubled and self.rng.random() < self.faults.crash_at_append
        if crash and self.rng.random() < 0.5:
            raise _Died  # before the rename: the log is still the old one
        self.log = bytearray(encoding.frame(encoding.to_bytes(effect.record)))
        if crash:
            raise _Died

    def _write(self, process: _Process, effect: effects.Write) -> None:
        data = encoding.to_bytes(effect.content)
        full = self._troubled and self.rng.random() < self.faults.disk_full
        life = process.life

        def finish() -> None:
            alive = process.life == life
            # A process that died meanwhile may have renamed the file, or not.
            if full or (not alive and self.rng.random() < 0.5):
                error = "no space left on device"
            else:
                error = ""
                self.files[effect.name] = data
                self._note(process, ("durable", effect.name, effect.content))
            if alive:
                self._deliver(process.name, messages.Written(effect.name, zlib.crc32(data), error))

        self._at(self.rng.uniform(0.001, 0.05), finish)

    def _load(self, process: _Process, effect: effects.Load) -> None:
        life = process.life

        def finish() -> None:
            if process.life == life:
                data = self.files.get(effect.name)
                content = None if data is None else encoding.decode(data)
                self._deliver(process.name, messages.Loaded(effect.name, content))

        self._at(self.rng.uniform(0.001, 0.02), finish)

    def _compute(self, process: _Process, effect: effects.Compute) -> None:
        life = process.life
        worker = worker_number(process.name)
        assert worker is not None
        seconds = self.compute_seconds(self.rng, worker) * (self.faults.slow_worker if worker == 0 else 1.0)
        computed = self.gradient(effect.lease, effect.params)
        answer = replace(computed, incarnation=effect.incarnation, sequence=effect.sequence)

        def finish() -> None:
            if process.life == life:
                self._deliver(process.name, answer)

        self._at(seconds, finish)

    def _show_cut(self, process: _Process, effect: effects.ShowCut) -> None:
        self._note(process, effect)
        life = process.life
        verdict = messages.Verdict(effect.cut.step, self.judge(effect.cut))

        def finish() -> None:
            if process.life == life:
                self._deliver(process.name, verdict)

        self._at(self.rng.uniform(0.0, 0.05), finish)

    def _replace(self, process: _Process, effect: effects.Replace) -> None:
        self._note(process, effect)
        self._kill(self.processes[effect.name])

    def _exit(self, process: _Process, effect: effects.Exit) -> None:
        self._note(process, effect)
        process.exit = effect


def _both(place: messages.ShardPlace) -> tuple[tuple[str, int], tuple[str, int]]:
    return (place.primary, place.primary_boot), (place.backup, place.backup_boot)


def _brief(role: Any) -> dict[str, Any]:
    known = getattr(role, "state", role)
    names = ("phase", "term", "step", "primary", "incarnation", "lease", "workers", "acks", "membership")
    return {name: getattr(known, name) for name in names if hasattr(known, name)}


_HEARD = (messages.PushAck, messages.CommitAck)
_DO: dict[type, Callable[..., None]] = {
    effects.Append: Simulation._append,
    effects.Compact: Simulation._compact,
    effects.Write: Simulation._write,
    effects.Load: Simulation._load,
    effects.Compute: Simulation._compute,
    effects.Exit: Simulation._exit,
    effects.ShowCut: Simulation._show_cut,
    effects.Replace: Simulation._replace,
}
