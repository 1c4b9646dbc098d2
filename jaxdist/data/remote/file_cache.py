"""A folder of local copies with a limit on its size, which the processes of a machine share and any of them may die in.

A copy is written beside its place and renamed when it is whole, so no half file is ever read. Locks are those of the
kernel (flock), which end with their holder: a process that copies a file holds one, so that others wait for it and do
not copy it too; a file that is pinned holds one, so that it is not removed. What was not used for longest is removed; a
file that was opened before can still be read to its end.
"""

import contextlib
import fcntl
import functools
import hashlib
import os
import pathlib
import shutil
import time
from collections.abc import Callable, Iterator
from typing import BinaryIO

from jaxdist.data.remote import addresses, compression
from jaxdist.rundir import files

_NUM_LOCKS = 64
_GB = 10**9


class HeldFile:
    """An open file that is closed when nothing refers to it: what a thread reads is not closed by another."""

    def __init__(self, file: BinaryIO):
        self.fd = os.dup(file.fileno())
        file.close()

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        close(self.fd)  # at the end of the interpreter, modules may be gone


class FileCache:
    """Local, decompressed copies of files.

    Args:
      folder: of the copies; None takes JAXDIST_CACHE, or `jaxdist/files` in the user's cache folder.
      limit_gb: how large the copies may be together; None takes JAXDIST_CACHE_GB, or 50. Files that are in use beyond
        their removal still take room.
    """

    def __init__(self, folder: str | os.PathLike | None = None, *, limit_gb: float | None = None):
        self.folder = pathlib.Path(folder or os.environ.get("JAXDIST_CACHE") or files.cache_folder() / "files")
        self.limit = int(_GB * (_limit_from_environment() if limit_gb is None else limit_gb))
        if self.limit < 1:
            raise ValueError(f"The limit of a cache is a positive number of GB; got {self.limit / _GB:g}.")
        self._names: dict[str, str] = {}
        self._pins: dict[str, HeldFile] = {}

    def open(self, address: str) -> BinaryIO:
        """Return the copy of a file, decompressed and open for reading; it is made where there is none.

        Raises:
          ValueError: the file cannot be read, is not whole, or is larger than the cache.
        """
        path = self.folder / self._name(address)
        with contextlib.suppress(FileNotFoundError):
            return _opened(path)
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._locked(f"copy-{int(hashlib.sha256(path.name.encode()).hexdigest(), 16) % _NUM_LOCKS}"):
            with contextlib.suppress(FileNotFoundError):  # another process has copied it meanwhile
                return _opened(path)
            return self._copy(address, path)

    def pin(self, address: str) -> str:
        """Return the path of the copy of a file, which is not removed while this process lives."""
        path = self.folder / self._name(address)
        while address not in self._pins:
            file = self.open(address)
            fcntl.flock(file, fcntl.LOCK_SH)
            with contextlib.suppress(FileNotFoundError):
                if os.stat(path).st_ino == os.fstat(file.fileno()).st_ino:
                    self._pins[address] = HeldFile(file)
                    break
            file.close()  # it was removed between the two; copy it again
        return str(path)

    def kept_text(self, address: str, suffix: str, make: Callable[[], str]) -> str:
        """Return a text about a file, such as its index; it is made once and kept beside the copies."""
        path = self.folder / f"{self._name(address)}{suffix}"
        with contextlib.suppress(FileNotFoundError), _opened(path) as file:
            return file.read().decode()
        text = make()
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._part(path.name) as part:
            part.write(text.encode())
            part.flush()
            os.replace(part.name, path)
        return text

    def _name(self, address: str) -> str:
        """Return the file name of the copy: another one when the file changes."""
        if address not in self._names:
            facts = addresses.file_facts(address)
            digest = hashlib.sha256(f"{address}\0{facts.size}\0{facts.version}".encode()).hexdigest()[:20]
            self._names[address] = f"{digest}-{compression.without_compression(addresses.file_name(address))}"
        return self._names[address]

    def _copy(self, address: str, path: pathlib.Path) -> BinaryIO:
        self._make_room(address, addresses.file_facts(address).size or 0)
        with self._part(path.name) as part:
            if compression.compression_of(address) is not None:
                self._decompress(address, part)
            elif addresses.is_address(address):
                addresses.download(address, part.name)
            else:
                shutil.copyfile(address, part.name)
            part.flush()
            os.fsync(part.fileno())
            self._make_room(address, 0)
            file = open(part.name, "rb")  # noqa: SIM115
            os.replace(part.name, path)
            return file

    def _decompress(self, address: str, part: BinaryIO) -> None:
        if not addresses.is_address(address):
            with open(address, "rb") as source:
                compression.decompress(address, source, part)
            return
        with self._part(f"{pathlib.Path(part.name).name}.packed") as packed:
            addresses.download(address, packed.name)
            with open(packed.name, "rb") as source:
                compression.decompress(address, source, part)

    @contextlib.contextmanager
    def _part(self, name: str) -> Iterator[BinaryIO]:
        """Open a file that is not whole yet; it is removed unless it was renamed, and by others where this dies."""
        path = self.folder / f".{name}.{os.getpid()}.part"
        with self._locked("room"):  # so that no process finds it without its lock
            part = open(path, "wb")  # noqa: SIM115
            fcntl.flock(part, fcntl.LOCK_EX)
        with part:
            try:
                yield part
            finally:
                path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        with open(self.folder / f".{name}.lock", "wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _make_room(self, address: str, num_bytes: int) -> None:
        """Remove what was not used for longest until the copies and `num_bytes` more keep to the limit."""
        if num_bytes > self.limit:
            raise ValueError(_too_large(address, num_bytes, self))
        with self._locked("room"):
            parts = sum(map(_size_of_part, self.folder.glob(".*.part")))
            copies = sorted(_copies(self.folder))
            total = num_bytes + parts + sum(size for _, size, _ in copies)
            for _, size, path in copies:
                if total <= self.limit:
                    return
                if _remove_unused(path):
                    total -= size
            if total > self.limit:
                raise ValueError(_too_large(address, total, self))


@functools.cache
def of_process() -> FileCache:
    """Return the cache of the environment's settings, which holds what this process has pinned."""
    return FileCache()


def _limit_from_environment() -> float:
    text = os.environ.get("JAXDIST_CACHE_GB", "50")
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"JAXDIST_CACHE_GB is a number of GB; got {text!r}.") from None


def _opened(path: pathlib.Path) -> BinaryIO:
    """Open a copy, and note that it was used now."""
    file = open(path, "rb")  # noqa: SIM115
    modified = os.fstat(file.fileno()).st_mtime_ns
    with contextlib.suppress(FileNotFoundError):
        os.utime(path, ns=(time.time_ns(), modified))
    return file


def _copies(folder: pathlib.Path) -> Iterator[tuple[int, int, pathlib.Path]]:
    """Yield the time of the last use, the size and the path of each copy."""
    for path in folder.iterdir():
        if not path.name.startswith("."):
            with contextlib.suppress(FileNotFoundError):
                status = path.stat()
                yield status.st_atime_ns, status.st_size, path


def _size_of_part(path: pathlib.Path) -> int:
    """Return the size of a file that another process is writing; 0, after removing it, where that has died."""
    with contextlib.suppress(FileNotFoundError), open(path, "rb") as part:
        try:
            fcntl.flock(part, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return os.fstat(part.fileno()).st_size
        path.unlink()
    return 0


def _remove_unused(path: pathlib.Path) -> bool:
    """Remove a copy and return True; return False where a process has pinned it."""
    with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        path.unlink()
    return True


def _too_large(address: str, num_bytes: int, cache: FileCache) -> str:
    return (
        f"No room for {address} in the cache {cache.folder}: {num_bytes / _GB:.3g} GB of files in use, and a limit of "
        f"{cache.limit / _GB:.3g} GB. Raise it: data.FileCache(folder, limit_gb=...), or the variable JAXDIST_CACHE_GB."
    )
