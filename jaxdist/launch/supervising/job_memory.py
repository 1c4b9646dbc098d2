"""The directory in memory of a job, for what must outlive its processes, and those that killed jobs left behind."""

import contextlib
import os
import pathlib
import shutil
import tempfile
import time
from collections.abc import Iterator

from jaxdist.rundir import lock

MEMORY_ROOT = pathlib.Path("/dev/shm")
_PREFIX = "jaxdist-"
_OWNER_NAME, _FOUND_NAME = "run_dir", "found_at"
_KEEP_SECONDS = 24 * 3600.0


@contextlib.contextmanager
def memory_directory(run_dir: pathlib.Path, *, root: pathlib.Path = MEMORY_ROOT) -> Iterator[pathlib.Path]:
    """Yield a directory in memory for the job in `run_dir`; the caller removes it.

    It gets its name when its lock is held, so another job never takes it for one that was left behind.
    """
    draft = pathlib.Path(tempfile.mkdtemp(prefix=f".{_PREFIX}", dir=root))
    with lock.locked(draft, purpose="snapshots"):
        # A short symbolic link needs no memory of its own, so this works even if the memory is full.
        with contextlib.suppress(OSError):
            (draft / _OWNER_NAME).symlink_to(run_dir.absolute())
        yield draft.rename(root / draft.name.removeprefix("."))


def left_behind(run_dir: pathlib.Path, *, root: pathlib.Path = MEMORY_ROOT) -> Iterator[pathlib.Path]:
    """Yield each directory in memory that a killed job of `run_dir` left behind, locked; remove those of no use.

    Those of other run directories stay for a day after they were first found, so that their runs can be resumed.
    """
    for path in root.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError, lock.LockedError):
            if path.stat().st_uid != os.getuid() or not (path / lock.FILE_NAME).exists():
                continue
            with lock.locked(path, purpose="snapshots"):
                owner = path / _OWNER_NAME
                if owner.is_symlink() and owner.readlink() == run_dir.absolute():
                    yield path
                elif not owner.exists() or _found_seconds_ago(path) > _KEEP_SECONDS:
                    shutil.rmtree(path, ignore_errors=True)


def _found_seconds_ago(left: pathlib.Path) -> float:
    """Return how long ago a job first found a directory that was left behind, and note it there if this is the first.

    By the time since the machine started, which is never set: the directory is in memory and as old at most.
    """
    note, now = left / _FOUND_NAME, time.clock_gettime(time.CLOCK_BOOTTIME)
    if not note.is_symlink():
        note.symlink_to(repr(now))  # needs no memory of its own, like that to the owner
    return now - float(os.readlink(note))
