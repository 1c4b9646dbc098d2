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
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import numpy as np

from jaxdist import errors
from jaxdist.checkpoint import manifest as manifests
from jaxdist.checkpoint import packing, slots
from jaxdist.checkpoint.pieces import place
from jaxdist.spmd.layout import path_name

PyTree: TypeAlias = Any
JSON: TypeAlias = dict[str, Any]

RETRY_SECONDS = 60.0
"""Pause after a snapshot that could not be written, for example because the memory is full."""


class SnapshotError(ValueError):
    """A snapshot that cannot be used for this state."""


class Snapshots:
    """Takes snapshots, and restores the newest; every process of the job on this machine makes its own.

    Args:
      directory: directory in memory, common to all processes, empty for a new run.
      identity: names the experiment; snapshots of another identity are not used.
      process: number of this process.
      here: the numbers of the processes whose own directory this is; of all, where the job is on one host.
      copy: called with the number of this process and each snapshot once it is written, to copy it to another host.

    Attributes:
      directory: as given.
      cost_seconds: seconds that the newest one took, here and on the thread, without the wait for the step.
      written_step: step of the newest one that this process has written, None before the first.
    """

    def __init__(
        self,
        directory: pathlib.Path,
        *,
        identity: str,
        process: int | None = None,
        here: range | None = None,
        copy: Callable[[int, bytes, Sequence[np.ndarray]], object] = lambda process, header, buffers: None,
    ):
        self.cost_seconds = 0.0
        self.written_step: int | None = None
        directory.mkdir(parents=True, exist_ok=True)
        self.directory, self._identity = directory, identity
        self._process = jax.process_index() if process is None else process
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "snapshot")
        self._retry_at, self._told = 0.0, False
        self._writing: concurrent.futures.Future[None] | None = None
        self._here, self._copy_elsewhere = here, copy
        self._slots = slots.Slots(directory, self._process)
        self._packing: packing.Packing | None = None

    def begin(self, step: int) -> None:
        """Delete the snapshots of steps after `step`, from which training continues: those steps are repeated.

        Every process calls this once, before it trains.
        """
        here = range(jax.process_count()) if self._here is None else self._here
        for number, path in slots.paths_in(self.directory):
            file = slots.open_slot(path)
            ours = number == self._process or (self._process == here.start and number not in here)
            if ours and (file is None or file.header["step"] > step):
                path.unlink()
        self._slots.sort()

    def save(
        self, step: int, state: PyTree, data_state: Mapping[str, Any], *, nonfinite: jax.Array | None = None
    ) -> None:
        """Take a snapshot of `state`, which may be donated as soon as this returns; waits for the snapshot before.

        If a snapshot cannot be written, for example because the memory is full, it and those of the next
        `RETRY_SECONDS` are skipped, with a warning. Older snapshots stay.

        `data_state` is anything JSON can hold. A step that is not finite, by its flag `nonfinite`, is not applied, and
        gets no snapshot.
        """
        if time.monotonic() < self._retry_at:
            return
        begin = time.perf_counter()
        self._packing = self._packing or packing.Packing.of(state)
        buffers = self._packing.pack(state)
        described = {"identity": self._identity, "step": step, "data_state": data_state}
        taken = time.perf_counter() - begin
        self.wait()
        self._writing = self._thread.submit(
            self._write_next, described, self._packing.structure, buffers, nonfinite, taken
        )

    def _write_next(
        self,
        described: JSON,
        structure: str,
        buffers: Sequence[jax.Array],
        nonfinite: jax.Array | None,
        seconds_before: float,
    ) -> None:
        if nonfinite is not None and int(nonfinite.addressable_data(0)) >= 0:
            return
        for buffer in buffers:
            buffer.copy_to_host_async()
        jax.block_until_ready(buffers)
        begin = time.perf_counter()
        values = [np.asarray(buffer).view(np.uint8) for buffer in buffers]
        try:
            header = slots.header_of(described, structure, values)
            self._slots.write(header, values)
        except OSError as error:
            self._pause(error)
        else:
            self._copy_elsewhere(self._process, header, values)
            self.written_step = described["step"]
            if self._told:
                errors.say("Snapshots are taken again.")
            self._told = False
        self.cost_seconds = seconds_before + time.perf_counter() - begin

    def _pause(self, error: OSError) -> None:
        self._retry_at = time.monotonic() + RETRY_SECONDS
        if not self._told:
            errors.say(
                f"A snapshot could not be written to {self.directory}: {error.strerror}. The run continues; "
                f"snapshots are tried again every {RETRY_SECONDS:.0f} s. Until then a restart continues from an older "
                "snapshot or the newest checkpoint."
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
        return slots.newest_whole(slots.by_step(self.directory, self._identity))

    def whole_steps(self) -> list[int]:
        """Return all steps of which every piece is present and whole, in any order."""
        found = slots.by_step(self.directory, self._identity)
        return [step for step, files in found.items() if slots.is_whole(files)]

    def restore(self, template: PyTree, step: int) -> tuple[PyTree, dict[str, Any]]:
        """Return the state and data_state of `step`, bit for bit, with the shardings of the template.

        The template's leaves are jax.ShapeDtypeStructs with a sharding (or jax.Arrays).

        Raises:
          SnapshotError: the snapshot has other leaves, shapes or dtypes.
        """
        files = slots.by_step(self.directory, self._identity)[step]
        header = files[0].header
        with_paths, treedef = jax.tree_util.tree_flatten_with_path(template)
        expected = [[path_name(path), str(leaf.dtype)] for path, leaf in with_paths]
        if expected != [leaf[:2] for leaf in header["leaves"]]:
            raise SnapshotError(
                f"A snapshot must have the leaves of this experiment's state; that of step {step} has others. "
                "It belongs to another job; resume without it."
            )
        values = slots.joined(files)
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
    found = slots.by_step(directory, identity)
    step = slots.newest_whole({step: files for step, files in found.items() if step > after})
    if step is None:
        return None
    header, (device, *_) = found[step][0].header, jax.devices("cpu")
    with jax.enable_x64(True):  # otherwise 64-bit values are truncated to 32 bits
        arrays = [jax.device_put(value, device) for value in slots.joined(found[step])]
    leaves = [
        manifests.Leaf(path, manifests.stored_name(position, path), dtype, array)
        for position, ((path, dtype, *_), array) in enumerate(zip(header["leaves"], arrays, strict=True))
    ]
    return Snapshot(step, leaves, header["data_state"])


def copy(state: PyTree) -> None:
    """Copy `state` as `Snapshots.save` does, so that its program is loaded; the copy is dropped."""
    packing.Packing.of(state).pack(state)


def _place(values: np.ndarray, struct: Any) -> jax.Array:
    """Return the values with the sharding of `struct`."""
    expected = tuple(struct.shape)
    if values.shape[: len(expected)] != expected:
        raise SnapshotError(f"The snapshot holds an array of shape {values.shape} where {expected} is expected.")
    return place(values, struct)
