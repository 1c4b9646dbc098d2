"""The sending end of a connection: an Outbox, and a connection that is opened again when it fails.

A message leaves in the thread that sends it, as far as the socket takes it at once: waking the event loop would take
longer than sending most messages does. The event loop connects, listens, and sends the rest. With TLS it sends all. It
sends through another socket of the same connection, because asyncio's own copies what does not leave at once.
"""

import asyncio
import contextlib
import itertools
import os
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from typing import Any

from jaxdist.paramserver.wire import encoding, greeting, lent_memory, same_machine
from jaxdist.paramserver.wire.codec import Buffer
from jaxdist.paramserver.wire.incoming import ACK, BULK, GREETING_SECONDS, IDLE_SECONDS
from jaxdist.paramserver.wire.outbox import Outbox

BLOCKS_A_TURN = 8
"""After so many blocks the event loop, or the thread that sends, turns to other work."""
AGAIN_SECONDS = 0.1
"""Time between two attempts to reach a peer: one that restarts is reached soon."""


class Outgoing(asyncio.Protocol):
    """Sends messages to one peer on one lane. Only `put` may be called from any thread; the rest runs in the loop.

    `_turn` is held by the thread that sends or changes the connection.

    `address` returns the present `host:port` of the peer, and is called in the loop; `lane` is CONTROL or BULK; `tls`
    is for a connection by mutual TLS.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        address: Callable[[], str],
        lane: int,
        token: str,
        tls: ssl.SSLContext | None,
    ) -> None:
        self._loop, self._lane, self._token, self._tls = loop, lane, token, tls
        self._address = address
        self._find()
        self._lock, self._turn = threading.Lock(), threading.Lock()
        self._outbox: Outbox[encoding.Encoded] = Outbox(large=lane == BULK)
        self._scheduled = self._closed = False
        self._connecting: asyncio.Task[None] | None = None
        self._again_at = 0.0
        self._transport: Any = None
        self._socket: socket.socket | None = None
        self._lender = lent_memory.Lender()
        self._descriptor = -1  # of memory that the peer does not know yet
        self._forget()

    def _forget(self) -> None:
        """Begin without a connection."""
        self._transport = None
        self._ready = self._full = False
        self._heard = bytearray()
        self._expected = b""  # the proof that the listener must send; empty before its challenge
        self._outbox.begin()
        self._sending: encoding.Encoded | None = None
        self._blocks: Iterator[Buffer] | None = None  # of the message being sent
        self._left: Buffer = b""  # of a block that the socket did not take at once
        if self._socket is not None:
            self._loop.remove_writer(self._socket)
            self._socket.close()
        self._socket = None  # another one for the same connection, without TLS
        self._lender.close()
        self._close_descriptor()
        self._moved_at, self._moved = self._loop.time(), (0, 0)
        self._num_blocks = 0

    # Any thread.

    def put(self, message: encoding.Encoded) -> None:
        """Queue a message, see Outbox; send it now if the connection takes it."""
        self._outbox.put(message)
        if self._turn.acquire(blocking=False):
            try:
                if self._socket is not None and not self._left and self._send_some():
                    return
            finally:
                self._turn.release()
        with self._lock:
            if self._scheduled:
                return
            self._scheduled = True
        with contextlib.suppress(RuntimeError):  # the event loop has ended
            self._loop.call_soon_threadsafe(self._begin)

    def _send_some(self) -> bool:
        """Send what waits through the socket; return whether nothing is left for the event loop."""
        assert self._socket is not None
        for _ in range(BLOCKS_A_TURN):
            if not self._left:
                block = self._next_block()
                if block is None:
                    return True
                self._left = memoryview(block)
                self._num_blocks += 1
            try:
                sent = self._send()
            except BlockingIOError:
                return False
            except OSError:  # the event loop will notice it, too
                sent = len(self._left)
            self._left = self._left[sent:]
        return False

    def _send(self) -> int:
        """Send some bytes, and with the first ones about a new segment of memory its descriptor."""
        assert self._socket is not None
        if self._descriptor < 0:
            return self._socket.send(self._left)
        sent = socket.send_fds(self._socket, [self._left], [self._descriptor])
        self._close_descriptor()
        return sent

    def _close_descriptor(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    # The connection.

    def _begin(self) -> None:
        self._scheduled = False
        self._pump()

    def _pump(self) -> None:
        """Send what waits, as far as the connection takes it."""
        with self._turn:
            if self._transport is None:
                if self._connecting is None and self._outbox.has_waiting() and not self._closed:
                    self._connecting = self._loop.create_task(self._connect())
                return
            if self._socket is not None:
                if self._send_some():
                    self._loop.remove_writer(self._socket)
                else:
                    self._loop.add_writer(self._socket, self._pump)
                return
            while self._ready and not self._full and (block := self._next_block()) is not None:
                self._num_blocks += 1
                self._transport.write(block)

    def _find(self) -> None:
        """Note where the peer is now."""
        self._place = self._address()
        host, _, port = self._place.rpartition(":")
        self._host, self._port = host.strip("[]"), int(port)

    async def _connect(self) -> None:
        await asyncio.sleep(self._again_at - self._loop.time())
        self._find()
        try:
            async with asyncio.timeout(GREETING_SECONDS):
                if not await self._connect_here():
                    await self._loop.create_connection(
                        lambda: self,
                        self._host,
                        self._port,
                        ssl=self._tls,
                        server_hostname=self._host if self._tls else None,
                    )
        except (OSError, TimeoutError):
            self._drop()
        finally:
            self._connecting = None
        self._pump()  # for what was queued when this attempt had failed already

    async def _connect_here(self) -> bool:
        """Connect to a peer on this machine by its Unix socket; return whether it has one."""
        name = None if self._tls else same_machine.name_of(self._host, self._port)
        if name is None:
            return False
        try:
            await self._loop.create_unix_connection(lambda: self, name)
        except ConnectionRefusedError:
            return False
        return True

    def _drop(self) -> None:
        """Drop what waits: the peer cannot be reached."""
        self._again_at = self._loop.time() + AGAIN_SECONDS
        self._outbox.drop()

    def connection_made(self, transport: Any) -> None:
        """Wait for the greeting."""
        with self._turn:
            self._forget()
            self._transport = transport
        transport.set_write_buffer_limits(encoding.BLOCK_BYTES)
        connected = transport.get_extra_info("socket")
        same_machine.enlarge_buffers(connected)
        # A machine that is lost sends no reset.
        if hasattr(socket, "TCP_USER_TIMEOUT") and connected.family != socket.AF_UNIX:
            connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * IDLE_SECONDS))

    def connection_lost(self, exception: Exception | None) -> None:
        """Forget what travelled; connect again for what waits."""
        refused = not self._ready
        with self._turn:
            self._forget()
        if refused:
            self._drop()
        self._pump()

    def close(self) -> None:
        """Send no more."""
        self._closed = True
        if self._connecting is not None:
            self._connecting.cancel()
        if self._transport is not None:
            self._transport.abort()

    def look(self, now: float) -> None:
        """Close a connection on which nothing has moved for long, or whose peer is elsewhere now."""
        if self._transport is None:
            return
        if self._address() != self._place:
            self._transport.abort()
            return
        moved = (self._num_blocks, len(self._left) + self._transport.get_write_buffer_size())
        if moved != self._moved or (self._ready and self._is_sent()):
            self._moved, self._moved_at = moved, now
        elif now - self._moved_at > (IDLE_SECONDS if self._ready else GREETING_SECONDS):
            self._transport.abort()

    def _is_sent(self) -> bool:
        size = self._transport.get_write_buffer_size() if self._transport is not None else 0
        return not self._outbox.has_waiting() and self._blocks is None and not self._left and not size

    def is_idle(self) -> bool:
        """Return whether all messages are delivered or dropped."""
        return self._is_sent() and self._outbox.is_empty() and self._connecting is None

    # What the peer says.

    def data_received(self, data: bytes) -> None:
        """Greet, or note what the peer has handled."""
        self._heard += data
        try:
            while self._take():
                pass
        except greeting.Refused:
            self._transport.abort()

    def _take(self) -> bool:
        """Take the next part of what the peer says; return whether it was complete."""
        if not self._expected:
            challenge = self._part(greeting.CHALLENGE_BYTES)
            if challenge:
                mine, self._expected = greeting.answer(self._token, challenge, self._lane)
                self._transport.write(mine)
            return bool(challenge)
        if not self._ready:
            proof = self._part(greeting.WELCOME_BYTES)
            if proof:
                greeting.compare(proof, self._expected)
                if self._tls is None:
                    self._socket = same_machine.same_connection(self._transport.get_extra_info("socket"))
                self._ready = True
                self._pump()
            return bool(proof)
        ack = self._part(ACK.size)
        if ack:
            handled, returned = ACK.unpack(ack)
            self._outbox.note_handled(handled)
            if returned:
                self._lender.give_back(returned)
        return bool(ack)

    def _part(self, count: int) -> bytes:
        if len(self._heard) < count:
            return b""
        part = bytes(self._heard[:count])
        del self._heard[:count]
        return part

    # What is sent.

    def pause_writing(self) -> None:
        """Stop until the kernel has taken what was written."""
        self._full = True

    def resume_writing(self) -> None:
        """Continue."""
        self._full = False
        self._pump()

    def _next_block(self) -> Buffer | None:
        """Return the next bytes to send: a block of a large message, or all small messages that wait."""
        if self._blocks is not None:
            block = next(self._blocks, None)
            if block is not None:
                return block
            assert self._sending is not None
            self._sending.forget_arrays()
            self._sending = self._blocks = None
        taken = self._outbox.take()
        if not taken:
            return None
        if self._lane == BULK:
            self._sending = taken[0]
            self._blocks = self._blocks_of(self._sending)
            return next(self._blocks)
        return b"".join(part for each in taken for part in each)

    def _blocks_of(self, message: encoding.Encoded) -> Iterator[Buffer]:
        """Return the blocks of a large message; within a machine, its arrays are put into lent memory instead."""
        shared = self._socket is not None and self._socket.family == socket.AF_UNIX
        if not shared or message.num_bytes < lent_memory.LEAST_BYTES:
            return iter(message)
        loan = lent_memory.loan_of(message.arrays)
        passed = None if loan is None else self._lender.pass_on(loan)
        if loan is not None and passed is not None:
            self._descriptor, notice = passed
            return iter([notice, message.placed(loan.checksums)])
        lent = self._lender.lend(message.placed_bytes)
        if lent is None:
            return iter(message)
        segment, notice = lent
        self._descriptor = segment.take_descriptor()
        return itertools.chain([notice], message.place(segment.memory))
