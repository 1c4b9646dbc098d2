"""A whole run in one thread: the drivers of production around the unchanged state machines, in a seeded world.

All random numbers come from one generator, so a seed replays a run exactly. Messages take time and are lost, repeated,
delayed and reordered; connections fail, processes are isolated, stopped, killed and started again, are occupied, and
have clocks that jump; disks are slow, full, or written in part. After `Faults.until` no fault happens any more, so the
run must end. The idea is that of FoundationDB's simulation (Zhou et al., 2021).
"""

import functools
import math
import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxdist.paramserver.processes.crew import GRACE_SECONDS
from jaxdist.paramserver.processes.driver import Driver
from jaxdist.paramserver.processes.run_folder import BOOT_ROOM, newer_boot
from jaxdist.paramserver.protocol import effects, journal, messages, succession
from jaxdist.paramserver.protocol.reader import Reader
from jaxdist.paramserver.protocol.scheduler.scheduler import Scheduler
from jaxdist.paramserver.protocol.server import Server
from jaxdist.paramserver.protocol.settings import (
    OBSERVER,
    SCHEDULER,
    Settings,
    server_shard,
    worker_name,
    worker_number,
)
from jaxdist.paramserver.protocol.shard import Shard, Updater
from jaxdist.paramserver.protocol.worker import Worker
from jaxdist.paramserver.simulator import simulated_world as world
from jaxdist.paramserver.simulator.fault_rates import FAST, Faults, Hardware
from jaxdist.paramserver.simulator.seeded_time import SeededTime
from jaxdist.paramserver.simulator.simulated_disk import Death, Disk
from jaxdist.paramserver.simulator.simulated_network import Network
from jaxdist.paramserver.simulator.simulated_world import SimulatedProcess, SimulatedWorld
from jaxdist.paramserver.wire.outbox import Outbox

Gradient = Callable[[messages.Lease, tuple[tuple[np.ndarray, ...], ...]], messages.Computed]

STARTED_AT = 1_790_000_000.0
"""What the wall clock shows when a run begins: boot numbers are made from it."""
_ASK_AGAIN_SECONDS = 0.3


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened: an effect, a logged record, or a message that was received by `process`."""

    time: float
    process: str
    boot: int
    what: Any


@dataclass
class Roles:
    """What a simulation runs; a test may plant a faulty one."""

    scheduler: Callable[..., Scheduler] = Scheduler
    server: Callable[..., Server] = Server
    worker: Callable[..., Worker] = Worker
    reader: Callable[..., Reader] = Reader
    shard: Callable[..., Shard] = Shard
    driver: Callable[..., Driver] = Driver
    outbox: Callable[..., Outbox] = Outbox
    boot: Callable[[int, int], int] = newer_boot


class Stuck(AssertionError):
    """A run did not end although no fault happened any more."""


class Simulation:
    """One run. `run` simulates it to its end; `events` is the history for a checker.

    Before `max_steps`, the observer ends it with a signal at `halt_at` seconds, or at its first cut from `target_step`.
    """

    def __init__(
        self,
        *,
        seed: int,
        settings: Settings,
        faults: Faults,
        params: tuple[tuple[np.ndarray, ...], ...],
        gradient: Gradient,
        make_updater: Callable[[], Updater],
        hardware: Hardware = FAST,
        roles: Roles | None = None,
        compute_seconds: Callable[[random.Random, int], float] = lambda rng, worker: rng.uniform(0.02, 0.2),
        halt_at: float = math.inf,
        target_step: float = math.inf,
    ) -> None:
        self.seed, self.settings, self.faults, self.hardware = seed, settings, faults, hardware
        self.params, self.gradient, self.make_updater = params, gradient, make_updater
        self.roles = roles or Roles()
        self.compute_seconds = compute_seconds
        self.halt_at, self.target_step = halt_at, target_step
        self.timeline = SeededTime(seed)
        self.rng = self.timeline.rng
        self.events: list[Event] = []
        self._heard_at: dict[str, float] = {}  # when the last heartbeat of a process reached the scheduler
        self._heard_boot: dict[str, int] = {}
        self.disk = Disk(self.timeline, faults, hardware)
        names = [SCHEDULER, OBSERVER, *succession.server_names(settings), *map(worker_name, range(settings.workers))]
        self.processes = {name: SimulatedProcess(name, self) for name in names}
        self._next_worker = settings.workers
        self.network = Network(self.timeline, faults, hardware, self.processes, self.note, self.roles.outbox)

    @property
    def now(self) -> float:
        """The simulated time in seconds."""
        return self.timeline.now

    @property
    def troubled(self) -> bool:
        """Whether faults happen now."""
        return self.timeline.now < self.faults.until

    # Running.

    def run(self, *, patience: float = 60.0) -> "Simulation":
        """Run until every process has exited.

        Raises:
          Stuck: this did not happen within `patience` seconds after the last fault.
        """
        for name in self.processes:
            self._boot_soon(name)
        self._plan_faults()
        if self.halt_at < math.inf:
            self.timeline.at(self.halt_at, self._halt)
        deadline = self.faults.until + patience
        while not all(process.exit for process in self.processes.values()):
            if not self.timeline.step() or self.now > deadline:
                left = {name: _brief(p.machine) for name, p in self.processes.items() if not p.exit}
                raise Stuck(f"These processes have not ended at {self.now:.1f} s: {left}.")
        return self

    def _plan_faults(self) -> None:
        often = functools.partial(self.timeline.often, until=self.faults.until)
        often(self.faults.partitions, action=self._partition)
        often(self.faults.kills, action=lambda: self._to_one(self.kill))
        often(self.faults.pauses, action=lambda: self._to_one(lambda p: p.pause(self.rng.uniform(0.1, 2.0))))
        often(self.faults.breaks, action=self.network.break_one)
        often(self.faults.jumps, action=self._jump)
        often(self.faults.joins, action=self._join)
        often(self.faults.leaves, action=self._leave)
        if self.faults.vanish and self.rng.random() < self.faults.vanish:
            self.timeline.at(self.rng.uniform(0.2, 1.0) * self.faults.until, self._vanish)

    # Processes.

    def _boot_soon(self, name: str) -> None:
        self.timeline.at(self.rng.uniform(0.0, 0.1), functools.partial(self._boot, name))

    def _boot(self, name: str) -> None:
        process = self.processes[name]
        if process.exit is not None:
            return
        wall = int((STARTED_AT + self.now + process.wall_ahead) * 1e9)
        boot = self.disk.boots[name] = self.roles.boot(wall, self.disk.boots.get(name, 0))
        machine = self._make(name, boot)
        process.start(
            self.roles.driver(
                machine,
                SimulatedWorld(process, self),
                observe=functools.partial(self._observe, process),
                pulse_seconds=world.PULSE_SECONDS,
                point=functools.partial(self._point, process),
            )
        )

    def _make(self, name: str, boot: int) -> Any:
        if name == SCHEDULER:
            return self.roles.scheduler(settings=self.settings, records=self.disk.records())
        if name == OBSERVER:
            return self.roles.reader(self.settings.timers.retry)
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

    def kill(self, process: SimulatedProcess) -> None:
        """Kill a process; its crew starts it again."""
        boots = self.disk.boots.get(process.name, 0) + BOOT_ROOM - 1
        process.die()
        self.network.forget(process.name)
        if process.life % 2 and process.name != SCHEDULER:  # the crew sees every other death
            died = messages.Died(process.name, boots)
            self.timeline.at(world.PULSE_SECONDS, lambda: self._tell(died))
        if process.retiring:  # its crew does not start it again
            process.exit = effects.Exit(0, effects.LEFT)
            self.note(process.name, Ended())
            self._tell(messages.Died(process.name, boots))
            return
        if self.troubled and self.faults.lost_disk and self.rng.random() < self.faults.lost_disk:
            self.disk.boots.pop(process.name, None)
        self.timeline.at(self.rng.uniform(0.05, 0.8), functools.partial(self._boot, process.name))

    died = kill

    def _tell(self, message: messages.Message) -> None:
        if self.processes[SCHEDULER].is_up():
            self.processes[SCHEDULER].receive(message, lambda: None)

    def _to_one(self, action: Callable[[SimulatedProcess], None]) -> None:
        victims = self._victims()
        if victims:
            action(self.rng.choice(victims))

    def _victims(self) -> list[SimulatedProcess]:
        """Return the processes that may be killed or paused without breaking a promise of this durability.

        The run ends with its observer.
        """
        victims = [p for p in self.processes.values() if p.is_reading() and not p.vanished and p.name != OBSERVER]
        s = self.settings
        # With saved cuts the promise is a rollback, however many copies of a shard are lost at once.
        rollback = s.durability == "snapshot" or (bool(s.snapshot_every) and self.rng.random() < 0.3)
        if not rollback and (s.durability == "none" or not self._servers_whole()):
            return [p for p in victims if server_shard(p.name) is None]
        return victims

    def _servers_whole(self) -> bool:
        """Return whether the loss of any one server loses nothing: every shard has two full copies.

        A copy that the scheduler has not heard for a while counts as lost: it may be about to be dropped for the other.
        """
        if not self.settings.replicated:
            return True
        scheduler = self.processes[SCHEDULER].machine
        state = None if scheduler is None else scheduler.state
        if state is None or state.membership is None or not all(place.synced for place in state.membership.shards):
            return False
        boots = {name: boot for place in state.membership.shards for name, boot in _both(place)}
        servers = [p for p in self.processes.values() if server_shard(p.name) is not None]
        recent = self.now - self.settings.timers.dead_after / 2
        return all(
            p.is_reading()
            and self._heard_at.get(p.name, 0.0) > recent
            and p.name in state.processes
            and boots.get(p.name) == p.machine.boot
            and p.machine.term == state.membership.term
            for p in servers
        )

    # Workers that join and leave.

    def _join(self) -> None:
        """Start one more worker, unless the run is over; a number is never used again."""
        if self.processes[SCHEDULER].exit:
            return
        name = worker_name(self._next_worker)
        self._next_worker += 1
        self.processes[name] = SimulatedProcess(name, self)
        self._boot_soon(name)

    def _leave(self) -> None:
        """Ask a worker to leave; when it is the last one, another joins a while later."""
        there = [
            process
            for name, process in self.processes.items()
            if worker_number(name) is not None and not process.exit and not process.retiring
        ]
        if not there:
            return
        if len(there) == 1:
            self.timeline.at(self.rng.uniform(0.0, 1.0), self._join)
        leaver = self.rng.choice(there)
        leaver.retiring = True
        self.note(leaver.name, AskedToLeave())
        self._retire(leaver)

    def _retire(self, leaver: SimulatedProcess) -> None:
        """Signal a worker that is asked to leave, again and again: one that starts may not have heard it."""
        if leaver.exit is None:
            if leaver.is_up():
                leaver.receive(messages.Retire(), lambda: None)
            self.timeline.at(_ASK_AGAIN_SECONDS, functools.partial(self._retire, leaver))

    # Faults.

    def _jump(self) -> None:
        process, rng = self.rng.choice(list(self.processes.values())), self.rng
        farthest = world.FARTHEST_JUMP
        kind = rng.choice(["forward", "backward", "still"])
        if kind == "still":
            process.clock.set(self.now, rate=0.0)
            self.timeline.at(rng.uniform(0.1, world.LONGEST_STANDSTILL), lambda: process.clock.set(self.now))
            return
        jump = rng.uniform(0.0, farthest) if kind == "forward" else -rng.uniform(0.0, farthest)
        process.clock.set(self.now, jump=jump, rate=process.clock.rate)
        process.wall_ahead += jump

    def _partition(self) -> None:
        name = self.rng.choice(list(self.processes))
        self.network.isolate(name, self.rng.uniform(0.1, 1.0), breaks=self.rng.random() < 0.5)

    def _vanish(self) -> None:
        if not any(isinstance(event.what, journal.MembershipRecord) for event in self.events):
            # One that never joined cannot be told from one that starts slowly, and is waited for.
            self.timeline.at(0.1, self._vanish)
            return
        others = [p for p in self.processes.values() if p.is_up() and p.name not in (SCHEDULER, OBSERVER)]
        joined = [p for p in others if self._heard_boot.get(p.name) == p.machine.boot]
        every = [p for p in self._victims() if p in joined] or joined
        if every:
            process = self.rng.choice(every)
            self.note(process.name, Vanished())
            process.vanished = True
            process.pause(1e9)

    def _point(self, process: SimulatedProcess, verb: str, what: Any) -> int:
        """Let a process die, or be occupied, at a point of its driver."""
        if verb == "hear":
            self._occupy(process, what)
            if type(what) in _HEARD:
                self.note(process.name, what)
        crash = self.troubled and self.faults.crash and self.rng.random() < self.faults.crash
        if crash and process in self._victims():
            raise Death
        return 1

    def _occupy(self, process: SimulatedProcess, what: Any) -> None:
        base, a_byte = self.hardware.handle_seconds
        if base or a_byte:
            pieces = getattr(what, "pieces", ())
            size = sum(getattr(piece, "nbytes", 0) for piece in pieces)
            process.spend(base + a_byte * size)
        if self.troubled and self.faults.busy and self.rng.random() < self.faults.busy:
            process.spend(self.rng.uniform(0.0, world.LONGEST_HANDLING))

    def _end_rest(self) -> None:
        """Do what the crew does after the end of the run."""
        for process in self.processes.values():
            if process.exit is None:
                self.note(process.name, Ended())
                process.die()
                process.exit = self.processes[SCHEDULER].exit

    # What processes ask for.

    def note(self, process: str, what: Any) -> None:
        """Keep an event for the checker."""
        if isinstance(what, world.Waits) and process == SCHEDULER:
            self._heard_at[what.message.name] = self.now
            self._heard_boot[what.message.name] = what.message.boot
        self.events.append(Event(self.now, process, getattr(self.processes[process].machine, "boot", 0), what))

    def computed(self, effect: effects.Compute, worker: int) -> tuple[messages.Computed, float]:
        """Return a gradient, and how long it takes."""
        seconds = self.compute_seconds(self.rng, worker) * (self.faults.slow_worker if worker == 0 else 1.0)
        return self.gradient(effect.lease, effect.params), seconds

    def _observe(self, process: SimulatedProcess, effect: effects.Effect) -> None:
        if not isinstance(effect, _SILENT):
            self.note(process.name, effect)
        if isinstance(effect, effects.Applied) and process.machine.shard.chain == effect.after:
            shard = process.machine.shard
            self.note(process.name, State(shard.shard, shard.chain, _checksum(shard.params, shard.opt_state)))
        if isinstance(effect, effects.Offered | effects.CutRead):
            self._judge(process, effect)
        elif isinstance(effect, effects.Exit) and process.name == SCHEDULER:
            self.timeline.at(GRACE_SECONDS, self._end_rest)
        elif isinstance(effect, effects.Replace):
            replaced = self.processes[effect.name]
            self.timeline.at(0.0, lambda: self.kill(replaced) if not replaced.exit else None)

    def _halt(self) -> None:
        """Tell the scheduler that the run is to end, again and again."""
        if self.processes[OBSERVER].is_reading():
            self.network.send(OBSERVER, SCHEDULER, messages.Halt("preempted"))
        if not self.processes[SCHEDULER].exit:
            self.timeline.at(_ASK_AGAIN_SECONDS, self._halt)

    def _end_reason(self, offer: messages.Offer) -> str:
        """Return why the observer ends the run with this cut; "" if it continues."""
        if offer.step >= self.target_step:
            return "target_reached"
        return offer.end_reason or ("preempted" if self.now >= self.halt_at else "")

    def _judge(self, observer: SimulatedProcess, shown: effects.Offered | effects.CutRead) -> None:
        """Do what an observer does: read what it needs of a cut, in one or two turns, and come to a verdict."""
        assert observer.driver is not None
        observer.spend(self.rng.uniform(0.0, 0.05))
        has_params = isinstance(shown, effects.CutRead)
        has_all = isinstance(shown, effects.CutRead) and bool(shown.opt_state)
        offer = shown.offer
        answers: list[messages.Message] = []
        if not has_params:
            answers.append(messages.Want((messages.PARAMS,)))
        if not has_all:
            answers.append(messages.Want((messages.PARAMS, messages.OPT_STATE)))
        reason = self._end_reason(offer)
        if has_all or not reason:
            answers.append(messages.Verdict(offer.term, offer.number, reason))
        observer.driver.proceed(self.rng.choice(answers))


@dataclass(frozen=True, slots=True)
class State:
    """For the checker: the bits of a copy of a shard whose history is `chain`."""

    shard: int
    chain: int
    checksum: int


def _checksum(*lists: tuple[np.ndarray, ...]) -> int:
    return zlib.crc32(b"".join(array.tobytes() for arrays in lists for array in arrays))


@dataclass(frozen=True, slots=True)
class Ended:
    """For the checker: the crew ended this process: a while after the scheduler, or because it was asked to leave."""


@dataclass(frozen=True, slots=True)
class AskedToLeave:
    """For the checker: this worker was asked to leave the run."""


@dataclass(frozen=True, slots=True)
class Vanished:
    """For the checker: this process is silent for good."""


def _both(place: messages.ShardPlace) -> tuple[tuple[str, int], tuple[str, int]]:
    return (place.primary, place.primary_boot), (place.backup, place.backup_boot)


def _brief(machine: Any) -> dict[str, Any]:
    known = getattr(machine, "state", machine)
    names = ("phase", "term", "step", "primary", "incarnation", "lease", "workers", "acks", "membership")
    return {name: getattr(known, name) for name in names if hasattr(known, name)}


_HEARD = (messages.PushAck, messages.CommitAck, messages.Register, messages.Leave, messages.ReadAnswer)
_SILENT = (effects.Append, effects.Compact, effects.Write, effects.Load, effects.Prepare, effects.Compute)
