"""The greeting of a connection: both ends prove that they know the token, before anything else is read.

The listener sends a random *challenge*; the caller answers with one of its own and with the HMAC-SHA-256 of both under
the token; the listener answers with another HMAC. So the token itself is never sent, not even to a stranger that has
taken the port of a process that ended. Each part has a fixed length, so an end that knows no token can make the other
one hold no more bytes than that.
"""

import hmac
import os

_MAGIC = b"jxdwire2"
_RANDOM_BYTES, _PROOF_BYTES = 16, 32
CHALLENGE_BYTES = len(_MAGIC) + _RANDOM_BYTES
ANSWER_BYTES = CHALLENGE_BYTES + 1 + _PROOF_BYTES
WELCOME_BYTES = _PROOF_BYTES


class Refused(Exception):
    """The other end is not a process of this run."""


def challenge() -> bytes:
    """Return what the listener sends first."""
    return _MAGIC + os.urandom(_RANDOM_BYTES)


def _proof(token: str, role: bytes, *parts: bytes) -> bytes:
    return hmac.digest(token.encode(), b"".join((role, *parts)), "sha256")


def answer(token: str, challenged: bytes, lane: int) -> tuple[bytes, bytes]:
    """Return what the caller sends, and what it must receive then; `lane` says what the connection is for.

    Raises:
      Refused: the listener speaks another protocol.
    """
    if not challenged.startswith(_MAGIC):
        raise Refused("The listener is not a process of jaxdist, or one of another version.")
    own = challenge() + bytes([lane])
    return own + _proof(token, b"caller", challenged, own), _proof(token, b"listener", challenged, own)


def check(token: str, challenged: bytes, answered: bytes) -> tuple[bytes, int]:
    """Return what the listener sends to a caller that answered its challenge, and the lane of the connection.

    Raises:
      Refused: the caller does not know the token.
    """
    own, proof = answered[:-_PROOF_BYTES], answered[-_PROOF_BYTES:]
    if not own.startswith(_MAGIC) or not hmac.compare_digest(proof, _proof(token, b"caller", challenged, own)):
        raise Refused("The token is missing or wrong.")
    return _proof(token, b"listener", challenged, own), own[-1]


def compare(given: bytes, expected: bytes) -> None:
    """Raise Refused unless the listener sent the proof that `answer` expects."""
    if not hmac.compare_digest(given, expected):
        raise Refused("The listener does not know the token.")
