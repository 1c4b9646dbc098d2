"""Snapshots of the state, in memory that outlives the process: a restart continues from one as recent as a step ago.

A snapshot is stored in files of a directory in memory (/dev/shm), which belongs to the supervisor and not to the
process that trains. The state is copied on the devices, so the next step may be dispatched at once; a thread waits for
the copy and writes it. The idea of recovering from nearby memory, and from disk only if that is lost, is Gemini's
(Wang et al., SOSP 2023).

Each process writes the pieces of the state it owns into one of three slots in turn. While a slot is being written the
two others are whole. When a process has written step n, step n was computed, so every process has begun it, so each
has written step n - 2. Therefore all have a step in common, whenever any of them dies.
"""

import concurrent.futures
import dataclasses
import io
import itertools
import json
import os
import pathlib
import sys
import time
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jaxdist.checkpoint import manifest as manifests
from jaxdist.checkpoint.pieces import owned_pieces, place
from jaxdist.spmd.layout import path_name

PyTree: TypeAlias = Any
JSON: TypeAlias = dict[str, Any]

NUM_SLOTS = 3
_PATTERN = "process-*.slot-*.snapshot"
_PREFIX = 32
"""Bytes of the header's length and checksum."""
_SLACK = 1 << 16
"""Bytes reserved beyond a snapshot, since the numbers in its header grow."""
RETRY_SECONDS = 60.0
"""Pause after a snapshot that could not be written, for example because the memory is full."""


class SnapshotError(ValueError):
    """A snapshot that cannot be used for this state."""


@dataclasses.dataclass(frozen=True)
class _Piece:
    """A part of a leaf that this process owns: [start, stop) of every dim, and the values, on one device."""

    leaf: int
    index: list[list[int]]
    data: jax.Array


class Snapshots:
    """Takes snapshots, and restores the newest; every process of the job on this machine makes its own.

    Args:
      directory: directory in memory, common to all processes, empty for a new run.
      identity: names the experiment; snapshots of another identity are not used.
      process: number of this process.

    Attributes:
      directory: as given.
      cost_seconds: seconds that the newest one took, here and on the thread, without the wait for the step.
      written_step: step of the newest one that this process has written, None before the first.
    """

    def __init__(self, directory: pathlib.Path, *, identity: str, process: int | None = None):
        self.cost_seconds = 0.0
        self.written_step: int | None = None
        directory.mkdir(parents=True, exist_ok=True)
        self.directory, self._identity = directory, identity
        self._process = jax.process_index() if process is None else process
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "snapshot")
        self._retry_at, self._told = 0.0, False
        self._writing: concurrent.futures.Future[None] | None = None
        self._slots = list(range(NUM_SLOTS))

    def begin(self, step: int) -> None:
        """Delete the snapshots of steps after `step`, from which training continues: those steps are repeated.

        Every process calls this once, before it trains.
        """
        for path in self.directory.glob(_PATTERN):
            file, number = _open(path), int(path.name.split(".")[0].removeprefix("process-"))
            ours = number == self._process or (self._process == 0 and number >= jax.process_count())
            if ours and (file is None or file.header["step"] > step):
                path.unlink()
        # The oldest is overwritten first, the one that training continues from last.
        files = {slot: _open(_slot_path(self.directory, self._process, slot)) for slot in self._slots}
        steps = {slot: -1 if file is None else file.header["step"] for slot, file in files.items()}
        self._slots.sort(key=lambda slot: steps[slot])

    def save(
        self, step: int, state: PyTree, data_state: Mapping[str, Any], *, nonfinite: jax.Array | None = None
    ) -> None:
        """Take a snapshot of `state`, which may be donated as soon as this returns; waits for the snapshot before.

        If a snapshot cannot be written, for example because the memory is full, it and those of the next
        `RETRY_SECONDS` are skipped, with a warning. Older snapshots stay.

        Args:
          step: number of finished steps.
          state: pytree of jax.Arrays.
          data_state: position in the data; anything JSON can hold.
          nonfinite: the step's flag; a step that is not finite is not applied, and gets no snapshot.
        """
        if time.monotonic() < self._retry_at:
            return
        begin = time.perf_counter()
        leaves = manifests.leaves_of(state)
        pieces = _copied(_pieces(leaves))
        header = {
            "identity": self._identity,
            "step": step,
            "data_state": data_state,
            "leaves": [[leaf.path, leaf.dtype, str(leaf.data.dtype), list(leaf.data.shape)] for leaf in leaves],
        }
        taken = time.perf_counter() - begin
        self.wait()
        self._writing = self._thread.submit(self._write_next, header, pieces, nonfinite, taken)

    def _write_next(
        self, header: JSON, pieces: Sequence[_Piece], nonfinite: jax.Array | None, seconds_before: float
    ) -> None:
        if nonfinite is not None and int(nonfinite.addressable_data(0)) >= 0:
            return
        jax.block_until_ready([piece.data for piece in pieces])
        begin = time.perf_counter()
        paths = [_slot_path(self.directory, self._process, slot) for slot in self._slots]
        try:
            _write(paths, header, pieces)
        except OSError as error:
            self._pause(error)
        else:
            self._slots.append(self._slots.pop(0))
            self.written_step = header["step"]
            if self._told:
                print("jaxdist: Snapshots are taken again.", file=sys.stderr, flush=True)
            self._told = False
        self.cost_seconds = seconds_before + time.perf_counter() - begin

    def _pause(self, error: OSError) -> None:
        self._retry_at = time.monotonic() + RETRY_SECONDS
        if not self._told:
            print(
                f"jaxdist: A snapshot could not be written to {self.directory}: {error.strerror}. The run continues; "
                f"snapshots are tried again every {RETRY_SECONDS:.0f} s. Until then a restart continues from an older "
                "snapshot or the newest checkpoint.",
                file=sys.stderr,
                flush=True,
            )
        self._told = True

    def wait(self) -> None:
        """Wait until no snapshot is being written."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    def close(self) -> None:
        """Wait for the last snapshot and end the thread."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()

    def latest_step(self) -> int | None:
        """Return the newest step of which every piece is present and whole, None if there is none.

        Call it before training continues: all processes must get the same answer.
        """
        return _newest_whole(_by_step(self.directory, self._identity))

    def restore(self, template: PyTree, step: int) -> tuple[PyTree, dict[str, Any]]:
        """Return the state and data_state of `step`, bit for bit, with the shardings of the template.

        Args:
          template: the structure of the state; leaves are jax.ShapeDtypeStructs with a sharding (or jax.Arrays).
          step: one that `latest_step` returned.

        Raises:
          SnapshotError: the snapshot has other leaves, shapes or dtypes.
        """
        files = _by_step(self.directory, self._identity)[step]
        header = files[0].header
        with_paths, treedef = jax.tree_util.tree_flatten_with_path(template)
        expected = [[path_name(path), str(leaf.dtype)] for path, leaf in with_paths]
        if expected != [leaf[:2] for leaf in header["leaves"]]:
            raise SnapshotError(
                f"A snapshot must have the leaves of this experiment's state; that of step {step} has others. "
                "It belongs to another job; resume without it."
            )
        values = _joined(files)
        leaves = [_place(value, leaf) for value, (_, leaf) in zip(values, with_paths, strict=True)]
        return jax.tree.unflatten(treedef, leaves), header["data_state"]


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """A snapshot read without a template: the leaves of the state, whole, in tree order."""

    step: int
    leaves: list[manifests.Leaf]
    data_state: JSON


def read_newest(directory: pathlib.Path, *, identity: str, after: int = 0) -> Snapshot | None:
    """Return the newest whole snapshot beyond step `after`, on this process's first CPU device; None without one."""
    found = _by_step(directory, identity)
    step = _newest_whole({step: files for step, files in found.items() if step > after})
    if step is None:
        return None
    header, (device, *_) = found[step][0].header, jax.devices("cpu")
    with jax.enable_x64(True):  # otherwise 64-bit values are truncated to 32 bits
        arrays = [jax.device_put(value, device) for value in _joined(found[step])]
    leaves = [
        manifests.Leaf(path, manifests.stored_name(position, path), dtype, array)
        for position, ((path, dtype, *_), array) in enumerate(zip(header["leaves"], arrays, strict=True))
    ]
    return Snapshot(step, leaves, header["data_state"])


def _by_step(directory: pathlib.Path, identity: str) -> dict[int, list["_File"]]:
    """Return step -> the files that the processes wrote for it."""
    found: dict[int, list[_File]] = {}
    for path in sorted(directory.glob(_PATTERN)):
        file = _open(path)
        if file is not None and file.header["identity"] == identity:
            found.setdefault(file.header["step"], []).append(file)
    return found


def _newest_whole(found: Mapping[int, list["_File"]]) -> int | None:
    return next((step for step in sorted(found, reverse=True) if _is_whole(found[step])), None)


@dataclasses.dataclass(frozen=True)
class _File:
    """The content of a slot: its header, which was verified, and its bytes, which were not."""

    header: JSON
    content: np.ndarray
    offset: int

    def pieces(self) -> list[tuple[JSON, np.ndarray]]:
        """Return each piece's description and bytes."""
        ends = itertools.accumulate((piece["num_bytes"] for piece in self.header["pieces"]), initial=self.offset)
        return [
            (piece, self.content[begin:end])
            for piece, (begin, end) in zip(self.header["pieces"], itertools.pairwise(ends))
        ]

    def is_intact(self) -> bool:
        """Return whether every piece has the checksum it was written with."""
        return all(zlib.crc32(np.ascontiguousarray(value).data) == piece["crc32"] for piece, value in self.pieces())


def copy(state: PyTree) -> None:
    """Copy `state` as `Snapshots.save` does, so that its program is loaded; the copy is dropped."""
    _copied(_pieces(manifests.leaves_of(state)))


def _pieces(leaves: Sequence[manifests.Leaf]) -> list[_Piece]:
    return [
        _Piece(number, piece.index, piece.data)
        for number, leaf in enumerate(leaves)
        for piece in owned_pieces(leaf.data)
    ]


def _copied(pieces: Sequence[_Piece]) -> list[_Piece]:
    """Return the pieces with copies of their data, made by one program on each device."""
    by_device: dict[jax.Device, list[_Piece]] = {}
    for piece in pieces:
        by_device.setdefault(next(iter(piece.data.devices())), []).append(piece)
    return [
        dataclasses.replace(piece, data=copy)
        for group in by_device.values()
        for piece, copy in zip(group, _copy([piece.data for piece in group]), strict=True)
    ]


@jax.jit
def _copy(arrays: list[jax.Array]) -> list[jax.Array]:
    return [jnp.copy(array) for array in arrays]


def _write(slots: Sequence[pathlib.Path], header: JSON, pieces: Sequence[_Piece]) -> None:
    """Overwrite the first slot in place: its header's length and checksum, the header, the data.

    Waits for the values before it changes the file. The length is written last, so that a slot that a process left
    incomplete when it died is recognized. The file is overwritten in place, because freeing and allocating memory costs
    more than the copy.
    """
    values = [np.ascontiguousarray(np.asarray(piece.data)).reshape(-1).view(np.uint8) for piece in pieces]
    described = [
        {"leaf": piece.leaf, "index": piece.index, "num_bytes": value.nbytes, "crc32": zlib.crc32(value.data)}
        for piece, value in zip(pieces, values)
    ]
    text = json.dumps(header | {"pieces": described}).encode()
    _reserve(slots, _PREFIX + len(text) + sum(value.nbytes for value in values))
    with open(os.open(slots[0], os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600), "wb", buffering=0) as file:
        _write_all(file, b" " * _PREFIX)
        _write_all(file, text)
        for value in values:
            _write_all(file, value.data)
        file.seek(0)
        _write_all(file, f"{len(text):16d}{zlib.crc32(text):16d}".encode())


def _reserve(slots: Sequence[pathlib.Path], num_bytes: int) -> None:
    """Reserve the memory of all slots before the first is written: a snapshot that does not fit harms no older one."""
    sizes = {path: path.stat().st_size if path.exists() else 0 for path in slots}
    if min(sizes.values()) >= num_bytes:
        return
    try:
        for path in slots:
            with open(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600), "r+b", buffering=0) as file:
                os.posix_fallocate(file.fileno(), 0, num_bytes + _SLACK)
    except OSError:
        for path, size in sizes.items():
            if path.exists():
                os.truncate(path, size)
        raise


def _write_all(file: io.RawIOBase, data: Any) -> None:
    """Write all of `data`: one call may write only a part, if memory runs out or the part is very large."""
    left = memoryview(data)
    while left:
        left = left[file.write(left) :]


def _open(path: pathlib.Path) -> _File | None:
    """Return the content of a slot, None if it is missing or incomplete."""
    if not path.exists() or path.stat().st_size < _PREFIX:
        return None
    content = np.memmap(path, np.uint8, mode="r")
    try:
        length, checksum = int(content[:16].tobytes()), int(content[16:_PREFIX].tobytes())
    except ValueError:
        return None
    text = content[_PREFIX : _PREFIX + length].tobytes()
    if zlib.crc32(text) != checksum:
        return None
    header = json.loads(text)
    whole = _PREFIX + length + sum(piece["num_bytes"] for piece in header["pieces"])
    return _File(header, content, _PREFIX + length) if whole <= len(content) else None


def _is_whole(files: Sequence[_File]) -> bool:
    """Return whether the pieces are intact and cover every element of every leaf."""
    shapes = [tuple(leaf[3]) for leaf in files[0].header["leaves"]]
    covered = [0] * len(shapes)
    seen = set()
    for file in files:
        for piece, _ in file.pieces():
            place = (piece["leaf"], json.dumps(piece["index"]))
            if place not in seen:
                seen.add(place)
                covered[piece["leaf"]] += int(np.prod([stop - start for start, stop in piece["index"]], dtype=np.int64))
    covers = covered == [int(np.prod(shape, dtype=np.int64)) for shape in shapes]
    return covers and all(file.is_intact() for file in files)


def _joined(files: Sequence[_File]) -> list[np.ndarray]:
    """Return the leaves, whole."""
    leaves = [np.empty(shape, dtype) for _, _, dtype, shape in files[0].header["leaves"]]
    for file in files:
        for piece, value in file.pieces():
            leaf = leaves[piece["leaf"]]
            index = tuple(slice(*bounds) for bounds in piece["index"])
            leaf[index] = value.view(leaf.dtype).reshape(leaf[index].shape)
    return leaves


def _place(values: np.ndarray, struct: Any) -> jax.Array:
    """Return the values with the sharding of `struct`."""
    expected = tuple(struct.shape)
    if values.shape[: len(expected)] != expected:
        raise SnapshotError(f"The snapshot holds an array of shape {values.shape} where {expected} is expected.")
    return place(values, struct)


def _slot_path(directory: pathlib.Path, process: int, slot: int) -> pathlib.Path:
    return directory / f"process-{process}.slot-{slot}.snapshot"
