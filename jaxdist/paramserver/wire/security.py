"""How the processes of a run authenticate to each other: a shared token, mutual TLS, or the loopback address."""

import hmac
import ipaddress
import os
import pathlib
from collections.abc import Mapping
from dataclasses import dataclass, replace

TOKEN = "JAXDIST_PS_TOKEN"
"""Environment variable with the secret of the run; it is not stored in a file or given on a command line."""
CERTIFICATE, KEY, ROOT = "JAXDIST_PS_CERTIFICATE", "JAXDIST_PS_KEY", "JAXDIST_PS_ROOT"
"""Environment variables with the paths of the PEM files for mutual TLS."""


@dataclass(frozen=True)
class Security:
    """How processes authenticate to each other.

    Attributes:
      token: secret that all processes of a run share; sent with every call.
      certificate: PEM chain of this process, for mutual TLS together with `key` and `root`.
      key: PEM private key of this process.
      root: PEM certificate that signed the certificates of all processes.
    """

    token: str = ""
    certificate: bytes = b""
    key: bytes = b""
    root: bytes = b""

    @classmethod
    def read(cls, environment: Mapping[str, str]) -> "Security":
        """Return the settings in `environment`: a token, or the paths of three files; see TOKEN and CERTIFICATE."""
        return cls(environment.get(TOKEN, ""), *(_content(name, environment) for name in (CERTIFICATE, KEY, ROOT)))

    def for_attempt(self, attempt: str) -> "Security":
        """Return a copy with a token for one attempt only, so that processes of an earlier attempt are refused.

        Terms and incarnations start over with every attempt, so only the token distinguishes attempts.
        """
        if not self.token and not self.certificate:
            return self
        return replace(self, token=hmac.new(self.token.encode(), attempt.encode(), "sha256").hexdigest())

    def check(self, host: str) -> None:
        """Raise ValueError unless these settings are sufficient to listen on `host`."""
        if bool(self.certificate) != bool(self.key) or bool(self.certificate) != bool(self.root):
            raise ValueError(
                f"Mutual TLS needs all three of {CERTIFICATE}, {KEY} and {ROOT}; only some are set. Set the others."
            )
        if not is_loopback(host) and not self.token and not self.certificate:
            raise ValueError(
                f"An address that other machines can reach needs authentication, got {host} without any. Set {TOKEN}, "
                f"set {CERTIFICATE}, {KEY} and {ROOT}, or listen on 127.0.0.1."
            )


def _content(name: str, environment: Mapping[str, str]) -> bytes:
    path = environment.get(name, "")
    try:
        return pathlib.Path(path).read_bytes() if path else b""
    except OSError as error:
        raise ValueError(f"{name} names a file that cannot be read: {path} ({error.strerror}). Correct it.") from error


UNSECURED = Security()
"""Sufficient between processes that listen on the loopback address."""


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach the address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def new_token() -> str:
    """Return a new random secret for one run."""
    return os.urandom(16).hex()
