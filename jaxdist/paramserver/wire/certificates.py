"""Whether the certificates of this machine will be accepted, found out before a run begins."""

import contextlib
import ssl

from jaxdist.paramserver.wire import streams
from jaxdist.paramserver.wire.security import CERTIFICATE, KEY, ROOT, Security

_ROUNDS = 3
"""How often either end speaks in a handshake, at most."""


def check(security: Security, host: str) -> None:
    """Raise ValueError unless a process at `host` with these certificates is accepted by others with the same root."""
    try:
        tls = streams.tls_of(security)
        if tls is not None:
            _shake_hands(tls, host)
    except (ssl.SSLError, ValueError) as error:  # ValueError: a file that is not text
        reason = (getattr(error, "verify_message", "") or str(error)).partition(" (_ssl.c")[0].rstrip(".")
        raise ValueError(
            f"The certificate of {CERTIFICATE}, its {KEY} and the {ROOT} that signed it do not fit each other or the "
            f"address {host}, or have expired: {reason}. Correct the files; `openssl verify -CAfile ROOT CERTIFICATE` "
            "says more."
        ) from error


def _shake_hands(tls: streams.Tls, host: str) -> None:
    """Let the two ends of a connection, both with the certificates of this machine, check each other."""
    to_caller, to_listener = ssl.MemoryBIO(), ssl.MemoryBIO()
    caller = tls.calling.wrap_bio(to_caller, to_listener, server_hostname=host.strip("[]"))
    listener = tls.listening.wrap_bio(to_listener, to_caller, server_side=True)
    for _ in range(_ROUNDS):
        for end in (caller, listener):
            with contextlib.suppress(ssl.SSLWantReadError):
                end.do_handshake()
