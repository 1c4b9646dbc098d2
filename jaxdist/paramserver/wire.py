"""Messages between processes over gRPC: raw bytes in blocks of at most 4 MiB, a deadline on every call.

One call carries one message, as a stream of blocks, and is answered with nothing once the receiver has taken it
in. A message that cannot be delivered is dropped: whoever needs an answer asks again. Each peer has one sender with a
queue of bounded bytes, and the receiver takes in a bounded number of bytes at a time: memory is bounded on both ends.
"""

import collections
import hmac
import ipaddress
import os
import threading
from collections.abc import Callable, Iterator
from concurrent import futures
from dataclasses import dataclass
from typing import Any

from jaxdist.paramserver import encoding, messages

METHOD = "/jaxdist.ParameterServer/Deliver"
MAX_BYTES_IN_FLIGHT = 256 << 20
DEADLINE_SECONDS = 30.0
_TOKEN = "jaxdist-token"


@dataclass(frozen=True)
class Security:
    """How processes prove to each other that they belong together.

    Attributes:
      token: a secret all processes of a run share; sent with every call.
      certificate: PEM chain of this process, for mutual TLS together with `key` and `root`.
      key: its PEM private key.
      root: the PEM certificate that signed every process's.
    """

    token: str = ""
    certificate: bytes = b""
    key: bytes = b""
    root: bytes = b""

    def check(self, host: str) -> None:
        """Raise ValueError unless this is enough for `host`."""
        if bool(self.certificate) != bool(self.key) or bool(self.certificate) != bool(self.root):
            raise ValueError("mutual TLS needs all three: a certificate, its key and the root that signed it")
        if not is_loopback(host) and not self.token and not self.certificate:
            raise ValueError(
                f"{host} can be reached from other machines, and anyone there could push: give a token or "
                "certificates, or listen on 127.0.0.1"
            )


def is_loopback(host: str) -> bool:
    """Return True for an address that only this machine can reach."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Wire:
    """One process's connection to its peers.

    Args:
      listen: `host:port` to listen on; port 0 takes a free one (see `port`).
      peers: process name -> `host:port`.
      receive: called, from a gRPC thread, with every message that arrives whole.
      security: see Security.

    Raises:
      ValueError: the address needs more security than there is.
      OSError: the address is taken.
    """

    def __init__(
        self,
        *,
        listen: str,
        peers: dict[str, str],
        receive: Callable[[messages.Message], None],
        security: Security = Security(),
    ) -> None:
        import grpc

        self._grpc = grpc
        self._receive, self._security, self.peers = receive, security, dict(peers)
        security.check(listen.rpartition(":")[0])
        self._budget = _Budget(MAX_BYTES_IN_FLIGHT)
        self._senders: dict[str, _Sender] = {}
        self._server = grpc.server(futures.ThreadPoolExecutor(16), options=_OPTIONS)
        handler = grpc.stream_unary_rpc_method_handler(self._deliver)
        service, method = METHOD[1:].split("/")
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {method: handler}),))
        self.port = self._bind(listen)
        self._server.start()

    def _bind(self, listen: str) -> int:
        s = self._security
        try:
            if s.certificate:
                pair = [(s.key, s.certificate)]
                credentials = self._grpc.ssl_server_credentials(pair, s.root, require_client_auth=True)
                return self._server.add_secure_port(listen, credentials)
            return self._server.add_insecure_port(listen)
        except RuntimeError as error:
            raise OSError(f"cannot listen on {listen}: {error}") from error

    def _deliver(self, blocks: Iterator[bytes], context: Any) -> bytes:
        grpc = self._grpc
        if self._security.token:
            given = dict(context.invocation_metadata()).get(_TOKEN, "")
            if not hmac.compare_digest(given, self._security.token):
                context.abort(grpc.StatusCode.UNAUTHENTICATED, "the token is missing or another one")
        size = 0
        try:
            parts = []
            for block in blocks:
                self._budget.take(len(block))
                size += len(block)
                parts.append(block)
            message = encoding.decode(parts[0] if len(parts) == 1 else b"".join(parts))
        except encoding.EncodingError as error:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        else:
            self._receive(message)
        finally:
            self._budget.give(size)
        return b""

    def send(self, to: str, message: messages.Message) -> None:
        """Queue `message` for the process named `to`; it is dropped when that cannot be reached."""
        if to not in self._senders:
            if to not in self.peers:
                return
            self._senders[to] = _Sender(self._channel(self.peers[to]), self._security.token)
        self._senders[to].put(encoding.encode(message))

    def _channel(self, address: str) -> Any:
        s = self._security
        if s.certificate:
            credentials = self._grpc.ssl_channel_credentials(s.root, s.key, s.certificate)
            return self._grpc.secure_channel(address, credentials, options=_OPTIONS)
        return self._grpc.insecure_channel(address, options=_OPTIONS)

    def flush(self, timeout_seconds: float) -> None:
        """Wait until what was queued is delivered or dropped, at most so long."""
        for sender in self._senders.values():
            sender.flush(timeout_seconds)

    def close(self) -> None:
        """Stop listening and sending."""
        for sender in self._senders.values():
            sender.close()
        self._server.stop(None)


class _Budget:
    """A number of bytes that may be held at once; one block always may."""

    def __init__(self, size: int) -> None:
        self._free, self._size = size, size
        self._changed = threading.Condition()

    def take(self, count: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._free >= count or self._free == self._size, DEADLINE_SECONDS)
            self._free -= count

    def give(self, count: int) -> None:
        with self._changed:
            self._free += count
            self._changed.notify_all()


class _Sender:
    """Sends to one peer, one message after the other, from a thread of its own."""

    def __init__(self, channel: Any, token: str) -> None:
        self._channel = channel
        self._metadata = ((_TOKEN, token),) if token else None
        self._call = channel.stream_unary(METHOD)
        self._queue: collections.deque[list[encoding.Buffer]] = collections.deque()
        self._bytes = 0
        self._closed = False
        self._changed = threading.Condition()
        threading.Thread(target=self._run, daemon=True, name="wire").start()

    def put(self, buffers: list[encoding.Buffer]) -> None:
        size = sum(map(len, buffers))
        with self._changed:
            # Whoever waits for an answer sends again; dropping is better than holding bytes without bound.
            if self._queue and self._bytes + size > MAX_BYTES_IN_FLIGHT:
                return
            self._queue.append(buffers)
            self._bytes += size
            self._changed.notify_all()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._closed)
                if self._closed:
                    return
                buffers = self._queue[0]
            self._deliver(buffers)
            with self._changed:
                self._queue.popleft()
                self._bytes -= sum(map(len, buffers))
                self._changed.notify_all()

    def _deliver(self, buffers: list[encoding.Buffer]) -> None:
        import grpc

        try:
            self._call(encoding.blocks(buffers), timeout=DEADLINE_SECONDS, metadata=self._metadata)
        except (grpc.RpcError, ValueError):  # a channel that was closed meanwhile raises ValueError
            return

    def flush(self, timeout_seconds: float) -> None:
        with self._changed:
            self._changed.wait_for(lambda: not self._queue, timeout_seconds)

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._channel.close()


_OPTIONS = (
    ("grpc.max_receive_message_length", encoding.FRAME_BYTES + 1024),
    ("grpc.max_send_message_length", encoding.FRAME_BYTES + 1024),
    # A peer that comes back is found again at once, whatever the back-off has grown to.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 500),
    ("grpc.so_reuseport", 0),
)


def new_token() -> str:
    """Return a fresh secret for one run."""
    return os.urandom(16).hex()
