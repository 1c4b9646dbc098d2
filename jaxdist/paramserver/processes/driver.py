"""Runs a state machine: what it is told next, its effects in order, then its replies.

Everything outside of the machine (clock, inbox, connections, log, disk, the thread that computes) is a World, given by
the caller: `process_world` in production, a seeded one in the simulator. Effects are done before the replies are sent,
as `effects` requires.
"""

import collections
import logging
from collections.abc import Callable
from typing import Protocol

from jaxdist.paramserver.processes import faults
from jaxdist.paramserver.protocol import effects, messages

_logger = logging.getLogger(__name__)

PULSE_SECONDS, MOST_SILENT_SECONDS = 0.5, 120.0
"""How often, and for how long, heartbeats are repeated while one message is being handled."""
TICK_SECONDS = 0.05

Received = tuple[messages.Message, Callable[[], None]]
"""A message, and a function to call once it has been handled."""


class StateMachine(Protocol):
    """What server, scheduler and worker have in common."""

    def handle(self, message: messages.Message, now: float) -> tuple[list[effects.Send], list[effects.Effect]]:
        """Handle one message; return what to send after the effects are done."""
        ...


class World(Protocol):
    """What is outside of a state machine. Only `now` and `send` are called from more than one thread."""

    def now(self) -> float:
        """Return the seconds of a clock that need not start at 0."""
        ...

    def take(self, until: float) -> Received | None:
        """Return the next message received; None if there is none until then."""
        ...

    def send(self, to: str, message: messages.Message) -> None:
        """Send `message` to the process named `to`, or drop it."""
        ...

    def append(self, record: messages.Message) -> None:
        """Append a record to the log; it is durable on return."""
        ...

    def replace(self, record: messages.Message) -> None:
        """Replace the whole log by `record`, atomically; it is durable on return."""
        ...

    def write(self, name: str, content: messages.Message) -> None:
        """Begin to write a file atomically; messages.Written is received later."""
        ...

    def load(self, name: str) -> None:
        """Begin to read a file; messages.Loaded is received later."""
        ...

    def prepare(self, lease: messages.Lease) -> None:
        """Begin to read the examples of `lease`, before its params have arrived."""
        ...

    def compute(self, effect: effects.Compute) -> None:
        """Begin to compute a gradient, after what was prepared; messages.Computed is received later."""
        ...


class Driver:
    """Runs one state machine; `exit` is not None once it has exited.

    Args:
      machine: the state machine.
      world: see World.
      observe: called with every effect after it is done, for example effects.Committed or effects.ShowCut.
      tick_seconds: seconds between two ticks.
      point: called before and after everything this process does; see `faults`.
    """

    def __init__(
        self,
        machine: StateMachine,
        world: World,
        *,
        observe: Callable[[effects.Effect], None] = lambda effect: None,
        tick_seconds: float = TICK_SECONDS,
        point: faults.Point = faults.no_faults,
    ) -> None:
        self.machine, self.world = machine, world
        self._observe, self._tick_seconds = observe, tick_seconds
        self._point = point
        self.exit: effects.Exit | None = None
        self.tick_at = float("-inf")  # by the clock of the world
        self._beat: tuple[str, messages.Heartbeat] | None = None  # the last one sent
        self._beat_at = 0.0
        self._own: collections.deque[messages.Message] = collections.deque()  # effects.Continue

    def turn(self) -> bool:
        """Handle a tick that is due, or else the next message; return False if neither came until the next tick.

        What the machine wants to continue with comes before both.
        """
        now = self.world.now()
        if self._own:
            self._feed(self._own.popleft(), now)
            return True
        if now >= self.tick_at:
            self.tick_at = now + self._tick_seconds
            self._feed(messages.Tick(), now)
            return True
        received = self.world.take(self.tick_at)
        if received is None:
            return False
        message, handled = received
        self._feed(message, self.world.now())
        handled()
        return True

    def pulse(self) -> None:
        """Repeat the last heartbeat if one message takes long to handle: a process at work must not seem silent.

        Called every PULSE_SECONDS, by another thread than the one that handles messages.
        """
        beat, silent = self._beat, self.world.now() - self._beat_at
        if beat is not None and PULSE_SECONDS < silent < MOST_SILENT_SECONDS:
            self.world.send(*beat)

    def _feed(self, message: messages.Message, now: float) -> None:
        self._point("hear", message)
        replies, todo = self.machine.handle(message, now)
        for effect in todo:
            self._point("do", effect)
            self._do(effect)
            self._point("did", effect)
        for to, reply in replies:
            if isinstance(reply, messages.Heartbeat):
                self._beat, self._beat_at = (to, reply), now
            for _ in range(self._point("send", reply)):
                self.world.send(to, reply)

    def _do(self, effect: effects.Effect) -> None:
        match effect:
            case effects.Append(record):
                self.world.append(record)
            case effects.Compact(record):
                self.world.replace(record)
            case effects.Write(name, content):
                self.world.write(name, content)
            case effects.Load(name):
                self.world.load(name)
            case effects.Prepare(lease):
                self.world.prepare(lease)
            case effects.Compute():
                self.world.compute(effect)
            case effects.Warn(text):
                _logger.warning(text)
            case effects.Continue(message):
                self._own.append(message)
            case effects.Exit():
                self.exit = effect
        self._observe(effect)
