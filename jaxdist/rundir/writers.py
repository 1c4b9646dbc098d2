"""Writers: store or print the metrics of a run, one row per step.

A file of metrics contains every step once and in order. Metrics of the same step that come in several parts
(training, then evaluation) become one row. A resumed run first drops the rows after the step it resumes from, because
it will write them again.
"""

import csv
import errno
import functools
import io
import json
import os
import pathlib
import socket
import struct
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TextIO

import jax

from jaxdist.rundir import confusion, files, full_disk, open_writers, record, rich_values

JSONL_NAME = "metrics.jsonl"
CSV_NAME = "metrics.csv"
TENSORBOARD_NAME = "tensorboard"


class Writer(Protocol):
    """Writes the metrics of one step after another."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write metrics of `step` at once; a repeated step extends its row. Raise OSError, naming the file."""

    def close(self) -> None:
        """Close the file. May be called twice."""

    # A writer may also have `write_rich(step, values)`, which takes a RichValue for each name.


def make_writers(
    run_dir: str | os.PathLike[str],
    kinds: Sequence[str] = ("jsonl",),
    *,
    resumed_step: int | None = None,
    name: str = "",
    config: Any = None,
) -> list[Writer]:
    """Return the writers of this process: those asked for on process 0, none on the others.

    Args:
      run_dir: exists; holds metrics.jsonl, metrics.csv and tensorboard/.
      kinds: any of console, jsonl, csv, tensorboard, and the names that `open_writers` knows.
      resumed_step: the step that the run resumes from. None for a new run, which refuses an existing file
        (FileExistsError).
      name: name of the experiment, for trackers.
      config: the experiment as plain data, for trackers.
    """
    if jax.process_index() != 0:
        return []
    run = open_writers.WrittenRun(pathlib.Path(run_dir), name, config, resumed_step)
    return [_make_writer(run, kind) for kind in kinds]


def check(kinds: Sequence[str]) -> None:
    """Raise UserError if one of the writers is unknown, or cannot be used because its package is missing."""
    for kind in kinds:
        open_writers.check(kind)


def _make_writer(run: open_writers.WrittenRun, kind: str) -> Writer:
    run_dir, resumed_step = run.run_dir, run.resumed_step
    match kind:
        case "console":
            return ConsoleWriter()
        case "jsonl":
            return JsonlWriter(run_dir / JSONL_NAME, resumed_step=resumed_step)
        case "csv":
            return CsvWriter(run_dir / CSV_NAME, resumed_step=resumed_step)
        case "tensorboard":
            return TensorBoardWriter(run_dir / TENSORBOARD_NAME, resumed_step=resumed_step)
    return open_writers.make(kind, run)


class Patient:
    """A writer whose rows wait while the disk is full."""

    def __init__(self, writer: Writer) -> None:
        self._writer = writer
        self._write_rich = getattr(writer, "write_rich", None)
        self.takes_rich_values = getattr(writer, "takes_rich_values", self._write_rich is not None)
        self._rows = full_disk.Backlog[Callable[[], None]](lambda write: write(), "metrics")

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """See Writer."""
        self._rows.add(functools.partial(self._writer.write, step, dict(metrics)))

    def write_rich(self, step: int, values: Mapping[str, rich_values.RichValue]) -> None:
        """Write images, histograms, tables and texts, if the writer takes them; see Writer."""
        if self._write_rich is not None and self.takes_rich_values:
            self._rows.add(functools.partial(self._write_rich, step, dict(values)))

    def close(self) -> None:
        """Write the waiting rows as far as there is room, and report those that are lost; see Writer."""
        try:
            self._rows.close()
        finally:
            self._writer.close()


def format_number(value: Any) -> str:
    """Return a number with four significant digits; `value` is anything that `float` accepts, or None of a record."""
    return "not finite" if value is None else f"{float(value):.4g}"


def format_metrics(metrics: Mapping[str, Any]) -> str:
    """Return the metrics as one readable line, in the given order, without the counts of confusion matrices."""
    return "  ".join(f"{name} {format_number(value)}" for name, value in confusion.without_entries(metrics).items())


class ConsoleWriter:
    """Prints one line per call, to standard output unless another stream is given."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stdout

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Print one line; see Writer."""
        print(f"step {step}  {format_metrics(metrics)}", file=self._stream, flush=True)

    def close(self) -> None:
        """Do nothing: the stream belongs to the caller. See Writer."""


class JsonlWriter:
    """Writes one JSON object per line, each with `step`. NaN and the infinities become null.

    A line is complete only with its newline; an incomplete last line is dropped on resume. Any other damage raises
    ValueError.
    """

    def __init__(self, path: str | os.PathLike[str], *, resumed_step: int | None = None) -> None:
        self._rows = _Rows(pathlib.Path(path), _step_of_json, header_lines=0, resumed_step=resumed_step)
        self._last = json.loads(self._rows.last) if self._rows.last else {}

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append the row, or add to the last one; see Writer."""
        again = self._rows.accept(step, metrics)
        self._last = (self._last if again else {"step": step}) | record.numbers(metrics)
        self._rows.put(step, json.dumps(self._last, allow_nan=False) + "\n")

    def close(self) -> None:
        """See Writer."""
        self._rows.close()


class CsvWriter:
    """Writes a table with the column `step` first; a column that appears later is added, empty in the rows before it.

    A new column rewrites the whole file (a new file, then a rename), so its cost grows with the length of the file.
    """

    def __init__(self, path: str | os.PathLike[str], *, resumed_step: int | None = None) -> None:
        self._path = pathlib.Path(path)
        self._rows = _Rows(self._path, _step_of_csv, header_lines=1, resumed_step=resumed_step)
        self._columns = _csv_fields(self._rows.header)
        last = zip(self._columns, _csv_fields(self._rows.last))
        self._last = {name: field for name, field in last if field}

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append the row, or add to the last one; see Writer."""
        again = self._rows.accept(step, metrics)
        self._last = (self._last if again else {"step": str(step)}) | {k: repr(float(v)) for k, v in metrics.items()}
        new = [name for name in self._last if name not in self._columns]
        if new:
            self._rows = self._with_columns(new)
        self._rows.put(step, _csv_line([self._last.get(name, "") for name in self._columns]))

    def close(self) -> None:
        """See Writer."""
        self._rows.close()

    def _with_columns(self, new: list[str]) -> "_Rows":
        """Return the rows of the file with further columns; if the disk is full, the file stays unchanged."""
        old = self._path.read_text(encoding="utf-8").splitlines()[1:]
        rows = "".join(line + "," * len(new) + "\n" for line in old)
        files.write_text(self._path, _csv_line([*self._columns, *new]) + rows)
        self._rows.close()
        self._columns += new
        return _Rows(self._path, _step_of_csv, header_lines=1, resumed_step=sys.maxsize)


class TensorBoardWriter:
    """Writes scalars to a new TensorBoard event file in `log_dir`; a resumed run marks the steps that it replaces.

    Events are written at once and on the caller's thread. tensorboardX's own SummaryWriter passes events to a thread,
    where a full disk is not noticed until the queue blocks forever, so only its message types and checksum are used.
    """

    def __init__(self, log_dir: str | os.PathLike[str], *, resumed_step: int | None = None) -> None:
        from tensorboardX import proto, record_writer, summary

        self._Event, self._summary, self._checksum = proto.event_pb2.Event, summary, record_writer.masked_crc32c
        self._tags: dict[str, str] = {}
        log_dir = pathlib.Path(log_dir)
        log_dir.mkdir(parents=True, exist_ok=True)
        older = sorted(log_dir.glob("events.out.tfevents.*"))
        if older and resumed_step is None:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(older[0]))
        # TensorBoard reads the files in the order of their names: the time, then a count for two within one second.
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{len(older):06d}"
        self._path = log_dir / name
        self._file = open(self._path, "xb", buffering=0)  # noqa: SIM115 - lives as long as the writer
        self._put(self._Event(wall_time=time.time(), file_version="brain.Event:2"))
        if resumed_step is not None:
            start = proto.event_pb2.SessionLog(status=proto.event_pb2.SessionLog.START)
            self._put(self._Event(wall_time=time.time(), step=resumed_step + 1, session_log=start))

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write one event with all the scalars; see Writer."""
        event = self._Event(wall_time=time.time(), step=step)
        for name, value in metrics.items():
            if name not in self._tags:  # asking once: it takes ten times as long as the rest
                self._tags[name] = self._summary.scalar(name, 0.0).value[0].tag
            event.summary.value.add(tag=self._tags[name], simple_value=float(value))
        self._put(event)

    def write_rich(self, step: int, values: Mapping[str, rich_values.RichValue]) -> None:
        """Write one event with images, histograms and texts; a table is written as a text. See Writer."""
        event = self._Event(wall_time=time.time(), step=step)
        for name, value in values.items():
            event.summary.value.extend(self._rich(name, value).value)
        self._put(event)

    def _rich(self, name: str, value: rich_values.RichValue) -> Any:
        match value:
            case rich_values.Image():
                return self._summary.image(name, value.to_bytes(), dataformats="HWC")
            case rich_values.Histogram():
                counts, edges = value.count()
                middles = (edges[:-1] + edges[1:]) / 2
                moments = [float((counts * power).sum()) for power in (middles, middles**2)]
                bounds, total = (float(edges[0]), float(edges[-1])), int(counts.sum())
                return self._summary.histogram_raw(name, *bounds, total, *moments, edges[1:].tolist(), counts.tolist())
            case rich_values.Table():
                return self._summary.text(name, value.to_markdown())
        return self._summary.text(name, value.text)

    def close(self) -> None:
        """See Writer."""
        self._file.close()

    def _put(self, event: Any) -> None:
        """Write one TFRecord: length, its checksum, the message, its checksum; little-endian."""
        message = event.SerializeToString()
        length = struct.pack("<Q", len(message))
        checksums = [struct.pack("<I", self._checksum(part)) for part in (length, message)]
        start = self._file.tell()
        try:
            _write_all(self._path, self._file, length + checksums[0] + message + checksums[1])
        except OSError:  # TensorBoard reads nothing after half a record
            self._file.truncate(start)
            self._file.seek(start)
            raise


class _Rows:
    """A file of header lines, then one line per step in ascending order; the last line may be replaced.

    `step_of` returns a line's step, or -1 for a header; it raises ValueError or a similar error for any other line.
    """

    def __init__(
        self, path: pathlib.Path, step_of: Callable[[str], int], *, header_lines: int, resumed_step: int | None
    ) -> None:
        self._path = path
        self.header = self.last = ""
        self._last_step = -1
        self._start = self._end = self._reach = 0  # byte offsets of the last row, and how far the file reaches
        fresh = resumed_step is None or not path.exists()
        self._file = open(path, "x+b" if fresh else "r+b", buffering=0)  # noqa: SIM115 - lives as long as the writer
        if resumed_step is not None:
            try:
                self._keep(step_of, header_lines, resumed_step)
            except BaseException:
                self._file.close()
                raise

    def accept(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Return whether `step` is the last row's; raise ValueError if it is earlier, or a metric is called `step`."""
        if "step" in metrics:
            raise ValueError(
                f"A metric cannot be named 'step', which is the name of the step's column ({self._path}). Rename it."
            )
        if step < self._last_step:
            raise ValueError(
                f"Rows must be written in the order of steps; {self._path} has step {self._last_step}, got {step}."
            )
        return step == self._last_step

    def put(self, step: int, line: str) -> None:
        """Write `line`, which ends in a newline, as the row of `step`, in place of the last row if that is its row."""
        if step != self._last_step:
            self._start = self._end
        self._file.seek(self._start)
        # One write over the old row, without a truncation before it: a kill in between must not lose the old row.
        data = line.encode()
        end = self._start + len(data)
        self._reach = max(self._reach, self._end, end)  # also of a write that fails half-way
        _write_all(self._path, self._file, data)
        if end < self._reach:
            self._file.truncate(end)
        self._end = self._reach = end
        self._last_step = step

    def close(self) -> None:
        self._file.close()

    def _keep(self, step_of: Callable[[str], int], header_lines: int, resumed_step: int) -> None:
        """Keep the complete lines up to the resumed step and drop the rest."""
        lines = [line for line in io.BytesIO(self._file.readall()) if line.endswith(b"\n")]  # all but a torn last one
        for number, line in enumerate(lines, 1):
            try:
                text = line.decode()
                step = step_of(text)
                if (step < 0) != (number <= header_lines):
                    raise ValueError(f"{header_lines} header lines come first")
            except (ValueError, KeyError, TypeError, IndexError) as error:
                raise ValueError(
                    f"{self._path}, line {number} is not a row of metrics with a step ({error}). "
                    "Name another run directory, or move the file away."
                ) from error
            if step > resumed_step:
                break
            if number <= header_lines:
                self.header = text
            else:
                self.last, self._last_step, self._start = text, step, self._end
            self._end += len(line)
        with files.naming(self._path):
            self._file.truncate(self._end)


def _write_all(path: pathlib.Path, file: io.FileIO, data: bytes) -> None:
    """Write unbuffered: a killed process loses nothing, and a full disk raises here."""
    with files.naming(path):
        while data:
            data = data[file.write(data) :]


def _step_of_json(line: str) -> int:
    return int(json.loads(line)["step"])


def _step_of_csv(line: str) -> int:
    first = _csv_fields(line)[0]
    return -1 if first == "step" else int(first)


def _csv_fields(line: str) -> list[str]:
    return next(csv.reader([line]), [])


def _csv_line(fields: Sequence[str]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(fields)
    return text.getvalue()
