"""How the processes of a run prove that they belong together: a shared token, mutual TLS, or the loopback address."""

import hmac
import ipaddress
import os
import pathlib
from collections.abc import Mapping
from dataclasses import dataclass, replace

TOKEN = "JAXDIST_PS_TOKEN"
"""Environment variable with the run's secret, so that it is in no file and on no command line."""
CERTIFICATE, KEY, ROOT = "JAXDIST_PS_CERTIFICATE", "JAXDIST_PS_KEY", "JAXDIST_PS_ROOT"
"""Environment variables with the paths of the PEM files for mutual TLS."""


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

    @classmethod
    def read(cls, environment: Mapping[str, str]) -> "Security":
        """Return what `environment` says: a token itself, or the three files' paths; see TOKEN and CERTIFICATE."""
        paths = [environment.get(name, "") for name in (CERTIFICATE, KEY, ROOT)]
        return cls(environment.get(TOKEN, ""), *(pathlib.Path(path).read_bytes() if path else b"" for path in paths))

    def for_attempt(self, attempt: str) -> "Security":
        """Return these with a token of their own for one attempt, which refuses processes left over from another.

        Terms and incarnations begin anew with every attempt, so nothing else would tell those apart.
        """
        if not self.token and not self.certificate:
            return self
        return replace(self, token=hmac.new(self.token.encode(), attempt.encode(), "sha256").hexdigest())

    def check(self, host: str) -> None:
        """Raise ValueError unless this is enough for `host`."""
        if bool(self.certificate) != bool(self.key) or bool(self.certificate) != bool(self.root):
            raise ValueError("mutual TLS needs all three: a certificate, its key and the root that signed it")
        if not is_loopback(host) and not self.token and not self.certificate:
            raise ValueError(
                f"{host} can be reached from other machines, and anyone there could push: give a token (in {TOKEN}) "
                f"or certificates (in {CERTIFICATE}, {KEY} and {ROOT}), or listen on 127.0.0.1"
            )


UNSECURED = Security()
"""Enough between processes that listen on the loopback address."""


def is_loopback(host: str) -> bool:
    """Return True for an address that only this machine can reach."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def new_token() -> str:
    """Return a fresh secret for one run."""
    return os.urandom(16).hex()
