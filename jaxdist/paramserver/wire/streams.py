"""Messages between processes over gRPC: raw bytes in blocks of at most 2 MiB, with a deadline on every call.

One call carries one message as a stream of blocks, and returns an empty response once the receiver has handled it. A
message that cannot be delivered is dropped: a process that needs an answer sends its request again. Each peer has one
sender with a queue of limited size, and the receiver holds a limited number of bytes at a time, so memory is bounded
at both ends.
"""

import collections
import contextlib
import ctypes
import hmac
import itertools
import os
import threading
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Any

from jaxdist import extras
from jaxdist.paramserver.protocol import messages
from jaxdist.paramserver.wire import codec, encoding
from jaxdist.paramserver.wire.security import UNSECURED, Security

METHOD = "/jaxdist.ParameterServer/Deliver"
MAX_BYTES_IN_FLIGHT = 256 << 20
DEADLINE_SECONDS = 30.0
_METADATA = "jaxdist-token"


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
      peers: process name -> `host:port`.
      receive: called from a gRPC thread with every complete message.
      security: see Security.

    Raises:
      ValueError: the address needs authentication and `security` has none.
      OSError: the address is in use, or belongs to another machine.
    """

    def __init__(
        self,
        *,
        listen: str,
        peers: dict[str, str],
        receive: Callable[[messages.Message], None],
        security: Security = UNSECURED,
    ) -> None:
        # Below this level gRPC logs peers that have ended, which is normal here.
        os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
        self._grpc = grpc = extras.require("grpc", extra="paramserver")
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
            raise OSError(
                f"Cannot listen on {listen}: the port is in use, or the address belongs to another machine."
            ) from error

    def _deliver(self, blocks: Iterator[bytes], context: Any) -> bytes:
        grpc = self._grpc
        if self._security.token:
            given = dict(context.invocation_metadata()).get(_METADATA, "")
            if not hmac.compare_digest(given, self._security.token):
                context.abort(grpc.StatusCode.UNAUTHENTICATED, "The token is missing or wrong.")
        try:
            self._take_in(blocks)
        except codec.EncodingError as error:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        return b""

    def _take_in(self, blocks: Iterator[bytes]) -> None:
        """Receive one message; its bytes count against the budget until `receive` returns."""
        first = next(blocks, b"")
        with self._budget.held(encoding.declared_bytes(first)):
            self._receive(encoding.decode(itertools.chain([first], blocks)))

    def send(self, to: str, message: messages.Message) -> None:
        """Queue `message` for the process named `to`; it is dropped if that process cannot be reached."""
        if to not in self._senders:
            if to not in self.peers:
                return
            self._senders[to] = _Sender(self._channel(self.peers[to]), self._security.token, self._grpc.RpcError)
        self._senders[to].put(encoding.encode(message))

    def _channel(self, address: str) -> Any:
        s = self._security
        if s.certificate:
            credentials = self._grpc.ssl_channel_credentials(s.root, s.key, s.certificate)
            return self._grpc.secure_channel(address, credentials, options=_OPTIONS)
        return self._grpc.insecure_channel(address, options=_OPTIONS)

    def flush(self, timeout_seconds: float) -> None:
        """Wait, at most `timeout_seconds` for each peer, until all queued messages are delivered or dropped."""
        for sender in self._senders.values():
            sender.flush(timeout_seconds)

    def close(self) -> None:
        """Stop listening and sending."""
        for sender in self._senders.values():
            sender.close()
        self._server.stop(None)


class _Budget:
    """Limits the bytes held at once. A message waits until all its bytes fit; one of any size fits alone."""

    def __init__(self, size: int) -> None:
        self._free, self._size = size, size
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def held(self, count: int, seconds: float = DEADLINE_SECONDS) -> Iterator[None]:
        count = min(count, self._size)
        with self._changed:
            if not self._changed.wait_for(lambda: self._free >= count, seconds):
                raise codec.EncodingError(f"No memory became free for a message of {count} bytes within {seconds:g} s.")
            self._free -= count
        try:
            yield
        finally:
            with self._changed:
                self._free += count
                self._changed.notify_all()


class _Sender:
    """Sends messages to one peer, one after the other, from its own thread."""

    def __init__(self, channel: Any, token: str, rpc_error: type[Exception]) -> None:
        self._channel, self._rpc_error = channel, rpc_error
        self._metadata = ((_METADATA, token),) if token else None
        self._call = channel.stream_unary(METHOD)
        self._queue: collections.deque[encoding.Encoded] = collections.deque()
        self._bytes = 0
        self._closed = False
        self._changed = threading.Condition()
        threading.Thread(target=self._run, daemon=True, name="wire").start()

    def put(self, message: encoding.Encoded) -> None:
        with self._changed:
            # A repeated message is not queued while the first one is still queued or being sent.
            if any(message.is_same(other) for other in self._queue):
                return
            # The caller repeats what is not answered, so dropping is better than unbounded memory.
            if self._queue and self._bytes + message.num_bytes > MAX_BYTES_IN_FLIGHT:
                return
            self._queue.append(message)
            self._bytes += message.num_bytes
            self._changed.notify_all()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._closed)
                if self._closed:
                    return
                message = self._queue[0]
            self._deliver(message)
            with self._changed:
                self._queue.popleft()
                self._bytes -= message.num_bytes
                self._changed.notify_all()

    def _deliver(self, message: encoding.Encoded) -> None:
        try:
            self._call(iter(message), timeout=DEADLINE_SECONDS, metadata=self._metadata)
        except (self._rpc_error, ValueError):  # a closed channel raises ValueError
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
    # A restarted peer is reached at once, however long the back-off has become.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 500),
    ("grpc.so_reuseport", 0),
)
