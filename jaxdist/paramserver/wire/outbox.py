"""The messages for one peer on one lane, before and while they travel: which are queued, dropped, or not sent twice.

A message is dropped if the peer cannot be reached or the connection fails while it travels: the process that needs an
answer repeats its request. A large message that is repeated while it still travels is not sent twice. The peer counts
the large messages that it has handled; until then, they travel.
"""

import collections
import threading
from typing import Generic, Protocol, Self, TypeVar

MAX_BYTES_IN_FLIGHT = 256 << 20
NAGLE_BYTES = 256 << 10
"""Small messages that wait are sent as one block of at least this size."""


class Queued(Protocol):
    """An encoded message."""

    @property
    def num_bytes(self) -> int:
        """The length on the wire."""

    def is_same(self, other: Self) -> bool:
        """Return whether both are the same message, sent twice."""


P = TypeVar("P", bound=Queued)


class Outbox(Generic[P]):
    """A queue of limited size. `put` may be called from any thread, and the rest from one.

    Args:
      large: whether these are large messages, which the peer counts as it handles them.
      most_bytes: how many bytes may wait; one message of any size fits alone.
    """

    def __init__(self, *, large: bool, most_bytes: int = MAX_BYTES_IN_FLIGHT) -> None:
        self.large, self.most_bytes = large, most_bytes
        self._lock = threading.Lock()
        self._waiting: collections.deque[P] = collections.deque()
        self._waiting_bytes = 0
        self._travelling: collections.deque[P] = collections.deque()
        self._handled = 0

    def put(self, parcel: P) -> None:
        """Queue a message, unless the same one still waits or travels, or the queue is full."""
        with self._lock:
            same = any(parcel.is_same(other) for queue in (self._waiting, self._travelling) for other in queue)
            # The caller repeats what is not answered, so dropping is better than unbounded memory.
            full = self._waiting and self._waiting_bytes + parcel.num_bytes > self.most_bytes
            if not same and not full:
                self._waiting.append(parcel)
                self._waiting_bytes += parcel.num_bytes

    def take(self) -> list[P]:
        """Return what to send next: one large message, which travels now, or the small ones that wait."""
        with self._lock:
            if not self._waiting:
                return []
            taken = [self._next()]
            if self.large:
                self._travelling.append(taken[0])
            while not self.large and self._waiting and sum(each.num_bytes for each in taken) < NAGLE_BYTES:
                taken.append(self._next())
            return taken

    def _next(self) -> P:
        parcel = self._waiting.popleft()
        self._waiting_bytes -= parcel.num_bytes
        return parcel

    def note_handled(self, handled: int) -> None:
        """Note how many large messages of this connection the peer has handled."""
        with self._lock:
            for _ in range(min(handled - self._handled, len(self._travelling))):
                self._travelling.popleft()
            self._handled = handled

    def begin(self) -> None:
        """Begin a connection: what travelled on the one before is lost."""
        with self._lock:
            self._travelling.clear()
            self._handled = 0

    def drop(self) -> None:
        """Drop what waits: the peer cannot be reached."""
        with self._lock:
            self._waiting.clear()
            self._waiting_bytes = 0

    def has_waiting(self) -> bool:
        """Return whether a message waits to be sent."""
        return bool(self._waiting)

    def is_empty(self) -> bool:
        """Return whether all messages are delivered or dropped."""
        return not self._waiting and not self._travelling
