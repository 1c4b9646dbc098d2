"""The files of snapshots: each process of a job has three slots in a directory in memory, and overwrites the oldest.

A slot holds its header's length and checksum, the header, and the data: a few buffers, one after the other. Nothing
here needs JAX.
"""

import dataclasses
import itertools
import json
import os
import pathlib
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

JSON: TypeAlias = dict[str, Any]

NUM_SLOTS = 3
_PATTERN = "process-*.slot-*.snapshot"
_PREFIX = 32
"""Bytes of the header's length and checksum."""
_SLACK = 1 << 16
"""Bytes reserved beyond a snapshot, since the numbers in its header grow."""
_WORD = 8
_FOLD = 512
"""Words of 64 bits that a buffer is folded into before its checksum is computed."""


class Slots:
    """The slots of one process in a directory."""

    def __init__(self, directory: pathlib.Path, process: int):
        self._paths = of_process(directory, process)
        self._mapped: dict[pathlib.Path, tuple[int, np.ndarray]] = {}
        self.sort()

    def sort(self) -> None:
        """Have the slot with the oldest snapshot overwritten first, that with the newest last."""
        files = {path: open_slot(path) for path in self._paths}
        steps = {path: -1 if file is None else file.header["step"] for path, file in files.items()}
        self._paths.sort(key=lambda path: steps[path])

    def write(self, header: bytes, buffers: Sequence[np.ndarray]) -> None:
        """Overwrite the oldest snapshot in place.

        The length is written last, so that a slot that a process left incomplete when it died is recognized. The file
        stays mapped and is overwritten in place: opening it, or freeing and allocating memory, costs more than the
        copy. Its memory is reserved before, since nothing could be done where a copy to mapped memory finds none.

        Raises:
          OSError: there is no memory; the other slots are as they were.
        """
        content = self._content(_PREFIX + len(header) + sum(buffer.nbytes for buffer in buffers))
        content[:_PREFIX] = ord(" ")
        end = _PREFIX
        for part in (np.frombuffer(header, np.uint8), *buffers):
            content[end : end + part.nbytes] = part.reshape(-1).view(np.uint8)
            end += part.nbytes
        prefix = f"{len(header):16d}{zlib.crc32(header):16d}".encode()
        content[:_PREFIX] = np.frombuffer(prefix, np.uint8)
        self._paths.append(self._paths.pop(0))

    def _content(self, num_bytes: int) -> np.ndarray:
        """Return the oldest slot's memory, at least so many bytes."""
        path = self._paths[0]
        inode, content = self._mapped.get(path, (None, np.empty(0, np.uint8)))
        try:
            is_there = os.stat(path).st_ino == inode
        except FileNotFoundError:
            is_there = False
        if is_there and content.nbytes >= num_bytes:
            return content
        _reserve(self._paths, num_bytes)
        content = np.asarray(np.memmap(path, np.uint8, mode="r+"))
        self._mapped[path] = os.stat(path).st_ino, content
        return content


def header_of(described: JSON, structure: str, buffers: Sequence[np.ndarray]) -> bytes:
    """Return the header of a snapshot.

    `described` names its step, among others; `structure` is the JSON object that lists `leaves` and `pieces`, in the
    order of the buffers.
    """
    own = json.dumps(described | {"buffers": [[buffer.nbytes, checksum(buffer)] for buffer in buffers]})
    text = f"{own[:-1]}, {structure[1:]}".encode()
    return text.ljust(-(-len(text) // _WORD) * _WORD)  # numbers that begin at a multiple of their size are read faster


def checksum(data: np.ndarray) -> int:
    """Return the CRC-32 of `data` (bytes) after folding it by exclusive or: as fast as memory is read.

    Any flipped bit gives another one; so does any change within 4096 bytes, but for a chance of 2**-32.
    """
    end = data.nbytes // (_WORD * _FOLD) * (_WORD * _FOLD)
    folded = np.bitwise_xor.reduce(data[:end].view(np.uint64).reshape(-1, _FOLD), axis=0)
    return zlib.crc32(np.ascontiguousarray(data[end:]).data, zlib.crc32(folded.data))


@dataclasses.dataclass(frozen=True)
class SlotFile:
    """The content of a slot: its header, which was verified, and its bytes, which were not."""

    header: JSON
    content: np.ndarray
    offset: int

    def pieces(self) -> list[tuple[JSON, np.ndarray]]:
        """Return each piece's description and bytes."""
        sizes = [piece["num_bytes"] for piece in self.header["pieces"]]
        return list(zip(self.header["pieces"], self._divided(sizes), strict=True))

    def is_intact(self) -> bool:
        """Return whether every buffer has the checksum it was written with."""
        buffers = self._divided([num_bytes for num_bytes, _ in self.header["buffers"]])
        return [checksum(buffer) for buffer in buffers] == [number for _, number in self.header["buffers"]]

    def header_text(self) -> bytes:
        """Return the header as it was written."""
        return self.content[_PREFIX : self.offset].tobytes()

    def data(self) -> bytes:
        """Return all buffers."""
        size = sum(num_bytes for num_bytes, _ in self.header["buffers"])
        return self.content[self.offset : self.offset + size].tobytes()

    def _divided(self, sizes: Sequence[int]) -> list[np.ndarray]:
        ends = itertools.accumulate(sizes, initial=self.offset)
        return [self.content[begin:end] for begin, end in itertools.pairwise(ends)]


def of_process(directory: pathlib.Path, process: int) -> list[pathlib.Path]:
    """Return the files of a process's slots, whether they are there or not."""
    return [directory / f"process-{process}.slot-{slot}.snapshot" for slot in range(NUM_SLOTS)]


def paths_in(directory: pathlib.Path) -> list[tuple[int, pathlib.Path]]:
    """Return the files of slots in `directory`, each with the number of its process."""
    return [(int(path.name.split(".")[0].removeprefix("process-")), path) for path in sorted(directory.glob(_PATTERN))]


def by_step(directory: pathlib.Path, identity: str) -> dict[int, list[SlotFile]]:
    """Return step -> the files that the processes wrote for it."""
    found: dict[int, list[SlotFile]] = {}
    for _, path in paths_in(directory):
        file = open_slot(path)
        if file is not None and file.header["identity"] == identity:
            found.setdefault(file.header["step"], []).append(file)
    return found


def newest_whole(found: Mapping[int, Sequence[SlotFile]]) -> int | None:
    """Return the newest step of which every piece is present and whole, None if there is none."""
    return next((step for step in sorted(found, reverse=True) if is_whole(found[step])), None)


def is_whole(files: Sequence[SlotFile]) -> bool:
    """Return whether the pieces are intact and cover every element of every leaf."""
    return covers([file.header for file in files]) and all(file.is_intact() for file in files)


def covers(headers: Sequence[JSON]) -> bool:
    """Return whether the pieces of snapshots of one step cover every element of every leaf."""
    if not headers:
        return False
    shapes = [tuple(leaf[3]) for leaf in headers[0]["leaves"]]
    covered = [0] * len(shapes)
    seen = set()
    for piece in (piece for header in headers for piece in header["pieces"]):
        place = (piece["leaf"], json.dumps(piece["index"]))
        if place not in seen:
            seen.add(place)
            covered[piece["leaf"]] += int(np.prod([stop - start for start, stop in piece["index"]], dtype=np.int64))
    return covered == [int(np.prod(shape, dtype=np.int64)) for shape in shapes]


def joined(files: Sequence[SlotFile]) -> list[np.ndarray]:
    """Return the leaves, whole."""
    leaves = [np.empty(shape, dtype) for _, _, dtype, shape in files[0].header["leaves"]]
    for file in files:
        for piece, value in file.pieces():
            leaf = leaves[piece["leaf"]]
            index = tuple(slice(*bounds) for bounds in piece["index"])
            leaf[index] = value.view(leaf.dtype).reshape(leaf[index].shape)
    return leaves


def open_slot(path: pathlib.Path) -> SlotFile | None:
    """Return the content of a slot, None if it is missing or incomplete."""
    if not path.exists() or path.stat().st_size < _PREFIX:
        return None
    content = np.memmap(path, np.uint8, mode="r")
    try:
        length, crc = int(content[:16].tobytes()), int(content[16:_PREFIX].tobytes())
    except ValueError:
        return None
    text = content[_PREFIX : _PREFIX + length].tobytes()
    if zlib.crc32(text) != crc:
        return None
    header = json.loads(text)
    whole = _PREFIX + length + sum(num_bytes for num_bytes, _ in header["buffers"])
    return SlotFile(header, content, _PREFIX + length) if whole <= len(content) else None


def _reserve(slots: Sequence[pathlib.Path], num_bytes: int) -> None:
    """Reserve the memory of all slots before the first is written: a snapshot that does not fit harms no older one."""
    sizes = {path: path.stat().st_size if path.exists() else 0 for path in slots}
    if min(sizes.values()) >= num_bytes:
        return
    try:
        for path in slots:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                os.posix_fallocate(descriptor, 0, num_bytes + _SLACK)
            finally:
                os.close(descriptor)
    except OSError:
        for path, size in sizes.items():
            if path.exists():
                os.truncate(path, size)
        raise
