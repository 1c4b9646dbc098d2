"""Where the processes of a job meet: reaching the coordinator in bounded time, and listening nowhere else than told.

JAX by itself waits five minutes for a coordinator and then aborts without a Python exception, listens on every
interface, and lets gloo listen wherever the name of the machine leads. Here each is decided beforehand, and said.
"""

import contextlib
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator

import jax

from jaxdist.errors import ExitStatus, TryAgain, UserError
from jaxdist.launch.joining import places
from jaxdist.spmd import jax_private

CONNECT_SECONDS = "JAXDIST_CONNECT_SECONDS"
"""Environment variable: how long the processes of a job wait for each other at its start."""
_DEFAULT_CONNECT_SECONDS = 300.0
_RETRY_SECONDS = 0.2
_TRY_SECONDS = 3.0
_TLS = ("jax_mtls_cert_file", "jax_mtls_key_file", "jax_mtls_ca_file", "jax_mtls_peer_uri_prefix")


def join(place: places.Place) -> None:
    """Join the job.

    Raises:
      UserError: the port is taken, the address is of another machine, TLS is asked for of a JAX that has none.
      TryAgain: the coordinator cannot be reached, or not all processes came in time.
    """
    check_tls()
    seconds = connect_seconds()
    deadline = time.monotonic() + seconds
    if place.process_id == 0:
        if place.engine != places.LAUNCHER:  # which holds the port for us
            check_free(place.bind_address)
    else:
        await_coordinator(place, deadline)
    late = f"Not all {place.num_processes} processes came to {place.coordinator} in {seconds:g} s"
    if place.process_id == 0:
        late += f" (process 0 listens at {own_address(place.bind_address)})"
    with _leaving_at(deadline, late):
        jax.distributed.initialize(
            coordinator_address=place.coordinator,
            # By default the coordinator would listen on every interface of the machine.
            coordinator_bind_address=place.bind_address,
            num_processes=place.num_processes,
            process_id=place.process_id,
            local_device_ids=place.local_device_ids,
            cluster_detection_method="deactivate",
            # At the end of this time JAX aborts; the limit that matters is ours.
            initialization_timeout=int(2 * seconds) + 60,
        )
    jax_private.use_gloo_at(own_address(place.coordinator if place.process_id else place.bind_address))


def connect_seconds() -> float:
    """Return how long to wait for the other processes."""
    text = os.environ.get(CONNECT_SECONDS, str(_DEFAULT_CONNECT_SECONDS))
    try:
        return float(text)
    except ValueError:
        raise UserError(f"{CONNECT_SECONDS} is a number of seconds; got {text!r}.") from None


def check_free(address: str) -> None:
    """Raise UserError unless this process can listen at `address`, HOST:PORT.

    The coordinator itself would not notice: gRPC shares a port with any process that agrees to share it.
    """
    host, port = split(address)
    try:
        family, kind, _, _, target = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(target)
            probe.listen()
    except OSError as error:
        raise UserError(
            f"Process 0 must be able to listen at {address}: {error.strerror or error}. Free the port, choose another "
            f"({places.PORT} on a cluster), or start process 0 on the host that has this address."
        ) from error


def await_coordinator(place: places.Place, deadline: float) -> None:
    """Return once the coordinator takes connections; raise TryAgain at the deadline, saying what stood in the way."""
    address = split(place.coordinator)
    begun = time.monotonic()
    while True:
        try:
            with socket.create_connection(address, timeout=min(_TRY_SECONDS, max(0.1, deadline - time.monotonic()))):
                return
        except OSError as error:
            if time.monotonic() + _RETRY_SECONDS >= deadline:
                raise TryAgain(
                    f"Process {place.process_id} could not reach the coordinator at {place.coordinator} in "
                    f"{time.monotonic() - begun:.0f} s: {error.strerror or error}. Is process 0 running, is the "
                    f"address right, does a firewall stand between? {CONNECT_SECONDS} sets the time."
                ) from error
        time.sleep(_RETRY_SECONDS)


def own_address(coordinator: str) -> str:
    """Return the address of the interface of this machine that leads to the coordinator; nothing is sent."""
    host, port = split(coordinator)
    family, _, _, _, target = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(target)
        return probe.getsockname()[0]


def check_tls() -> None:
    """Raise UserError where mutual TLS is asked for, by JAX's own settings, and this JAX has none."""
    wanted = [name.upper() for name in _TLS if os.environ.get(name.upper())]
    if wanted and not hasattr(jax.config, _TLS[0]):
        raise UserError(
            f"{', '.join(wanted)} asks for mutual TLS, which jax {jax.__version__} does not have. Install jax 0.12, or "
            "unset it and use a network of the job's own (docs/security.md)."
        )


def split(address: str) -> tuple[str, int]:
    """Return host and port of HOST:PORT, an IPv6 host in brackets."""
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


@contextlib.contextmanager
def _leaving_at(deadline: float, message: str) -> Iterator[None]:
    """End this process at the deadline unless the context is over: it is in native code that takes no interruption."""

    def leave() -> None:
        print(f"jaxdist: {message}. Start them all; {CONNECT_SECONDS} sets the time.", file=sys.stderr, flush=True)
        os._exit(ExitStatus.RETRY)

    timer = threading.Timer(max(0.0, deadline - time.monotonic()), leave)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
