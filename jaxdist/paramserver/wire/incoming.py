"""The listening end of a connection: greets, then takes messages apart and hands them over as they become complete.

A connection is read no further while too many of its messages are not handled yet, or while the memory for the next one
is not free. The sender then waits, because TCP buffers are limited.
"""

import asyncio
import collections
import contextlib
import functools
import logging
import socket
import struct
import threading
from collections.abc import Callable, Generator, Mapping
from typing import Any

from jaxdist.paramserver.protocol import messages
from jaxdist.paramserver.wire import codec, encoding, greeting, lent_memory, same_machine

_logger = logging.getLogger(__name__)

CONTROL, BULK = 0, 1
"""Lanes: a peer sends small and large messages on connections of their own, so a heartbeat never waits for a push."""
SMALL_BYTES = 256 << 10
"""The longest message on a control connection."""
GREETING_SECONDS = 5.0
IDLE_SECONDS = 30.0
"""How long no byte of a message that has begun may arrive or leave before its connection is closed."""
MOST_WAITING = 16
"""Messages of one connection that may wait to be handled."""
ACK_SECONDS = 0.05
ACK = struct.Struct("<QQ")
"""How many messages have been handled; the number of a segment of lent memory that is returned, or 0."""
SCRATCH_BYTES = 256 << 10
_DIRECT_BYTES = 128 << 10
"""Larger pieces of memory are read into at once; smaller ones are filled from what arrives together with them."""

Receive = Callable[[messages.Message, Callable[[], None]], None]
"""Takes a message, and a function to call, from any thread, once the message has been handled."""


class Budget:
    """Limits the bytes of messages that are being received or wait to be handled. One of any size fits alone."""

    def __init__(self, size: int) -> None:
        self._free = self._size = size
        self._lock = threading.Lock()
        self._waiting: collections.deque[Callable[[], None]] = collections.deque()

    def take(self, count: int, wake: Callable[[], None]) -> bool:
        """Return whether `count` bytes were free and are taken now; if not, `wake` is called when some become free."""
        with self._lock:
            fits = self._free >= min(count, self._size)
            if fits:
                self._free -= min(count, self._size)
            else:
                self._waiting.append(wake)
            return fits

    def give(self, count: int) -> None:
        """Give back `count` bytes, from any thread."""
        with self._lock:
            self._free += min(count, self._size)
            waiting, self._waiting = self._waiting, collections.deque()
        for wake in waiting:
            wake()


class Incoming(asyncio.BufferedProtocol):
    """One connection that a peer opened. All methods but `_note_handled` run in the thread of the event loop.

    `receive` is called with every complete message, by lane; `budget` is for those on the bulk lane. `connections` are
    the open ones, which this joins and leaves. `scratch` is used only while bytes are taken, so all may share it.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        token: str,
        budget: Budget,
        receive: Mapping[int, Receive],
        connections: dict["Incoming", None],
        scratch: memoryview,
    ) -> None:
        self._loop, self._token, self._budget, self._receive = loop, token, budget, receive
        self._connections = connections
        self._transport: Any = None
        self.lane: int | None = None  # None: not greeted yet
        self.heard_at = loop.time()
        self._scratch = scratch
        self._challenge = greeting.challenge()
        self._memory = bytearray(greeting.ANSWER_BYTES)
        self._region = memoryview(self._memory)  # what arrives next belongs here
        self._parts: Generator[memoryview, None, Any] | None = None  # of the message being received
        self._size = 0  # its length
        self._socket: socket.socket | None = None  # another one for the same connection, if it carries descriptors
        self._borrowed = lent_memory.Borrowed(self._return_soon)
        self._loan: lent_memory.Loan | None = None  # where the arrays of the message are whose prefix comes next
        self._left = memoryview(b"")  # bytes that arrived before reading was paused
        self._paused = False
        self._delivered = self._handled = self._acked = 0

    # The connection.

    def connection_made(self, transport: Any) -> None:
        """Greet."""
        self._transport = transport
        same_machine.enlarge_buffers(transport.get_extra_info("socket"))
        self._connections[self] = None
        transport.write(self._challenge)

    def connection_lost(self, exception: Exception | None) -> None:
        """Discard a message that has arrived in part."""
        self._connections.pop(self, None)
        if self._socket is not None:
            self._loop.remove_reader(self._socket)
            self._socket.close()
        self._borrowed.close()
        self._loan = None
        if self._parts is not None:
            self._parts = None
            self._give(self._size)
        self._transport = None

    def close(self) -> None:
        """Close the connection at once."""
        if self._transport is not None:
            self._transport.abort()

    def look(self, now: float) -> None:
        """Close the connection if the peer greets too slowly, or has stopped in the middle of a message."""
        begun = self._parts is not None or len(self._region) < encoding.PREFIX_BYTES
        if self.lane is None:
            late = now - self.heard_at > GREETING_SECONDS
        else:
            late = begun and not self._paused and now - self.heard_at > IDLE_SECONDS
        if late:
            self.close()

    # Bytes.

    def get_buffer(self, sizehint: int) -> memoryview:
        """Return the memory for the next bytes: large arrays arrive where they stay."""
        return self._region if len(self._region) > _DIRECT_BYTES else self._scratch

    def buffer_updated(self, count: int) -> None:
        """Take the bytes that arrived in the memory that `get_buffer` returned."""
        if self.lane is not None:
            self.heard_at = self._loop.time()
        try:
            if len(self._region) > _DIRECT_BYTES:
                self._filled(count)
            else:
                self._feed(self._scratch[:count])
        except greeting.Refused:
            self.close()
        except codec.EncodingError as error:
            _logger.warning("A message was refused: %s", error)
            self.close()

    def _read(self) -> None:
        """Receive bytes, and descriptors with them, which asyncio cannot."""
        assert self._socket is not None
        try:
            count = self._borrowed.receive(self._socket, self.get_buffer(-1))
        except BlockingIOError:
            return
        except OSError:
            count = 0
        if count:
            self.buffer_updated(count)
        else:
            self.close()

    def _feed(self, data: memoryview) -> None:
        while data and not self._paused and self._transport is not None:
            count = min(len(data), len(self._region))
            self._region[:count] = data[:count]
            data = data[count:]
            self._filled(count)
        self._left = memoryview(bytes(data))  # the scratch memory is used again

    def _filled(self, count: int) -> None:
        self._region = self._region[count:]
        if self._region:
            return
        if self.lane is None:
            welcome, lane = greeting.check(self._token, self._challenge, bytes(self._memory))
            self._transport.write(welcome)
            self.lane = BULK if lane else CONTROL
            self.heard_at = self._loop.time()
            self._expect_prefix()
            self._expect_descriptors()
        elif self._parts is not None:
            self._next_part()
        else:
            self._begin()

    def _expect_descriptors(self) -> None:
        """Read a bulk connection within the machine here, not in asyncio."""
        connected = self._transport.get_extra_info("socket")
        if self.lane == BULK and connected.family == socket.AF_UNIX:
            self._transport.pause_reading()
            self._socket = same_machine.same_connection(connected)
            self._loop.add_reader(self._socket, self._read)

    def _expect_prefix(self) -> None:
        self._parts = None
        self._memory = bytearray(encoding.PREFIX_BYTES)
        self._region = memoryview(self._memory)

    def _begin(self) -> None:
        """Begin to receive the message whose prefix has arrived, once there is memory for it."""
        if self._socket is not None and self._memory.startswith(lent_memory.MAGIC):
            self._loan = self._borrowed.loan(bytes(self._memory))
            self._expect_prefix()
            return
        self._size = encoding.declared_bytes(memoryview(self._memory))
        if self.lane == CONTROL and self._size > SMALL_BYTES:
            raise codec.EncodingError(f"A message of {self._size} bytes does not belong on a control connection.")
        if self.lane == BULK and not self._budget.take(self._size, self._wake):
            self._pause()
            return
        prefix, loan, self._loan = bytes(self._memory), self._loan, None
        self._parts = encoding.assemble(prefix) if loan is None else encoding.assemble_placed(prefix, loan)
        self._next_part()

    def _next_part(self) -> None:
        assert self._parts is not None
        try:
            self._region = next(self._parts)
        except StopIteration as end:
            self._expect_prefix()
            self._deliver(end.value)
        except codec.EncodingError:
            self._parts = None
            self._give(self._size)
            raise

    def _give(self, size: int) -> None:
        if self.lane == BULK:
            self._budget.give(size)

    # Messages.

    def _deliver(self, message: messages.Message) -> None:
        self._delivered += 1
        if self.lane == BULK and self._delivered == self._acked + 1:
            self._loop.call_later(ACK_SECONDS, self._acknowledge)
        assert self.lane is not None
        self._receive[self.lane](message, functools.partial(self._note_handled, self._size))
        # Set before the count is read, so that a message that is handled now is either counted or wakes this thread.
        self._paused = True
        if self._delivered - self._handled >= MOST_WAITING:
            self._pause()
        else:
            self._paused = False

    def _note_handled(self, size: int) -> None:
        """Note, in the thread that handled it, that a message needs no more room here."""
        self._handled += 1
        self._give(size)
        if self._paused:
            self._wake()

    def _wake(self) -> None:
        with contextlib.suppress(RuntimeError):  # the event loop has ended
            self._loop.call_soon_threadsafe(self._resume)

    def _pause(self) -> None:
        self._paused = True
        if self._socket is not None:
            self._loop.remove_reader(self._socket)
        elif self._transport is not None:
            self._transport.pause_reading()

    def _resume(self) -> None:
        """Read on, unless too many messages still wait."""
        if not self._paused or self._transport is None or self._delivered - self._handled >= MOST_WAITING:
            return
        self._paused = False
        self.heard_at = self._loop.time()
        try:
            if not self._region:  # a prefix that waited for memory
                self._begin()
            if not self._paused:
                self._feed(self._left)
        except codec.EncodingError as error:
            _logger.warning("A message was refused: %s", error)
            self.close()
        if self._paused or self._transport is None:
            return
        if self._socket is not None:
            self._loop.add_reader(self._socket, self._read)
        else:
            self._transport.resume_reading()

    def _acknowledge(self) -> None:
        """Tell the sender how many messages have been handled: it does not send the others twice."""
        if self._transport is None:
            return
        if self._handled > self._acked:
            self._acked = self._handled
            self._transport.write(ACK.pack(self._acked, 0))
        if self._delivered > self._acked:
            self._loop.call_later(ACK_SECONDS, self._acknowledge)

    def _return_soon(self, segment: int) -> None:
        """Return a segment of lent memory, from any thread."""
        with contextlib.suppress(RuntimeError):  # the event loop has ended
            self._loop.call_soon_threadsafe(self._return, segment)

    def _return(self, segment: int) -> None:
        if self._transport is not None:
            self._transport.write(ACK.pack(self._acked, segment))
