"""A simulated process: the driver of production in a seeded world, its clock, its inbox, and what it waits for."""

import collections
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

from jaxdist.paramserver.processes.driver import Driver, Received
from jaxdist.paramserver.protocol import effects, messages
from jaxdist.paramserver.protocol.settings import worker_number
from jaxdist.paramserver.simulator.seeded_time import SeededTime
from jaxdist.paramserver.simulator.simulated_disk import Death, Disk
from jaxdist.paramserver.simulator.simulated_network import Network

PULSE_SECONDS = 0.1
_POLL_SECONDS, _SHORTEST_WAIT = 0.05, 1e-4
LONGEST_HANDLING, LONGEST_STANDSTILL, FARTHEST_JUMP = 1.5, 2.0, 1000.0


class Owner(Protocol):
    """The simulation, as its processes see it."""

    timeline: SeededTime
    network: Network
    disk: Disk

    def note(self, process: str, what: Any) -> None:
        """Keep an event for the checker."""

    def computed(self, effect: effects.Compute, worker: int) -> tuple[messages.Computed, float]:
        """Return a gradient, and how long it takes."""

    def died(self, process: "SimulatedProcess") -> None:
        """Let a process die."""


@dataclass(slots=True)
class Clock:
    """The clock of a process: it may jump or stand still."""

    shown: float = 0.0
    since: float = 0.0
    rate: float = 1.0

    def at(self, time: float) -> float:
        """Return what the clock shows at `time`."""
        return self.shown + (time - self.since) * self.rate

    def set(self, time: float, *, jump: float = 0.0, rate: float = 1.0) -> None:
        """Let the clock jump at `time`, and go at `rate` from then on."""
        self.shown, self.since, self.rate = self.at(time) + jump, time, rate


class SimulatedProcess:
    """One process and its starts. Every start has a driver; `life` grows with every death."""

    def __init__(self, name: str, owner: Owner) -> None:
        self.name, self._owner, self._time = name, owner, owner.timeline
        self.clock, self.wall_ahead = Clock(), 0.0
        self.life = 0
        self.driver: Driver | None = None
        self.exit: effects.Exit | None = None
        self.vanished = False
        self.retiring = False  # whether it was asked to leave the run
        self._rest()

    def _rest(self) -> None:
        self.paused_until = self.busy_until = 0.0
        self.in_turn = False  # false where the driver is called beside its turns, by its pulse
        self._inbox: collections.deque[Received] = collections.deque()
        self._heartbeats: collections.deque[Received] = collections.deque()
        self._turn_at: float | None = None
        self._wait = 0.0
        self._turns = 0  # numbers the planned turns, of which only the last counts

    @property
    def machine(self) -> Any:
        """The state machine; None while the process is dead."""
        return None if self.driver is None else self.driver.machine

    role = machine

    # Life and death.

    def start(self, driver: Driver) -> None:
        """Begin a life."""
        self._rest()
        self.driver = driver
        self._plan(self._time.rng.uniform(0.0, _POLL_SECONDS))
        self._time.at(self._time.rng.uniform(0.0, PULSE_SECONDS), self.while_alive(self._pulse))

    def die(self) -> None:
        """End this life: whatever was planned in it does not happen."""
        self.life += 1
        self.driver, self.vanished = None, False
        self._rest()

    def while_alive(self, action: Callable[[], None]) -> Callable[[], None]:
        """Return `action`, which does nothing after the death of the process."""
        life = self.life

        def act() -> None:
            if self.life == life:
                action()

        return act

    def is_up(self) -> bool:
        """Return whether the process lives and has not exited."""
        return self.driver is not None and self.exit is None

    def is_reading(self) -> bool:
        """Return whether the process lives and is not stopped."""
        return self.is_up() and self.paused_until <= self._time.now

    def pause(self, seconds: float) -> None:
        """Stop the process, as SIGSTOP does."""
        self.paused_until = max(self.paused_until, self._time.now + seconds)
        self._time.at(seconds + 1e-6, self.while_alive(self._wake))

    def _wake(self) -> None:
        if self.is_reading():
            self._plan(0.0)
            self._owner.network.resume(self.name)

    # Turns.

    def receive(self, message: messages.Message, handled: Callable[[], None]) -> None:
        """Put a message into the inbox."""
        if isinstance(message, messages.Heartbeat):
            self._owner.note(self.name, Waits(message))
            self._heartbeats.append((message, handled))
        else:
            self._inbox.append((message, handled))
        self._plan(0.0)

    def take_heartbeat(self) -> Received | None:
        """Return the next heartbeat of the inbox."""
        return self._heartbeats.popleft() if self._heartbeats else None

    def take(self, seconds: float) -> Received | None:
        """Return the next message of the inbox; if there is none, the next turn comes after `seconds` at the latest."""
        self._wait = seconds
        return self._inbox.popleft() if self._inbox else None

    def _plan(self, delay: float) -> None:
        """Plan a turn after `delay` seconds, or when the process is free, unless one comes earlier."""
        time = max(self._time.now + delay, self.busy_until, self.paused_until)
        if self._turn_at is not None and self._turn_at <= time:
            return
        self._turn_at = time
        self._turns += 1
        number = self._turns
        self._time.at(time - self._time.now, self.while_alive(lambda: self._turn(number)))

    def _turn(self, number: int) -> None:
        if number != self._turns or self.driver is None or self.exit is not None:
            return
        self._turn_at = None
        now = self._time.now
        if max(self.busy_until, self.paused_until) > now:
            self._plan(0.0)
            return
        self.busy_until, self.in_turn = now, True
        driver = self.driver
        try:
            acted = driver.turn()
        except Death:
            self._owner.died(self)
            return
        finally:
            self.in_turn = False
        if driver.exit is not None:
            self.exit = driver.exit
        elif acted:
            self._plan(0.0)
        else:
            self._plan(max(self._wait, _SHORTEST_WAIT) if self.clock.rate else _POLL_SECONDS)

    def spend(self, seconds: float) -> None:
        """Let the present turn take longer."""
        self.busy_until = max(self.busy_until, self._time.now) + seconds

    def _pulse(self) -> None:
        """Do what the driver does in a thread of its own, which a stopped process does not."""
        if self.driver is not None and self.exit is None:
            if self.paused_until <= self._time.now:
                self.driver.pulse()
            self._time.at(PULSE_SECONDS, self.while_alive(self._pulse))


@dataclass(frozen=True, slots=True)
class Waits:
    """For the checker: a heartbeat has arrived and waits in the inbox."""

    message: messages.Heartbeat


class SimulatedWorld:
    """The World of one life of a process."""

    def __init__(self, process: SimulatedProcess, owner: Owner) -> None:
        self._process, self._owner, self._life = process, owner, process.life
        self._time = owner.timeline

    def _later(self, message: messages.Message) -> None:
        self._process.receive(message, lambda: None)

    # World.

    def now(self) -> float:
        """Return what the clock of the process shows; it runs while a turn takes long."""
        process = self._process
        return process.clock.at(process.busy_until if process.in_turn else self._time.now)

    def take_heartbeat(self) -> Received | None:
        """Return the next heartbeat that waits, if any."""
        return self._process.take_heartbeat()

    def take(self, seconds: float) -> Received | None:
        """Return the next message; the simulation calls again when there is one."""
        return self._process.take(seconds)

    def send(self, to: str, message: messages.Message) -> None:
        """Send a message, once the turn has come so far."""
        process, network = self._process, self._owner.network
        wait = process.busy_until - self._time.now
        if wait <= 0 or not process.in_turn:
            network.send(process.name, to, message)
        else:
            self._time.at(wait, process.while_alive(lambda: network.send(process.name, to, message)))

    def append(self, record: messages.Message) -> None:
        """Append a record to the log."""
        self._process.spend(self._owner.disk.sync_seconds())
        self._owner.disk.append(record, lambda: self._owner.note(self._process.name, record))

    def replace(self, record: messages.Message) -> None:
        """Replace the log by a record."""
        self._process.spend(self._owner.disk.sync_seconds())
        self._owner.disk.replace(record, lambda: self._owner.note(self._process.name, record))

    def write(self, name: str, content: messages.Message) -> None:
        """Write a file beside the turns."""
        process, owner, life = self._process, self._owner, self._life
        owner.disk.write(
            name,
            content,
            lives=lambda: process.life == life,
            note=lambda: owner.note(process.name, ("durable", name, content)),
            done=lambda checksum, error: self._later(messages.Written(name, checksum, error)),
        )

    def load(self, name: str) -> None:
        """Read a file beside the turns."""
        loaded = self._process.while_alive
        self._owner.disk.load(name, lambda content: loaded(lambda: self._later(messages.Loaded(name, content)))())

    def prepare(self, lease: messages.Lease) -> None:
        """Do nothing: reading examples takes no time here."""

    def warn(self, text: str) -> None:
        """Do nothing: the checker sees the effect."""

    def compute(self, effect: effects.Compute) -> None:
        """Compute a gradient; it is there after a while."""
        worker = worker_number(self._process.name)
        assert worker is not None
        computed, seconds = self._owner.computed(effect, worker)
        answer = replace(computed, incarnation=effect.incarnation, sequence=effect.sequence)
        self._time.at(seconds, self._process.while_alive(lambda: self._later(answer)))
