"""A full disk delays what a run writes and never ends it: what does not fit is kept, and written when there is room."""

import collections
import contextlib
import errno
import os
import pathlib
import time
from collections.abc import Callable
from typing import Generic, TypeVar

from jaxdist import errors

Item = TypeVar("Item")
_ERRORS = (errno.ENOSPC, errno.EDQUOT)
_TEXTS = ("No space left on device", "Disk quota exceeded")
"""What libraries say that raise no OSError."""
_RETRY_SECONDS = 0.5
_PROBE_BYTES = 4096


class UnwritableError(errors.RunFailedError, OSError):
    """A file of a run cannot be written, and not because the disk is full: waiting for room would not help."""


def _unwritable(what: str, error: OSError) -> UnwritableError:
    reason = error.strerror or str(error)
    return UnwritableError(
        f"A run needs to write its files, and {error.filename or what} cannot be written: {reason}. Correct that and "
        "continue with --resume."
    )


def is_full(error: BaseException) -> bool:
    """Return whether a full disk, or a quota, caused an error."""
    cause = error.__cause__ or error.__context__
    ours = getattr(error, "errno", None) in _ERRORS or any(text in str(error) for text in _TEXTS)
    return ours or (cause is not None and is_full(cause))


class Backlog(Generic[Item]):
    """Writes items in their order; from a full disk on they wait, and each further one tries again.

    `write` writes one item, which is written again, whole, if this raises OSError. `what` is for the warning, which is
    shown once a time that the disk is full. Beyond `most_kept` items the oldest are dropped.
    """

    def __init__(self, write: Callable[[Item], object], what: str, *, most_kept: int = 100_000):
        self._write, self._what, self._told = write, what, False
        self._waiting: collections.deque[Item] = collections.deque(maxlen=most_kept)
        self._dropped = 0

    def add(self, item: Item) -> None:
        """Write the item, after those that wait.

        Raises:
          UnwritableError: for every OSError but that of a full disk.
        """
        self._dropped += len(self._waiting) == self._waiting.maxlen
        self._waiting.append(item)
        self.flush()

    def close(self) -> None:
        """Try for the last time, and say how many items are lost."""
        self.flush()
        if lost := self._dropped + len(self._waiting):
            say(f"The disk stayed full. Lost entries of {self._what}: {lost}.")

    def flush(self) -> None:
        """Write what waits, as far as there is room."""
        try:
            while self._waiting:
                self._write(self._waiting[0])
                self._waiting.popleft()
        except OSError as error:
            if not is_full(error):
                raise _unwritable(self._what, error) from error
            if not self._told:
                say(f"The disk is full: {self._what} cannot be written. The run continues, and writes later what fits.")
            self._told = True
        else:
            self._told = False


def until_written(write: Callable[[], Item], what: str) -> Item:
    """Call `write` until the disk has room for it, and return its result; the first time without room is announced.

    It is for what the caller must not continue without.

    Raises:
      UnwritableError: for every OSError but that of a full disk.
    """
    told = False
    while True:
        try:
            return write()
        except OSError as error:
            if not is_full(error):
                raise _unwritable(what, error) from error
            if not told:
                say(f"The disk is full: {what} cannot be written. This process waits for room.")
            told = True
            time.sleep(_RETRY_SECONDS)


def has_no_room(directory: pathlib.Path) -> bool:
    """Return whether not even a small file can be written to `directory`, which a quota may cause, too."""
    probe = directory / f".room-{os.getpid()}"
    try:
        probe.write_bytes(b"x" * _PROBE_BYTES)
    except OSError as error:
        return is_full(error)
    finally:
        probe.unlink(missing_ok=True)
    return False


def say(message: str) -> None:
    """Show a line to the user; it is dropped if it would go to a file on the full disk."""
    with contextlib.suppress(OSError):
        errors.say(message)
