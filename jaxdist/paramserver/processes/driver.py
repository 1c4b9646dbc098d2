"""Runs a state machine: what it is told next, its effects in order, then its replies.

Everything outside of the machine (clock, inbox, connections, log, disk, the thread that computes) is a World, given by
the caller: `process_world` in production, a seeded one in the simulator. Effects are done before the replies are sent,
as `effects` requires.
"""

import collections
from collections.abc import Callable
from typing import Protocol

from jaxdist.paramserver.processes import faults
from jaxdist.paramserver.protocol import effects, messages

PULSE_SECONDS, MOST_SILENT_SECONDS = 0.5, 120.0
"""How often, and for how long, heartbeats are repeated while one message is being handled."""
TICK_SECONDS = 0.05

Received = tuple[messages.Message, Callable[[], None]]
"""A message, and a function to call once it has been handled."""


class StateMachine(Protocol):
    """What server, scheduler and worker have in common."""

    def handle(self, message: messages.Message, now: float) -> tuple[list[effects.Send], list[effects.Effect]]:
        """Handle one message; return what to send after the effects are done."""


class World(Protocol):
    """What is outside of a state machine. Only `now` and `send` are called from more than one thread."""

    def now(self) -> float:
        """Return the seconds of a clock that starts anywhere; if it is set back, no time passes for the machine."""

    def take_heartbeat(self) -> Received | None:
        """Return the next heartbeat that waits, if any, even if other messages were received before it."""

    def take(self, seconds: float) -> Received | None:
        """Return the next message received; None if none comes for that long."""

    def send(self, to: str, message: messages.Message) -> None:
        """Send `message` to the process named `to`, or drop it."""

    def append(self, record: messages.Message) -> None:
        """Append a record to the log; a scheduler that is restarted reads it from then on."""

    def replace(self, record: messages.Message) -> None:
        """Replace the whole log by `record`, atomically."""

    def write(self, name: str, content: messages.Message) -> None:
        """Begin to write a file atomically; messages.Written is received later."""

    def load(self, name: str) -> None:
        """Begin to read a file; messages.Loaded is received later."""

    def prepare(self, lease: messages.Lease) -> None:
        """Begin to read the examples of `lease`, before its params have arrived."""

    def warn(self, text: str) -> None:
        """Show a warning to the user."""

    def compute(self, effect: effects.Compute) -> None:
        """Begin to compute a gradient, after what was prepared; messages.Computed is received later."""


class Driver:
    """Runs one state machine; `exit` is not None once it has exited.

    `observe` is called with every effect after it is done, for example effects.Committed; `point` before and after
    everything this process does, see `faults`. For `pulse_seconds` see `pulse`.
    """

    def __init__(
        self,
        machine: StateMachine,
        world: World,
        *,
        observe: Callable[[effects.Effect], None] = lambda effect: None,
        tick_seconds: float = TICK_SECONDS,
        pulse_seconds: float = PULSE_SECONDS,
        point: faults.Point = faults.no_faults,
    ) -> None:
        self.machine, self.world = machine, world
        self._observe, self._tick_seconds, self.pulse_seconds = observe, tick_seconds, pulse_seconds
        self._point = point
        self.exit: effects.Exit | None = None
        self._read: float | None = None  # what the clock of the world showed last
        self._now = self._tick_at = 0.0  # seconds of this driver, which never decrease
        self._beat: tuple[str, messages.Heartbeat] | None = None  # the last one sent
        self._beat_at = 0.0
        self._own: collections.deque[messages.Message] = collections.deque()  # effects.Continue

    def proceed(self, message: messages.Message) -> None:
        """Have the machine handle `message`, from its own process, in the next turn: ahead of what was received."""
        self._own.append(message)

    def continues(self) -> bool:
        """Return whether the machine has something to continue with, for which no turn waits."""
        return bool(self._own)

    def turn(self) -> bool:
        """Handle a heartbeat, a tick that is due, or the next message; return False if none came until the tick.

        What the machine wants to continue with comes before them.
        """
        if self._own:
            self._feed(self._own.popleft())
            return True
        now = self._advance()
        # Heartbeats come first: at a tick, no process may count as silent whose heartbeat waits here.
        received = self.world.take_heartbeat()
        if received is None and now >= self._tick_at:
            self._tick_at = now + self._tick_seconds
            self._feed(messages.Tick())
            return True
        received = received or self.world.take(self._tick_at - now)
        if received is None:
            return False
        message, handled = received
        self._feed(message)
        handled()
        return True

    def _advance(self) -> float:
        """Return the seconds of this driver: a clock that is set back stands still, so no process falls silent."""
        shown = self.world.now()
        self._now += 0.0 if self._read is None else max(shown - self._read, 0.0)
        self._read = shown
        return self._now

    def pulse(self) -> None:
        """Repeat the last heartbeat if one message takes long to handle: a process at work must not seem silent.

        Called every `pulse_seconds`, by another thread than the one that handles messages.
        """
        beat, silent = self._beat, self.world.now() - self._beat_at
        if beat is not None and self.pulse_seconds < silent < MOST_SILENT_SECONDS:
            self.world.send(*beat)

    def _feed(self, message: messages.Message) -> None:
        self._point("hear", message)
        replies, todo = self.machine.handle(message, self._advance())
        for effect in todo:
            self._point("do", effect)
            self._do(effect)
            self._point("did", effect)
        for to, reply in replies:
            if isinstance(reply, messages.Heartbeat):
                self._beat, self._beat_at = (to, reply), self.world.now()
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
            case effects.Warn(text) | effects.Fail(text):
                self.world.warn(text)
            case effects.Continue(message):
                self.proceed(message)
            case effects.Exit():
                self.exit = effect
        self._observe(effect)
