"""Processes of one machine take turns to compile a program, so that one compiles it and the others load it.

The turn is a lock of a file beside the compilation cache, which the kernel gives back however its holder ends.
"""

import contextlib
import fcntl
import hashlib
import os
import pathlib
import time
from collections.abc import Iterator

import jax

WAIT_SECONDS = 60.0
"""How long to wait at most: the holder may be stopped, or compile something else under the same lock."""
_LOOK_SECONDS = 0.02


@contextlib.contextmanager
def turn(key: str) -> Iterator[None]:
    """Hold the turn to compile the program with this key in the cache, for which others may have to wait.

    After `WAIT_SECONDS`, or where there can be no lock, the context is entered without it.
    """
    with contextlib.ExitStack() as stack:
        cache = jax.config.values["jax_compilation_cache_dir"]
        if cache and "://" not in cache:
            with contextlib.suppress(OSError):  # a full disk, or a file system without locks
                folder = pathlib.Path(f"{cache}-turns")
                folder.mkdir(parents=True, exist_ok=True)
                name = hashlib.sha256(key.encode()).hexdigest()[:2]  # a few hundred files, whatever is compiled
                lock = os.open(folder / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
                stack.callback(os.close, lock)
                _take(lock)
        yield


def _take(lock: int) -> None:
    end = time.monotonic() + WAIT_SECONDS
    while time.monotonic() < end:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(_LOOK_SECONDS)
        else:
            return
