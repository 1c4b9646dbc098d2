"""Whether the certificates of this machine will be accepted, found out before a run begins."""

import contextlib
import datetime
import math
import ssl
import time
from collections.abc import Mapping
from typing import Any

from jaxdist.errors import say
from jaxdist.paramserver.wire import streams
from jaxdist.paramserver.wire.security import CERTIFICATE, KEY, ROOT, Security

_ROUNDS = 3
"""How often either end speaks in a handshake, at most."""
_SOON_SECONDS = 7 * 24 * 3600.0
"""How long before they expire it is said: a run may take days, and a restarted process needs them."""


def check(security: Security, host: str) -> float | None:
    """Return when the first of the certificates expires, in seconds of the wall clock; None without certificates.

    Raises:
      ValueError: a process at `host` with these certificates is not accepted by others with the same root.
    """
    try:
        tls = streams.tls_of(security)
        return None if tls is None else _shake_hands(tls, host)
    except (ssl.SSLError, ValueError) as error:  # ValueError: a file that is not text
        reason = (getattr(error, "verify_message", "") or str(error)).partition(" (_ssl.c")[0].rstrip(".")
        raise ValueError(
            f"The certificate of {CERTIFICATE}, its {KEY} and the {ROOT} that signed it do not fit each other or the "
            f"address {host}, or have expired: {reason}. Correct the files; `openssl verify -CAfile ROOT CERTIFICATE` "
            "says more."
        ) from error


def say_if_soon(expires: float | None) -> None:
    """Tell the user of certificates that expire soon, at the time that `check` returned."""
    if expires is not None and expires - time.time() < _SOON_SECONDS:
        at = f"{datetime.datetime.fromtimestamp(expires, datetime.UTC):%d %B %Y, %H:%M} UTC"
        say(
            f"The certificate of {CERTIFICATE}, or the {ROOT} that signed it, expires on {at}. A process that is "
            "restarted after that ends the run."
        )


def _shake_hands(tls: streams.Tls, host: str) -> float:
    """Let the two ends of a connection, both with the certificates of this machine, check each other.

    Returns when the first of the certificates expires.
    """
    to_caller, to_listener = ssl.MemoryBIO(), ssl.MemoryBIO()
    caller = tls.calling.wrap_bio(to_caller, to_listener, server_hostname=host.strip("[]"))
    listener = tls.listening.wrap_bio(to_listener, to_caller, server_side=True)
    for _ in range(_ROUNDS):
        for end in (caller, listener):
            with contextlib.suppress(ssl.SSLWantReadError):
                end.do_handshake()
    own: Mapping[str, Any] = caller.getpeercert() or {}
    # The file of the root may hold others, which may be old.
    roots = [each for each in tls.calling.get_ca_certs() if each["subject"] == own["issuer"]]
    return min(_end(own), max(map(_end, roots), default=math.inf))


def _end(certificate: Mapping[str, Any]) -> float:
    return ssl.cert_time_to_seconds(certificate["notAfter"])
