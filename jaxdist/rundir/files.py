"""Atomic file writes: a reader finds the old content or the new, and the new content survives a crash."""

import contextlib
import os
import pathlib
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import TypeAlias

from jaxdist.errors import UserError


def check_new(path: pathlib.Path, what: str) -> None:
    """Raise UserError unless `path` is new and may be made; `what` is to be written there.

    For before the work, whose result would be lost: folders that do not exist yet are made when it is written.
    """
    if os.path.lexists(path):
        raise UserError(f"{what} does not overwrite anything, and {path} exists. Choose another name.")
    folder = next(each for each in path.absolute().parents if os.path.lexists(each))
    if not (folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)):
        raise UserError(f"{path} cannot be written: {folder} is no folder that you may write to. Choose another place.")


Rename: TypeAlias = Callable[[pathlib.Path, pathlib.Path], None]


def commit(draft: pathlib.Path, path: pathlib.Path) -> None:
    """Make the finished file `draft` durable and rename it to `path`, in the same directory."""
    _sync(draft)
    # A rename is atomic only inside one file system, hence the same directory.
    os.replace(draft, path)
    _sync(path.parent)  # the rename is durable once the directory is


def write(path: pathlib.Path, parts: Iterable[bytes | memoryview]) -> int:
    """Replace the content of the file `path` by the bytes of `parts`; return their CRC-32. Durable on return.

    Raises OSError naming the file; the older file stays.
    """
    return _replace(path, parts, commit)


def write_unsynced(path: pathlib.Path, parts: Iterable[bytes | memoryview]) -> int:
    """As `write`, but do not wait for the disk: if the machine crashes, the content may be lost or empty."""
    return _replace(path, parts, os.replace)


def _replace(path: pathlib.Path, parts: Iterable[bytes | memoryview], rename: Rename) -> int:
    # The name contains the process id, because a replaced process may still be writing the same file.
    draft = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    checksum = 0
    with drafted(path, draft, rename), open(draft, "wb") as file:
        for part in parts:
            file.write(part)
            checksum = zlib.crc32(part, checksum)
    return checksum


@contextlib.contextmanager
def drafted(path: pathlib.Path, draft: pathlib.Path, rename: Rename = commit) -> Iterator[None]:
    """Let the block write the file `draft`, which becomes `path` where the block ends well, and is removed if not.

    An OSError about the draft, or about no file (disk full), names `path`, which is what the user knows.
    """
    try:
        yield
        rename(draft, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            draft.unlink()
        if isinstance(error, OSError) and (error.filename is None or os.fspath(error.filename) == os.fspath(draft)):
            raise OSError(error.errno, error.strerror or str(error), os.fspath(path)) from error
        raise


def append(descriptor: int, data: bytes) -> None:
    """Append `data` to an open file, whole or not at all: what a full disk took of it is cut off again."""
    size = os.fstat(descriptor).st_size
    rest = memoryview(data)
    try:
        while rest:
            rest = rest[os.write(descriptor, rest) :]
    except OSError:
        os.ftruncate(descriptor, size)
        raise


def write_text(path: pathlib.Path, text: str) -> None:
    """Replace the file `path` by `text` in UTF-8; see `write`."""
    write(path, [text.encode()])


def _sync(path: pathlib.Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def cache_folder() -> pathlib.Path:
    """Return the folder of what this machine keeps between runs: `jaxdist` in $XDG_CACHE_HOME or ~/.cache."""
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "jaxdist"


@contextlib.contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Let every OSError raised inside name `path`: a failed write (disk full) does not name it by itself."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror or str(error), os.fspath(path)) from error
