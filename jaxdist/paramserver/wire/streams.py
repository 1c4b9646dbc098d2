"""Messages between processes over sockets: raw bytes in blocks, on one or two lasting connections to each peer.

Small messages travel on one connection, large ones on another, so neither waits for the other. Each peer has a queue of
limited size, and the receiver holds a limited number of bytes at a time, so memory is bounded at both ends. All sockets
of a process belong to one thread with an event loop.
"""

import asyncio
import contextlib
import ctypes
import dataclasses
import socket
import ssl
import tempfile
import threading
from collections.abc import Mapping

from jaxdist.paramserver.protocol import messages
from jaxdist.paramserver.wire import encoding, same_machine
from jaxdist.paramserver.wire.incoming import (
    BULK,
    CONTROL,
    GREETING_SECONDS,
    SCRATCH_BYTES,
    SMALL_BYTES,
    Budget,
    Incoming,
    Receive,
)
from jaxdist.paramserver.wire.outbox import MAX_BYTES_IN_FLIGHT
from jaxdist.paramserver.wire.outgoing import Outgoing
from jaxdist.paramserver.wire.security import UNSECURED, Security

MOST_STRANGERS = 128
"""Connections that have not greeted yet; when more are opened, the oldest are closed."""
_LOOK_SECONDS = 1.0


def reuse_freed_memory() -> None:
    """Keep freed memory in this process (glibc): new pages from the kernel cost more than copying the data."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        trim_threshold, mmap_threshold = -1, -3
        mallopt(trim_threshold, 1 << 30)
        mallopt(mmap_threshold, 32 << 20)


class Wire:
    """One process's connection to its peers.

    Args:
      listen: `host:port` to listen on; port 0 chooses a free one (see `port`).
      peers: process name -> `host:port`; asked again when a connection is made, so it may change.
      receive: called from the thread of the wire with every complete message; it must not wait.
      security: see Security.
      receive_small: called instead of `receive` with messages of at most SMALL_BYTES.

    Raises:
      ValueError: the address needs authentication and `security` has none.
      OSError: the address is in use, or belongs to another machine.
    """

    def __init__(
        self,
        *,
        listen: str,
        peers: Mapping[str, str],
        receive: Receive,
        security: Security = UNSECURED,
        receive_small: Receive | None = None,
    ) -> None:
        host, _, port = listen.rpartition(":")
        security.check(host)
        self._receive = {CONTROL: receive_small or receive, BULK: receive}
        self._token, self.peers = security.token, peers
        self._tls = tls_of(security)
        listeners = _listen(host.strip("[]"), int(port), local=self._tls is None)
        self.port = listeners[0].getsockname()[1]
        self._budget = Budget(MAX_BYTES_IN_FLIGHT)
        self._scratch = memoryview(bytearray(SCRATCH_BYTES))
        self._incoming: dict[Incoming, None] = {}
        self._outgoing: dict[tuple[str, int], Outgoing] = {}
        self._lock = threading.Lock()
        self._closing = asyncio.Event()
        self._loop = asyncio.new_event_loop()
        # A peer that ends, or a stranger, is normal here.
        self._loop.set_exception_handler(lambda loop, context: None)
        self._thread = threading.Thread(target=self._run, args=(listeners,), daemon=True, name="wire")
        self._thread.start()

    def _run(self, listeners: list[socket.socket]) -> None:
        self._loop.run_until_complete(self._serve(*listeners))
        self._loop.close()

    async def _serve(self, listener: socket.socket, *local: socket.socket) -> None:
        listening = self._tls.listening if self._tls else None
        servers = [
            await self._loop.create_server(
                self._greet, sock=listener, ssl=listening, ssl_handshake_timeout=GREETING_SECONDS if listening else None
            )
        ]
        servers += [await self._loop.create_unix_server(self._greet, sock=each) for each in local]
        while not self._closing.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._closing.wait(), _LOOK_SECONDS)
            now = self._loop.time()
            for each in self._connections():
                each.look(now)
        for server in servers:
            server.close()
        for each in self._connections():
            each.close()
        await asyncio.sleep(0)  # a connection closes in the next round of the loop, one with TLS in the one after
        await asyncio.sleep(0)

    def _connections(self) -> list[Incoming | Outgoing]:
        return [*self._incoming, *self._outgoing.values()]

    def _greet(self) -> Incoming:
        """Return the protocol of a new connection, and make room for it among those that have not greeted."""
        strangers = [each for each in self._incoming if each.lane is None]
        for stranger in strangers[: max(len(strangers) + 1 - MOST_STRANGERS, 0)]:
            stranger.close()
        return Incoming(self._loop, self._token, self._budget, self._receive, self._incoming, self._scratch)

    def send(self, to: str, message: messages.Message) -> None:
        """Queue `message` for the process named `to`; it is dropped if that process cannot be reached."""
        encoded = encoding.encode(message)
        lane = CONTROL if encoded.num_bytes <= SMALL_BYTES else BULK
        link = self._outgoing.get((to, lane))
        if link is None:
            if to not in self.peers:
                return
            calling = self._tls.calling if self._tls else None
            with self._lock:
                made = Outgoing(self._loop, lambda: self.peers[to], lane, self._token, calling)
                link = self._outgoing.setdefault((to, lane), made)
        link.put(encoded)

    def flush(self, timeout_seconds: float) -> None:
        """Wait, at most `timeout_seconds`, until all queued messages are delivered or dropped."""
        waiting = asyncio.run_coroutine_threadsafe(self._flush(), self._loop)
        with contextlib.suppress(TimeoutError):
            waiting.result(timeout_seconds)

    async def _flush(self) -> None:
        while not all(link.is_idle() for link in list(self._outgoing.values())):
            await asyncio.sleep(0.005)

    def close(self) -> None:
        """Stop listening and sending."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._closing.set)
        self._thread.join()


@dataclasses.dataclass(frozen=True)
class Tls:
    """Mutual TLS: the contexts of both ends."""

    listening: ssl.SSLContext
    calling: ssl.SSLContext


def tls_of(security: Security) -> Tls | None:
    """Return the TLS of these settings; None without certificates."""
    if not security.certificate:
        return None
    contexts = Tls(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT))
    with tempfile.NamedTemporaryFile() as pem:  # the ssl module reads keys from files only
        pem.write(security.key + b"\n" + security.certificate)
        pem.flush()
        for context in (contexts.listening, contexts.calling):
            context.minimum_version = ssl.TLSVersion.TLSv1_3
            context.verify_mode = ssl.CERT_REQUIRED
            context.load_verify_locations(cadata=security.root.decode())
            context.load_cert_chain(pem.name, password=_refuse_encrypted)
    return contexts


def _refuse_encrypted() -> str:
    # Without this function OpenSSL would ask at the terminal, once for every process of the run.
    raise ValueError("the key is encrypted")


def _listen(host: str, port: int, *, local: bool) -> list[socket.socket]:
    """Return the socket that listens on this address and, if `local`, the one for this machine beside it."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=1024)
        try:
            beside = same_machine.listen(host, listener.getsockname()[1]) if local else None
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise OSError(
            f"Cannot listen on {host}:{port}: the port is in use, or the address belongs to another machine."
        ) from error
    return [listener] if beside is None else [listener, beside]
