"""How processes connect to the coordinator of a job: within a time limit, and only at the addresses that are set.

By itself, JAX waits five minutes for a coordinator and then aborts without a Python exception, listens on every
interface, and lets gloo listen at whatever address the host name resolves to. Here all of these are set explicitly.
"""

import contextlib
import os
import socket
import threading
import time
from collections.abc import Iterator

import jax

from jaxdist.errors import ExitStatus, TryAgain, UserError, say
from jaxdist.launch.joining import places
from jaxdist.spmd import jax_private

CONNECT_SECONDS = "JAXDIST_CONNECT_SECONDS"
"""Environment variable: how many seconds the processes of a job wait for each other at its start."""
_DEFAULT_CONNECT_SECONDS = 300.0
_RETRY_SECONDS, _LONGEST_RETRY_SECONDS = 0.01, 0.2
_TRY_SECONDS = 3.0
_HEARTBEAT_SECONDS, _NO_HEARTBEAT_SECONDS = 100, 100_000_000
_TLS = ("jax_mtls_cert_file", "jax_mtls_key_file", "jax_mtls_ca_file", "jax_mtls_peer_uri_prefix")


def join(place: places.Place) -> None:
    """Join the job.

    Raises:
      UserError: the port is in use, the address belongs to another machine, or this JAX does not have TLS.
      TryAgain: the coordinator cannot be reached, or not all processes connected in time.
    """
    check_tls()
    seconds = connect_seconds()
    deadline = time.monotonic() + seconds
    if place.process_id == 0:
        if place.engine != places.LAUNCHER:  # our launcher reserves the port
            check_free(place.bind_address)
    else:
        await_coordinator(place, deadline)
    late = f"Not all {place.num_processes} processes connected to {place.coordinator} within {seconds:g} s"
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
            # At the end of this time JAX aborts; our own limit comes first.
            initialization_timeout=int(2 * seconds) + 60,
            heartbeat_timeout_seconds=_heartbeat_seconds(place),
        )
    jax_private.use_gloo_at(own_address(place.coordinator if place.process_id else place.bind_address))


def _heartbeat_seconds(place: places.Place) -> int:
    """Return after how many seconds of silence JAX aborts a job: of one machine that has a supervisor, never.

    JAX reads the clock of the machine for it, and aborts all healthy processes when that is set. The supervisor of one
    machine is told by the system of a process that ended, and by the watchdog of one that is stuck or stopped.
    """
    is_here = split(place.coordinator)[0] == places.LOOPBACK
    return _NO_HEARTBEAT_SECONDS if place.engine == places.LAUNCHER and is_here else _HEARTBEAT_SECONDS


def connect_seconds() -> float:
    """Return how long to wait for the other processes."""
    text = os.environ.get(CONNECT_SECONDS, str(_DEFAULT_CONNECT_SECONDS))
    try:
        return float(text)
    except ValueError:
        raise UserError(f"{CONNECT_SECONDS} is a number of seconds; got {text!r}.") from None


def check_free(address: str) -> None:
    """Raise UserError unless this process can listen at `address`, HOST:PORT.

    The coordinator itself would not notice: gRPC shares a port with any process that allows sharing.
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
    """Return once the coordinator takes connections; raise TryAgain with the reason at the deadline."""
    address = split(place.coordinator)
    begun, pause = time.monotonic(), _RETRY_SECONDS
    while True:
        try:
            with socket.create_connection(address, timeout=min(_TRY_SECONDS, max(0.1, deadline - time.monotonic()))):
                return
        except OSError as error:
            if time.monotonic() + pause >= deadline:
                raise TryAgain(
                    f"Process {place.process_id} could not reach the coordinator at {place.coordinator} within "
                    f"{time.monotonic() - begun:.0f} s: {error.strerror or error}. Check that process 0 is running, "
                    f"the address, and the firewall. {CONNECT_SECONDS} sets the time limit."
                ) from error
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_RETRY_SECONDS)


def own_address(peer: str) -> str:
    """Return the address of the interface of this machine that leads to `peer`, HOST:PORT; nothing is sent."""
    host, port = split(peer)
    family, _, _, _, target = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(target)
        return probe.getsockname()[0]


def check_tls() -> None:
    """Raise UserError if the settings of JAX ask for mutual TLS and this version of JAX does not have it."""
    wanted = [name.upper() for name in _TLS if os.environ.get(name.upper())]
    if wanted and not hasattr(jax.config, _TLS[0]):
        raise UserError(
            f"{', '.join(wanted)} asks for mutual TLS, which jax {jax.__version__} does not have. Install jax 0.12, or "
            "unset it and use a network for this job only (docs/guide/security.md)."
        )


def split(address: str) -> tuple[str, int]:
    """Return host and port of HOST:PORT, an IPv6 host in brackets."""
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


@contextlib.contextmanager
def _leaving_at(deadline: float, message: str) -> Iterator[None]:
    """End this process at the deadline unless the context has ended: native code cannot be interrupted."""

    def leave() -> None:
        say(f"{message}. Start all of them. {CONNECT_SECONDS} sets the time limit.")
        os._exit(ExitStatus.RETRY)

    timer = threading.Timer(max(0.0, deadline - time.monotonic()), leave)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
