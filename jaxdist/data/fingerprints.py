"""Fingerprints of files: of samples of their contents, at a bounded cost; and strict ones, of all contents.

Either is kept in a cache on this machine, with the sizes, times and inode numbers of the files it was taken of, and is
taken again where one of these differs. The cache never decides what a fingerprint is, only whether contents are read.
"""

import array
import concurrent.futures
import contextlib
import fcntl
import functools
import hashlib
import itertools
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, overload

import numpy as np

from jaxdist.data.sources.source import ArraySource, fingerprint_example, fingerprint_text
from jaxdist.rundir import files as atomic

_MANY = 4096
"""The most files that are sampled; fewer are all sampled."""

_BLOCK, _BLOCKS_PER_FILE = 4096, 64
_CHUNK = 2**20
_GONE = (-1, -1, -1, -1)
STRICT = "strict"
"""What a strict fingerprint begins with."""
_SETTLED_NS = 2 * 10**9
"""A file that changed so shortly before it was read may change again within the same tick of its clock."""


class FileList(Sequence[str]):
    """The files that a source reads, and what the file system says of them, asked once."""

    def __init__(self, paths: Sequence[str | os.PathLike], root: str | os.PathLike | None = None):
        """Hold `paths`; with a `root`, their names below it are part of a fingerprint."""
        self._paths, self._root = [os.fspath(path) for path in paths], None if root is None else os.fspath(root)

    def __len__(self) -> int:
        return len(self._paths)

    def __getstate__(self) -> dict:
        return {"_paths": self._paths, "_root": self._root}  # worker processes need no more

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        return self._paths[index]

    def __iter__(self) -> Iterator[str]:
        return iter(self._paths)

    @functools.cached_property
    def stats(self) -> np.ndarray:
        """Size, times of the content and of any change (ns), inode number; -1 where a file is gone; int64 (n, 4)."""
        found = array.array("q")
        for folder, paths in itertools.groupby(self._paths, key=lambda path: path.rpartition("/")[:2]):
            _add_stats(found, folder, paths)
        return np.frombuffer(found, np.int64).reshape(-1, 4)

    @property
    def place(self) -> str:
        """Where the files are, for people and for the name of a cache entry."""
        return os.path.abspath(self._paths[0] if self._root is None else self._root)

    @functools.cached_property
    def names(self) -> str:
        """A hash of the files' names below the root; "" without one."""
        if self._root is None:
            return ""
        begin = len(os.path.join(self._root, ""))
        text = "\0".join([path[begin:] for path in self._paths])
        return hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=12).hexdigest()


def _add_stats(found: array.array, folder: tuple[str, str], paths: Iterable[str]) -> None:
    """Append the four numbers of each file of a folder. Asked from there, the system need not find the folder again."""
    try:
        descriptor = os.open("".join(folder) or ".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        found.extend(_GONE * len([*paths]))
        return
    begin = len("".join(folder))
    try:
        for path in paths:
            try:
                stat = os.stat(path[begin:] or ".", dir_fd=descriptor)
                found.extend((stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino & (2**63 - 1)))
            except OSError:
                found.extend(_GONE)
    finally:
        os.close(descriptor)


def fingerprint_files(kind: str, files: FileList, *settings: object) -> str:
    """Return the hash of `settings`, of the files' names and sizes, and of samples of their contents.

    Up to 4096 files are sampled, of more so many evenly spread ones. A file of up to 256 kB is read whole, of a larger
    one 64 evenly spread blocks of 4 kB.
    """

    def sample() -> str:
        digest = hashlib.blake2b(np.ascontiguousarray(files.stats[:, 0]).tobytes(), digest_size=12)
        for place in np.unique(np.linspace(0, len(files) - 1, min(len(files), _MANY), dtype=np.int64)).tolist():
            for block in _sample(files[place], int(files.stats[place, 0])):
                digest.update(block)
        return fingerprint_text(kind, *settings, files.names, digest.hexdigest())

    return _cached(("sampled", kind, *settings), [files], sample)


def strict_fingerprint(source: Any) -> str:
    """Return the hash of all that a source reads: of every file whole, of arrays whole, else of every example."""
    found = list(leaves(source))
    sampled = source.fingerprint()  # which has the settings, and how the parts are put together

    def whole() -> str:
        return fingerprint_text(STRICT, sampled, *map(_whole, found))

    lists = [files for files in map(_files_of, found) if files is not None]
    return _cached((STRICT, sampled), lists, whole) if len(lists) == len(found) else whole()


def times_of(source: Any) -> dict[str, Any]:
    """Return the number of files that a source reads, their bytes, and a hash of their times; empty without files."""
    lists = [files for files in map(_files_of, leaves(source)) if files is not None]
    if not lists:
        return {}
    stats = np.concatenate([each.stats for each in lists])
    times = hashlib.blake2b(np.ascontiguousarray(stats[:, 1]).tobytes(), digest_size=12).hexdigest()
    return {"files": len(stats), "bytes": int(stats[:, 0].clip(0).sum()), "times": times}


def leaves(source: Any) -> Iterator[Any]:
    """Yield the sources that read data, of which `source` is made."""
    parts = getattr(source, "parts", None)
    # A source of a user may call anything its parts: names of files, arrays, pieces of an image.
    if isinstance(parts, list | tuple) and all(callable(getattr(part, "fingerprint", None)) for part in parts):
        for part in parts:
            yield from leaves(part)
    else:
        yield source


def _files_of(source: Any) -> FileList | None:
    """Return the files that a source reads; None where it does not say, or `files` is something of its own."""
    files = getattr(source, "files", None)
    return files if isinstance(files, FileList) else None


def _whole(source: Any) -> str:
    """Return the hash of everything that a source reads."""
    if hasattr(source, "whole_fingerprint"):
        return source.whole_fingerprint()
    if (files := _files_of(source)) is not None:
        with concurrent.futures.ThreadPoolExecutor(min(os.cpu_count() or 1, 8)) as pool:
            digest = hashlib.blake2b(digest_size=16)
            for each in pool.map(_hash_file, files, chunksize=64):
                digest.update(each)
        return digest.hexdigest()
    if isinstance(source, ArraySource):  # arrays of another class need not be all that its examples are made of
        arrays = source.arrays
        return fingerprint_text("arrays", *(f"{name}={_hash_array(array)}" for name, array in sorted(arrays.items())))
    digest = hashlib.blake2b(digest_size=16)
    for index in range(len(source)):
        digest.update(f"{fingerprint_example(source[index])}\0".encode())
    return digest.hexdigest()


def _hash_array(array: np.ndarray) -> str:
    digest = hashlib.blake2b(f"{array.dtype.str}{array.shape}".encode(), digest_size=16)
    rows = max(1, _CHUNK * len(array) // max(array.nbytes, 1)) if array.ndim else 1
    for begin in range(0, len(array) if array.ndim else 1, rows):
        part = np.ascontiguousarray(array[begin : begin + rows] if array.ndim else array)
        digest.update(part.tobytes())
    return digest.hexdigest()


def _hash_file(path: str) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    try:
        with open(path, "rb", buffering=0) as file:
            while data := file.read(_CHUNK):
                digest.update(data)
    except OSError as error:
        digest.update(f"unreadable {error.errno}".encode())
    return digest.digest()


def _sample(path: str, size: int) -> Iterator[bytes]:
    if size < 0 or not os.path.isfile(path):
        return
    with open(path, "rb", buffering=0) as file:
        if size <= _BLOCK * _BLOCKS_PER_FILE:
            yield file.read()
            return
        for offset in np.linspace(0, size - _BLOCK, _BLOCKS_PER_FILE, dtype=np.int64).tolist():
            yield os.pread(file.fileno(), _BLOCK, offset)


def _cached(settings: Sequence[object], lists: Sequence[FileList], take: Callable[[], str]) -> str:
    """Return what `take` returns, or returned when the files were as they are now."""
    key = fingerprint_text("key", *settings, *(files.place for files in lists)).partition(":")[2]
    state = hashlib.blake2b(digest_size=16)
    for files in lists:
        state.update(files.names.encode() + np.ascontiguousarray(files.stats).tobytes())
    path = atomic.cache_folder() / "fingerprints" / f"{key}.json"
    with _one_at_a_time(path) if settings[0] == STRICT else contextlib.nullcontext():
        known = _read(path)
        if known.get("files") == state.hexdigest():
            return str(known["fingerprint"])
        taken = take()
        newest = max((int(files.stats[:, 1:3].max()) for files in lists if len(files)), default=0)
        with contextlib.suppress(OSError):  # without a cache, contents are read at every start
            path.parent.mkdir(parents=True, exist_ok=True)
            atomic.write_text(path, json.dumps({"files": state.hexdigest(), "fingerprint": taken}))
            if path.stat().st_mtime_ns - newest < _SETTLED_NS:
                path.unlink()
    return taken


def _read(path: pathlib.Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) and "fingerprint" in found else {}


@contextlib.contextmanager
def _one_at_a_time(path: pathlib.Path) -> Iterator[None]:
    """Let one process of this machine at a time take a fingerprint, so that the others find it in the cache."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = open(path.with_suffix(".lock"), "w")  # noqa: SIM115 - closed below
    except OSError:  # there is no cache
        yield
        return
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
