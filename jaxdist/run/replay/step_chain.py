"""The chain of step hashes in a run directory: for each step of a canonical run, what its bits were.

The first line describes the hashes; after it comes one entry of a fixed size for each step, at a place that follows
from the step's number. A run that continues from an earlier step writes its entries over those that are there, and
the two are compared: the same step, made twice, must have had the same bits.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import zlib
from collections.abc import Sequence

import numpy as np

from jaxdist.rundir import full_disk

FILE_NAME = "steps.chain"
FORMAT = 1
_LONGEST_LINE = 1 << 24


@dataclasses.dataclass(frozen=True)
class Form:
    """What the hashes of a step are of: so many logical shards, then the leaves of these names."""

    logical_shards: int
    names: tuple[str, ...]

    @property
    def entry(self) -> np.dtype:
        """The layout of a step's entry: `whole` stands for all hashes, those of leaves are kept to 16 bits."""
        fields = [("crc", "<u4"), ("step", "<u4"), ("whole", "<u4")]
        return np.dtype([*fields, ("shards", "<u4", (self.logical_shards,)), ("leaves", "<u2", (len(self.names),))])

    def line(self) -> bytes:
        """Return the first line of the file."""
        return json.dumps({"format": FORMAT, **dataclasses.asdict(self)}).encode() + b"\n"

    @classmethod
    def from_line(cls, line: bytes) -> "Form | None":
        """Return what `line` describes; None for what it cannot be read from."""
        with contextlib.suppress(ValueError, KeyError, TypeError):
            content = json.loads(line)
            if content["format"] == FORMAT:
                return cls(int(content["logical_shards"]), tuple(map(str, content["names"])))
        return None


@dataclasses.dataclass(frozen=True)
class Difference:
    """A step whose hashes are not the same twice: the logical shards and the leaves that differ."""

    step: int
    shards: tuple[int, ...]
    leaves: tuple[str, ...]

    def __str__(self) -> str:
        parts = [f"logical shard{'s' if len(self.shards) > 1 else ''} {', '.join(map(str, self.shards))}"]
        parts = parts if self.shards else []
        shown = list(self.leaves[:_MOST_SHOWN])
        more = f" and {len(self.leaves) - _MOST_SHOWN} more" if len(self.leaves) > _MOST_SHOWN else ""
        parts += [f"leaf {', '.join(shown)}{more}"] if shown else []
        return f"step {self.step}: {'; '.join(parts) or 'a leaf whose short hash is equal'}"


_MOST_SHOWN = 4


def entries(form: Form, first_step: int, hashes: np.ndarray) -> np.ndarray:
    """Return the entries of consecutive steps.

    `hashes` are uint32 [steps, logical shards and leaves].
    """
    made = np.zeros(len(hashes), form.entry)
    made["step"] = np.arange(first_step, first_step + len(hashes))
    made["whole"] = [zlib.crc32(row.tobytes()) for row in np.ascontiguousarray(hashes, "<u4")]
    made["shards"] = hashes[:, : form.logical_shards]
    made["leaves"] = short(hashes[:, form.logical_shards :])
    made["crc"] = [_crc(entry) for entry in made]
    return made


def short(hashes: np.ndarray) -> np.ndarray:
    """Return the 16 bits that are kept of the hash of a leaf."""
    return ((hashes >> 16) ^ (hashes & 0xFFFF)).astype("<u2")


def difference(form: Form, first: np.void, second: np.void) -> Difference | None:
    """Return how two entries of one step differ; None if they are the same, or one was not written whole."""
    if first["whole"] == second["whole"] or not (is_whole(first) and is_whole(second)):
        return None
    shards = np.flatnonzero(first["shards"] != second["shards"])
    leaves = np.flatnonzero(first["leaves"] != second["leaves"])
    return Difference(
        int(first["step"]), tuple(int(place) for place in shards), tuple(form.names[place] for place in leaves)
    )


def is_whole(entry: np.void) -> bool:
    """Return whether an entry was written, all of it."""
    return bool(entry["step"]) and int(entry["crc"]) == _crc(entry)


def _crc(entry: np.void) -> int:
    return zlib.crc32(entry.tobytes()[4:])


@dataclasses.dataclass(frozen=True)
class StepChain:
    """The hashes of a run's steps: `entries[step - 1]`; a step that was not recorded has step 0 there.

    So has a step whose entry is damaged, and these are `damaged`.
    """

    form: Form
    entries: np.ndarray
    damaged: tuple[int, ...] = ()

    def entry(self, step: int) -> np.void | None:
        """Return the entry of a step, None where there is none."""
        found = self.entries[step - 1] if 1 <= step <= len(self.entries) else None
        return found if found is not None and found["step"] else None


def read(run_dir: pathlib.Path) -> StepChain | None:
    """Return the chain of a run directory, None without one that can be read."""
    try:
        with (run_dir / FILE_NAME).open("rb") as file:
            line = file.readline(_LONGEST_LINE)
            form = Form.from_line(line)
            if form is None:
                return None
            content = np.fromfile(file, np.uint8)
    except FileNotFoundError:
        return None
    size = form.entry.itemsize
    content = content[: len(content) // size * size]
    damaged = _damaged(content.reshape(-1, size))
    entries = content.view(form.entry)
    entries[list(damaged)] = np.zeros((), form.entry)
    return StepChain(form, entries, tuple(place + 1 for place in damaged))


def _damaged(content: np.ndarray) -> tuple[int, ...]:
    """Return the places of entries that are not what was written there; one of zeros was not written."""
    fields = np.ascontiguousarray(content[:, :8]).view("<u4")
    places = np.arange(len(content))
    wrong = [place for place in places if int(fields[place, 0]) != zlib.crc32(content[place, 4:].tobytes())]
    moved = places[fields[:, 1] != places + 1].tolist()
    return tuple(sorted(place for place in {*wrong, *moved} if content[place].any()))


class ChainFile:
    """Writes the chain of a run directory; on process 0 only, since the hashes are the same on all.

    Training continues from `step`, 0 for a new run. Where it `compares`, the steps after it that were recorded must
    have the same bits; otherwise, after settings were changed for example, they are forgotten. A file of another form
    is set aside.
    """

    def __init__(self, run_dir: pathlib.Path, form: Form, *, step: int, compares: bool):
        path = run_dir / FILE_NAME
        self._form, self._start = form, len(form.line())
        self._set_aside_another_form(path, step)
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        self._writes = full_disk.Backlog[tuple[int, bytes]](self._write, FILE_NAME)
        if os.fstat(self._file).st_size < self._start:
            self._writes.add((0, form.line()))
        if not compares:
            self.cut(step)

    def add(self, first_step: int, hashes: np.ndarray) -> list[Difference]:
        """Write the hashes of consecutive steps; return how those differ that had been recorded before."""
        made = entries(self._form, first_step, hashes)
        offset = self._offset(first_step)
        before = os.pread(self._file, made.nbytes, offset)
        size = self._form.entry.itemsize
        earlier = np.frombuffer(before[: len(before) // size * size], self._form.entry)
        self._writes.add((offset, made.tobytes()))
        pairs = zip(earlier, made[: len(earlier)], strict=True)
        same_step = [(old, new) for old, new in pairs if old["step"] == new["step"]]
        return [found for old, new in same_step if (found := difference(self._form, old, new))]

    def cut(self, step: int) -> None:
        """Forget what is recorded of the steps after `step`."""
        end = self._offset(step + 1)
        if os.fstat(self._file).st_size > end:
            os.ftruncate(self._file, end)

    def close(self) -> None:
        """Write what waits, as far as there is room, and close the file."""
        self._writes.close()
        os.close(self._file)

    def _offset(self, step: int) -> int:
        return self._start + (step - 1) * self._form.entry.itemsize

    def _write(self, item: tuple[int, bytes]) -> None:
        offset, content = item
        view = memoryview(content)
        while view:
            written = os.pwrite(self._file, view, offset)
            offset, view = offset + written, view[written:]

    def _set_aside_another_form(self, path: pathlib.Path, step: int) -> None:
        try:
            with path.open("rb") as file:
                line = file.readline(_LONGEST_LINE)
        except FileNotFoundError:
            return
        if line != self._form.line():
            path.rename(path.with_name(f"{FILE_NAME}.until-{step}"))


def first_difference(first: StepChain, second: StepChain, steps: Sequence[int] | range) -> Difference | None:
    """Return the first of `steps`, recorded in both, whose hashes differ; the forms must be equal."""
    chosen = np.asarray(steps, np.int64) - 1
    ours, theirs = first.entries[chosen], second.entries[chosen]
    recorded = (ours["step"] > 0) & (ours["step"] == theirs["step"])
    for place in np.flatnonzero(recorded & (ours["whole"] != theirs["whole"])):
        if found := difference(first.form, ours[place], theirs[place]):
            return found
    return None
