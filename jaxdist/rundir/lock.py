"""The lock of a run directory: one job at a time works in it.

The kernel holds the lock (flock) for as long as the process that took it lives, however that process ends, so a lock is
never left behind. The content of the file is only used in messages.
"""

import contextlib
import fcntl
import json
import os
import pathlib
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager

from jaxdist.errors import UserError

FILE_NAME = "lock"
SAVING = "saving the newest state of a job that was killed"
"""A job waits while the lock is held for this purpose, which takes only seconds."""
_SAVING_SECONDS, _LOOK_SECONDS = 60.0, 0.05


class LockedError(UserError):
    """A running job holds the lock of the directory."""


@contextmanager
def locked(directory: pathlib.Path, *, purpose: str) -> Iterator[None]:
    """Hold the lock of `directory`, which is created if needed, while the context lasts.

    Processes started inside do not inherit the lock: it belongs to this process alone.

    `purpose` is shown to a job that is refused, for example "jaxdist train x.py".

    Raises:
      LockedError: another process holds it; the message names it.
      UserError: the directory cannot be written.
      OSError: its file system has no locks.
    """
    descriptor = _open_locked(directory)
    try:
        owner = {"process": os.getpid(), "host": socket.gethostname(), "purpose": purpose}
        with contextlib.suppress(OSError):  # on a full disk the lock is still held
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(owner).encode(), 0)
        yield
    finally:
        os.close(descriptor)


def _open_locked(directory: pathlib.Path) -> int:
    """Return the file of the lock, which is held."""
    while True:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(directory / FILE_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            os.fchmod(descriptor, 0o600)  # a user who may open the file may lock it
        except OSError as error:
            if str(error.filename) == str(directory / FILE_NAME) and not directory.exists():
                continue  # its owner has just removed the directory
            raise UserError(
                f"The directory of a job must be writable; {directory} is not: {error.strerror}. Choose another."
            ) from error
        try:
            _take(descriptor, directory)
            # An owner may remove its lock. A job that waits for it then holds a file that no other job will find.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), os.stat(directory / FILE_NAME)):
                    return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def check_free(directory: pathlib.Path) -> None:
    """Raise LockedError if a job works in `directory`, after waiting for one that only saves; write nothing."""
    try:
        descriptor = os.open(directory / FILE_NAME, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:  # there is none, or `locked` will say what is the matter with it
        return
    try:
        _take(descriptor, directory, fcntl.LOCK_SH)  # a file that is only read gives no other lock on NFS
    finally:
        os.close(descriptor)


def is_locked(directory: pathlib.Path) -> bool:
    """Return whether a living process holds the lock of `directory`."""
    try:
        descriptor = os.open(directory / FILE_NAME, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)  # a file that is only read gives no other lock on NFS
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def _take(descriptor: int, directory: pathlib.Path, kind: int = fcntl.LOCK_EX) -> None:
    deadline, looked_again = time.monotonic() + _SAVING_SECONDS, False
    while True:
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
            return
        except BlockingIOError as error:
            said = os.pread(descriptor, 4096, 0).decode(errors="replace")
            # `is_locked` of another process holds the lock for a moment.
            if not looked_again or (SAVING in said and time.monotonic() < deadline):
                looked_again = True
                time.sleep(_LOOK_SECONDS)
                continue
            raise LockedError(
                f"One job at a time may work in {directory}; {_describe(said)} does. "
                "Wait for it, end it, or choose another directory."
            ) from error


def _describe(said: str) -> str:
    try:
        owner = json.loads(said)
        return f"process {owner['process']} on {owner['host']} ({owner['purpose']})"
    except (ValueError, KeyError, TypeError):  # it holds the lock, but has not written its name yet
        return "another process"
