"""Lists and comparisons of runs, read from their run records."""

import collections
import dataclasses
import os
import pathlib
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from jaxdist import errors
from jaxdist.rundir import lock, record
from jaxdist.rundir.writers import format_number


@dataclasses.dataclass(frozen=True)
class RunSummary:
    """A run in a list.

    Attributes:
      name: name of its directory.
      started: when its first attempt began, ISO 8601; None where the record does not say.
      ended: see `how_ended`.
      step: finished steps.
      seconds: wall time over all attempts.
      best: {metric, value, step}, None where the run watched no metric.
      metrics: the last value of each.
    """

    name: str
    started: str | None
    ended: str
    step: int
    seconds: float
    best: Mapping[str, Any] | None
    metrics: Mapping[str, float | None]


def find(folder: pathlib.Path) -> list[RunSummary]:
    """Return the runs in `folder`, the newest last.

    Raises:
      UserError: there is no such folder, or no run in it whose record can be read.

    Warns:
      UserWarning: the record of a run cannot be read, which is left out of the list.
    """
    if not folder.is_dir():
        raise errors.UserError(f"Runs are listed from a folder of run directories; there is no folder {folder}.")
    paths = sorted(path.parent for path in folder.glob(f"*/{record.FILE_NAME}"))
    if not paths:
        raise errors.UserError(
            f"{folder} contains no run: there is no {record.FILE_NAME} in any of its folders. Name another."
        )
    entries, damaged = [], []
    for path in paths:
        try:
            entries.append(_entry(path, record.RunRecord.read(path)))
        except (ValueError, OSError) as error:
            damaged.append(error)
    if not entries:
        raise errors.UserError(str(damaged[0])) from damaged[0]
    for each in damaged:
        warnings.warn(f"A run is left out of the list. {each}", stacklevel=2)
    return sorted(entries, key=lambda entry: (entry.started or "", entry.name))


def how_ended(run_dir: pathlib.Path, made: record.RunRecord) -> str:
    """Return the end reason; without one, `running`, or `interrupted` if no process holds the lock of the run.

    It is `unfinished` if the lock cannot be read, because another user owns it for example.
    """
    try:
        return made.end_reason or ("running" if lock.is_locked(run_dir) else "interrupted")
    except OSError:
        return "unfinished"


def _entry(path: pathlib.Path, made: record.RunRecord) -> RunSummary:
    seconds = sum(made.time_seconds.values())
    extra = made.extra
    return RunSummary(
        path.name, extra.get("started"), how_ended(path, made), made.step, seconds, extra.get("best"), made.metrics
    )


def show(entries: Sequence[RunSummary], *, width: int) -> str:
    """Return the list as a readable table.

    If it is wider than `width`, the start of the runs is left out, then their seconds: the name contains the time, and
    the best value must be visible.
    """
    columns = ["name", "started", "ended", "step", "seconds", "best @ step"]
    rows = [_cells(entry) for entry in entries]
    for left_out in ("", "started", "seconds"):
        columns = [name for name in columns if name != left_out]
        table = _table([tuple(columns), *(tuple(row[name] for name in columns) for row in rows)])
        if max(map(len, table.splitlines())) <= width:
            break
    return table


def _cells(entry: RunSummary) -> dict[str, str]:
    best, started = entry.best, entry.started or ""
    metric = "" if best is None else best["metric"].rpartition("/")[2]
    return {
        "name": entry.name,
        "started": started[:16].replace("T", " "),
        "ended": entry.ended,
        "step": str(entry.step),
        "seconds": f"{entry.seconds:.1f}",
        "best @ step": "" if best is None else f"{metric} {format_number(best['value'])} @ {best['step']}",
    }


def compare(run_dirs: Sequence[str | os.PathLike[str]]) -> dict[str, dict[str, list[Any]]]:
    """Return the differences between runs: under `config` and `result`, names with the values of each run.

    Raises:
      UserError: there are fewer than two runs, or a directory has no run.
    """
    if len(run_dirs) < 2:
        raise errors.UserError(f"A comparison needs two or more run directories; got {len(run_dirs)}.")
    made = [record.of_run(pathlib.Path(run_dir)) for run_dir in run_dirs]
    configs = [record.flat("", each.config) for each in made]
    return {"config": _differing(configs), "result": _differing([_result(each) for each in made])}


def _result(made: record.RunRecord) -> dict[str, Any]:
    best = made.extra.get("best") or {}
    git = made.extra.get("git") or {}
    return {
        "end_reason": made.end_reason,
        "step": made.step,
        "examples_seen": made.examples_seen,
        "examples_per_second": made.examples_per_second,
        "seconds": sum(made.time_seconds.values()),
        "params_sha256": made.params_sha256,
        **{f"best.{name}": value for name, value in best.items()},
        **{f"git.{name}": value for name, value in git.items()},
        **{f"versions.{name}": version for name, version in made.versions.items()},
        **made.metrics,
    }


def _differing(parts: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    names = dict.fromkeys(name for part in parts for name in part)
    values = {name: [part.get(name) for part in parts] for name in names}
    return {name: found for name, found in values.items() if any(value != found[0] for value in found)}


def distinct_names(run_dirs: Sequence[pathlib.Path]) -> list[str]:
    """Return the names of the directories; their paths where two share a name."""
    names = [run_dir.resolve().name for run_dir in run_dirs]
    shared = collections.Counter(names)
    return [str(run_dir) if shared[name] > 1 else name for name, run_dir in zip(names, run_dirs, strict=True)]


def show_comparison(
    run_dirs: Sequence[str | os.PathLike[str]], found: Mapping[str, Mapping[str, list[Any]]], *, width: int
) -> str:
    """Return a comparison as a table with a column for each run; if it is wider than `width`, with a line for each."""
    names = distinct_names([pathlib.Path(run_dir) for run_dir in run_dirs])
    rows = [(name, *map(_cell, each)) for values in found.values() for name, each in values.items()]
    table = _table([("", *names), *rows])
    if max(map(len, table.splitlines()), default=0) <= width:
        return table
    return "\n".join(line for name, *cells in rows for line in (name, *_lines(names, cells, width)))


def _lines(names: Sequence[str], cells: Sequence[str], width: int) -> list[str]:
    """Return the name of each run and its value, a value that is too long on lines of its own."""
    longest = max(map(len, names))
    if 2 + longest + 2 + max(map(len, cells)) <= width:
        return [f"  {name.ljust(longest)}  {cell}" for name, cell in zip(names, cells, strict=True)]
    wrapped = (textwrap.wrap(cell, max(1, width - 4)) for cell in cells)
    return [
        line
        for name, parts in zip(names, wrapped, strict=True)
        for line in (*(f"  {part}" for part in textwrap.wrap(name, width - 2)), *(f"    {part}" for part in parts))
    ]


def _cell(value: Any) -> str:
    return format_number(value) if isinstance(value, float) else str(value)


def _table(rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(line.rstrip() for line in lines)
