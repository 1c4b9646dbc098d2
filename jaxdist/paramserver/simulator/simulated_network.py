"""The network of a simulated run: connections that take time for bytes, fail, and are opened again.

As in production, small and large messages travel on connections of their own, an Outbox decides what is queued, and a
receiver reads no further while too many messages are not handled or too many bytes are held. Proxies on the way lose,
repeat, delay and reorder messages: the protocol must bear that, too.
"""

import collections
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jaxdist.paramserver.protocol import messages
from jaxdist.paramserver.simulator.fault_rates import Faults, Hardware
from jaxdist.paramserver.simulator.seeded_time import SeededTime
from jaxdist.paramserver.wire import encoding, incoming, outgoing
from jaxdist.paramserver.wire.outbox import Outbox


@dataclass(frozen=True, slots=True)
class Parcel:
    """A message and its encoded form."""

    message: messages.Message
    encoded: encoding.Encoded

    @property
    def num_bytes(self) -> int:
        """The length on the wire."""
        return self.encoded.num_bytes

    def is_same(self, other: "Parcel") -> bool:
        """Return whether both are the same message, sent twice."""
        return self.encoded.is_same(other.encoded)


@dataclass(frozen=True, slots=True)
class Sent:
    """For the checker: the sending of a large message began on connection `connection`; `identity` says which."""

    connection: tuple[str, str, int]
    identity: bytes
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Arrived:
    """For the checker: a large message has been handled, so it no longer travels."""

    connection: tuple[str, str, int]
    identity: bytes


class Network:
    """All connections. `ends` are the processes by name; `note` takes what the checker must know."""

    def __init__(
        self,
        timeline: SeededTime,
        faults: Faults,
        hardware: Hardware,
        ends: dict[str, Any],
        note: Callable[[str, Any], None],
        outbox: Callable[..., Any] = Outbox,
    ) -> None:
        self.timeline, self.faults, self.hardware = timeline, faults, hardware
        self.ends, self.note, self.make_outbox = ends, note, outbox
        self._links: dict[tuple[str, str, bool], Link] = {}
        self._budgets: dict[str, incoming.Budget] = {}
        self.isolated: dict[str, tuple[float, bool]] = {}  # until when, and whether connections fail at once

    @property
    def troubled(self) -> bool:
        """Whether faults happen now."""
        return self.timeline.now < self.faults.until

    def send(self, source: str, to: str, message: messages.Message) -> None:
        """Queue `message` for the process named `to`."""
        parcel = Parcel(message, encoding.encode(message))
        large = parcel.num_bytes > self.hardware.small_bytes
        link = self._links.get((source, to, large))
        if link is None:
            link = self._links[source, to, large] = Link(self, source, to, large)
        link.put(parcel)

    def forget(self, name: str) -> None:
        """End the connections of a process that died."""
        self._budgets.pop(name, None)
        for key, link in list(self._links.items()):
            if name in key[:2]:
                link.fail(forever=key[0] == name)
            if key[0] == name:
                del self._links[key]

    def resume(self, name: str) -> None:
        """Let a process that was stopped read again."""
        for key, link in self._links.items():
            if key[1] == name:
                link.read()

    def isolate(self, name: str, seconds: float, *, breaks: bool) -> None:
        """Let nothing reach or leave a process; its connections fail, or stand still."""
        self.isolated[name] = (self.timeline.now + seconds, breaks)
        for key, link in list(self._links.items()):
            if breaks and name in key[:2]:
                link.fail()

    def break_one(self) -> None:
        """Let one connection fail."""
        links = list(self._links.values())
        if links:
            self.timeline.rng.choice(links).fail()

    def blocked_for(self, *names: str) -> tuple[float, bool]:
        """Return for how many seconds nothing passes between these processes, and whether their connections fail."""
        found = [self.isolated.get(name, (0.0, False)) for name in names]
        return max(until for until, _ in found) - self.timeline.now, any(
            breaks for until, breaks in found if until > self.timeline.now
        )

    def budget(self, name: str) -> incoming.Budget:
        """Return the memory of a process for large messages."""
        return self._budgets.setdefault(name, incoming.Budget(self.hardware.budget))


class Link:
    """One connection, as long as its source lives: it may fail and is opened again."""

    def __init__(self, network: Network, source: str, to: str, large: bool) -> None:
        self._network, self._time = network, network.timeline
        self.source, self.to, self.large = source, to, large
        self._outbox: Outbox[Parcel] = network.make_outbox(large=large, most_bytes=network.hardware.queue_bytes)
        self._again_at = 0.0
        self._attempt = 0  # grows with every connection and failure, so that what was scheduled before is recognised
        self._state = "closed"  # or connecting, open, gone
        self._begin()

    def _begin(self) -> None:
        self._attempt += 1
        self._sending = False
        self._pipe: collections.deque[Parcel] = collections.deque()  # has arrived, and is not read yet
        self._on_the_way = 0  # bytes that were sent and are not read yet
        self._last_arrival = 0.0
        self._sent_count = self._read = self._handled = 0
        self._passed: dict[int, Parcel] = {}  # what proxies took, by its number on this connection
        self._acknowledging = False
        self._outbox.begin()

    @property
    def _connection(self) -> tuple[str, str, int]:
        return self.source, self.to, self._attempt

    def _still(self, action: Callable[[], None]) -> Callable[[], None]:
        """Return `action` for as long as this connection lasts."""
        attempt = self._attempt

        def act() -> None:
            if self._attempt == attempt:
                action()

        return act

    # The sender.

    def put(self, parcel: Parcel) -> None:
        """Queue a message."""
        self._outbox.put(parcel)
        self._pump()

    def fail(self, *, forever: bool = False) -> None:
        """Lose the connection, and what travels on it."""
        self._state = "gone" if forever else "closed"
        self._begin()
        self._pump()

    def _pump(self) -> None:
        if self._state == "closed" and self._outbox.has_waiting():
            self._state = "connecting"
            self._time.at(max(self._again_at - self._time.now, 0.0) + self._latency(), self._still(self._connect))
        hardware = self._network.hardware
        while self._state == "open" and not self._sending and self._on_the_way < hardware.window:
            taken = self._outbox.take()
            if not taken:
                return
            size = sum(parcel.num_bytes for parcel in taken)
            self._on_the_way += size
            for parcel in taken if self.large else ():
                identity = parcel.encoded.identity()
                self._network.note(self.source, Sent(self._connection, identity, parcel.num_bytes))
            if hardware.bandwidth == float("inf"):
                self._sent(taken)
            else:
                self._sending = True
                self._time.at(size / hardware.bandwidth, self._still(functools.partial(self._sent_all, taken)))

    def _sent_all(self, taken: list[Parcel]) -> None:
        self._sending = False
        self._sent(taken)
        self._pump()

    def _connect(self) -> None:
        seconds, breaks = self._network.blocked_for(self.source, self.to)
        end = self._network.ends[self.to]
        if not end.is_up() or (seconds > 0 and breaks):
            self._state, self._again_at = "closed", self._time.now + outgoing.AGAIN_SECONDS
            self._outbox.drop()
        elif seconds > 0 or not end.is_reading():  # no greeting comes yet
            self._time.at(max(seconds, 0.05), self._still(self._connect))
        else:
            self._begin()
            self._state = "open"
            self._pump()

    def _latency(self) -> float:
        return self._time.rng.uniform(*self._network.hardware.latency)

    # On the way.

    def _sent(self, taken: list[Parcel]) -> None:
        arrival = max(self._last_arrival, self._time.now + self._latency())
        self._last_arrival = arrival
        passed = [
            parcel for number, parcel in enumerate(taken, self._sent_count) if not self._disturbed(number, parcel)
        ]
        self._sent_count += len(taken)
        self._time.at(arrival - self._time.now, self._still(lambda: self._arrive(passed)))

    def _disturbed(self, number: int, parcel: Parcel) -> bool:
        """Let a proxy do what it does to a message; return whether it does not pass in its turn."""
        faults, rng = self._network.faults, self._time.rng
        if not self._network.troubled:
            return False
        if rng.random() < faults.repeat:
            self._time.at(self._latency(), lambda: self._stray(parcel))
        if faults.late and rng.random() < faults.late:
            self._time.at(rng.uniform(0.0, 5.0), lambda: self._stray(parcel))
        dropped, slow = rng.random() < faults.drop, rng.random() < faults.slow
        if dropped or slow:
            self._time.at(self._latency(), self._still(lambda: self._pass_over(number, parcel)))
        if slow and not dropped:
            self._time.at(rng.uniform(0.0, 0.3), lambda: self._stray(parcel))
        return dropped or slow

    def _stray(self, parcel: Parcel) -> None:
        """Deliver a message outside of its turn, to whichever process has the name now."""
        end = self._network.ends[self.to]
        if end.is_up() and self._network.blocked_for(self.source, self.to)[0] <= 0:
            end.receive(parcel.message, _nothing)

    def _pass_over(self, number: int, parcel: Parcel) -> None:
        """Count a message that a proxy took: its sender was told that it arrived."""
        self._on_the_way -= parcel.num_bytes
        self._read += 1
        self._passed[number] = parcel
        self._count_passed()
        self._pump()

    def _count_passed(self) -> None:
        """Count what proxies took, each after the large messages before it: the sender knows them by their number."""
        while self._passed and (not self.large or min(self._passed) <= self._handled):
            self._note_handled(self._passed.pop(min(self._passed)))

    def _arrive(self, parcels: list[Parcel]) -> None:
        seconds, _ = self._network.blocked_for(self.source, self.to)
        if seconds > 0:  # sent again by TCP until it passes
            self._time.at(seconds, self._still(lambda: self._arrive(parcels)))
            self._last_arrival = max(self._last_arrival, self._time.now + seconds)
            return
        self._pipe.extend(parcels)
        self.read()

    # The receiver.

    def read(self) -> None:
        """Read what has arrived, as far as the receiver has room for it."""
        end = self._network.ends[self.to]
        while self._pipe and end.is_reading() and self._read - self._handled < incoming.MOST_WAITING:
            size = self._pipe[0].num_bytes
            if self.large and not self._network.budget(self.to).take(size, self._still(self.read)):
                return
            parcel = self._pipe.popleft()
            self._on_the_way -= size
            self._read += 1
            end.receive(self._seen(parcel), self._handler(parcel))
            self._pump()

    def _seen(self, parcel: Parcel) -> messages.Message:
        """Return the message of a parcel; now and then from its bytes: a message must survive its encoding."""
        if self._network.troubled and self._time.rng.random() < 0.02:
            return encoding.decode(b"".join(parcel.encoded))
        return parcel.message

    def _handler(self, parcel: Parcel) -> Callable[[], None]:
        budget = self._network.budget(self.to) if self.large else None
        noted = self._still(lambda: self._note_handled(parcel))

        def handled() -> None:
            if budget is not None:
                budget.give(parcel.num_bytes)
            noted()

        return handled

    def _note_handled(self, parcel: Parcel) -> None:
        self._handled += 1
        if self.large:
            self._network.note(self.to, Arrived(self._connection, parcel.encoded.identity()))
            if not self._acknowledging:
                self._acknowledging = True
                self._time.at(incoming.ACK_SECONDS, self._still(self._acknowledge))
        self._count_passed()
        self.read()

    def _acknowledge(self) -> None:
        self._acknowledging = False
        self._outbox.note_handled(self._handled)
        self._pump()


def _nothing() -> None:
    pass
