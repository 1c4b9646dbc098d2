"""The board: each process reports what it is doing in one small file, outside the collectives.

A process stuck in a collective cannot be asked, and one that is stopped cannot answer; but any process can read its
last report. On one machine the directory is in memory; on several it must be shared.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import tempfile
import time
from typing import Any, TypeAlias

_VERDICT = "verdict.json"
_SIZE = 256
"""Bytes of a report, padded with spaces: each is written by one call, over the one before."""


@dataclasses.dataclass(frozen=True)
class ProcessReport:
    """What a process is doing, as it reports it.

    Attributes:
      step: number of finished steps.
      phase: an account of the stopwatch: input, compute, checkpoint, eval, compile, restart, other; or "done".
      beat: counts the reports, to distinguish a process that reports the same twice from a silent one.
      time: seconds since 1970 by the clock of its machine; only for display, since clocks differ.
    """

    step: int
    phase: str
    beat: int
    time: float = 0.0


class ReportWriter:
    """Writes one process's reports."""

    def __init__(self, directory: pathlib.Path, process: int):
        directory.mkdir(parents=True, exist_ok=True)
        self._file = os.open(_path(directory, process), os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._beat = 0

    def write(self, step: int, phase: str) -> ProcessReport:
        """Replace the last report, unless the memory is full; return the new one."""
        self._beat += 1
        report = ProcessReport(step, phase, self._beat, time.time())
        # By hand, since every step is reported: building the JSON would be a tenth of a small step.
        text = f'{{"step": {step}, "phase": "{phase}", "beat": {self._beat}, "time": {report.time:.6f}}}'
        with contextlib.suppress(OSError):
            os.pwrite(self._file, text.ljust(_SIZE - 1).encode() + b"\n", 0)
        return report

    def close(self) -> None:
        """Close the file; the last report stays."""
        os.close(self._file)


def read(directory: pathlib.Path, process: int) -> ProcessReport | None:
    """Return the last report of a process; None before its first, and when read in the middle of a write."""
    try:
        return ProcessReport(**json.loads(_path(directory, process).read_bytes()))
    except (FileNotFoundError, ValueError):
        return None


Mark: TypeAlias = tuple[int, int] | None
"""Identifies a published verdict: its inode and time of writing, which are compared for equality only, because the
clock of the file system may be set. None stands for no verdict."""


def mark(directory: pathlib.Path) -> Mark:
    """Return the mark of the verdict that is published now."""
    with contextlib.suppress(FileNotFoundError):
        found = (directory / _VERDICT).stat()
        return found.st_ino, found.st_mtime_ns
    return None


def publish(directory: pathlib.Path, verdict: dict[str, Any], *, earlier: Mark = None) -> None:
    """Publish a verdict for all processes to read, unless there is one already: the first counts.

    A verdict marked `earlier` is of an earlier attempt and is replaced.
    """
    with tempfile.NamedTemporaryFile("w", dir=directory, prefix=_VERDICT) as file:
        file.write(json.dumps(verdict))
        file.flush()
        if earlier is not None and mark(directory) == earlier:
            (directory / _VERDICT).unlink(missing_ok=True)
        # A link appears whole and fails if the name is taken; a rename would replace what others have read.
        with contextlib.suppress(FileExistsError):
            os.link(file.name, directory / _VERDICT)


def published(directory: pathlib.Path, *, earlier: Mark = None) -> dict[str, Any] | None:
    """Return the published verdict, None without one; a verdict marked `earlier` is of an earlier attempt."""
    found = mark(directory)
    if found is None or found == earlier:
        return None
    with contextlib.suppress(FileNotFoundError):
        return json.loads((directory / _VERDICT).read_bytes())
    return None


def clear(directory: pathlib.Path) -> None:
    """Delete all reports and verdicts: those of an earlier attempt are not valid for the next."""
    for path in [*directory.glob("process-*.report"), *directory.glob(f"{_VERDICT}*")]:
        path.unlink()


def _path(directory: pathlib.Path, process: int) -> pathlib.Path:
    return directory / f"process-{process}.report"
