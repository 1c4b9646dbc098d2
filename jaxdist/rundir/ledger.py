"""The example ledger: which examples each step trained on, and a check that none was lost or used twice.

One short line per step: the step, the epoch and the half-open range of positions in the order of that epoch. The order
is a pure function of seed, epoch and position, so a range identifies the examples exactly. A run that continues from
an earlier step writes a line that says so. The steps recorded after that step then belong to a state that was
discarded, and the check ignores them.
"""

import dataclasses
import os
import pathlib
from collections.abc import Iterable, Sequence
from typing import Protocol

from jaxdist.rundir import full_disk

FILE_NAME = "ledger.txt"


@dataclasses.dataclass(frozen=True)
class LedgerEntry:
    """A step that was not discarded: it trained on the positions [begin, end) of `epoch`."""

    step: int
    epoch: int
    begin: int
    end: int


class EpochPosition(Protocol):
    """A position in the data, for example a `data.Position`."""

    @property
    def epoch(self) -> int:
        """The epoch, from 0."""

    @property
    def position(self) -> int:
        """Examples of the epoch that were trained on."""


class LedgerError(ValueError):
    """The ledger shows an example that was lost or used twice, or cannot be read; the message says which."""


class Recorder:
    """Writes the ledger; in one process only, since all processes train on parts of one batch.

    An existing file is appended to. `place` is the position in the data after `step`, from which training continues;
    None at the very beginning.
    """

    def __init__(self, run_dir: pathlib.Path, *, step: int = 0, place: EpochPosition | None = None):
        # Unbuffered, each line one write: what was written survives the death of this process.
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        self._file = os.open(run_dir / FILE_NAME, flags, 0o644)
        self._lines = full_disk.Backlog[bytearray](self._write, FILE_NAME)
        self._epoch, self._position = (place.epoch, place.position) if place else (0, 0)
        self._step = step
        # The line break ends what an earlier process may have left half-written.
        self._lines.add(bytearray(f"\nfrom {step}\n".encode()))

    def add(self, step: int, place: EpochPosition) -> None:
        """Add the line of a step; `place` is the position in the data after it."""
        self.add_range(step, place.epoch, self._position if place.epoch == self._epoch else 0, place.position)

    def add_range(self, step: int, epoch: int, begin: int, end: int) -> None:
        """Add the line of a step that trained on the positions [begin, end); an earlier step discards what follows."""
        line = "" if step > self._step else f"from {step - 1}\n"
        self._lines.add(bytearray(f"{line}{step} {epoch} {begin} {end}\n".encode()))
        self._step, self._epoch, self._position = step, epoch, end

    def _write(self, line: bytearray) -> None:
        while line:  # what was written of it before the disk was full is not written again
            del line[: os.write(self._file, line)]

    def close(self) -> None:
        """Write what waits, as far as there is room, say what is lost, and close the file."""
        try:
            self._lines.close()
        finally:
            os.close(self._file)


def read(run_dir: pathlib.Path) -> list[LedgerEntry]:
    """Return the entries of the steps that were not discarded, in order.

    Raises:
      LedgerError: a line cannot be read (unless it is incomplete because its process died), or a process continued
        from a step that was not recorded.
    """
    try:
        text = (run_dir / FILE_NAME).read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError as error:
        raise LedgerError(f"{run_dir} has no ledger. Record one: --set recovery.ledger=true.") from error
    return lineage(text.split("\n"))


def lineage(lines: Sequence[str]) -> list[LedgerEntry]:
    """Return the entries that count among the lines of a ledger; see `read`."""
    entries: list[LedgerEntry] = []
    for number, line in enumerate(lines, start=1):
        words = line.split()
        if not words:
            continue
        # Of a line that ends with the file, or where the next process continued it, digits may be missing.
        may_be_part = number == len(lines) or lines[number].startswith("from ")
        is_start = words[0] == "from" and len(words) == 2
        are_numbers = all(map(str.isdecimal, words[is_start:]))
        if is_start and are_numbers:
            # A whole one directly before another has no effect: that one goes further back.
            entries = entries if may_be_part else _until(entries, int(words[1]))
        elif len(words) == 4 and are_numbers and number < len(lines):
            entries.append(LedgerEntry(*map(int, words)))
        elif not may_be_part:
            raise LedgerError(f"Line {number} of the ledger cannot be read: {line!r}. The file was changed or damaged.")
    return entries


def _until(entries: list[LedgerEntry], step: int) -> list[LedgerEntry]:
    kept = [entry for entry in entries if entry.step <= step]
    if (kept[-1].step if kept else 0) != step:
        raise LedgerError(
            f"The ledger shows a process that continues from step {step}, but the last recorded step is "
            f"{kept[-1].step if kept else 0}: the steps in between were not recorded."
        )
    return kept


def check(entries: Iterable[LedgerEntry], *, num_examples: int) -> int:
    """Return the number of whole epochs in which the entries used each of `num_examples` examples exactly once.

    Raises:
      LedgerError: a step is missing or recorded twice, or an example of an epoch was lost or used twice; the message
        names the step and the positions. The last epoch may be unfinished.
    """
    step, epoch, position = 0, 0, 0
    for entry in entries:
        if entry.step != step + 1:
            raise LedgerError(f"After step {step} the ledger continues with step {entry.step}.")
        if position == num_examples:
            epoch, position = epoch + 1, 0
        if entry.epoch != epoch:
            raise LedgerError(
                f"Step {entry.step} trained on epoch {entry.epoch} when {position} of {num_examples} examples of epoch "
                f"{epoch} were used."
            )
        if entry.begin != position or not entry.begin < entry.end <= num_examples:
            happened = "examples were lost" if entry.begin > position else "examples were used twice"
            if entry.begin == position:
                happened = "it has no example, or more than are left"
            raise LedgerError(
                f"Step {entry.step} trained on positions [{entry.begin}, {entry.end}) of epoch {epoch}; the next "
                f"unused one was {position} of {num_examples}, so {happened}."
            )
        step, position = entry.step, entry.end
    return epoch + (position == num_examples)
