"""The curves of a run: its rows of metrics by step, examples and seconds, thinned to fit into a page."""

import dataclasses
import itertools
import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxdist.rundir import confusion, json_kinds, writers

SPEED = "examples_per_second"
"""The name of a computed curve: the examples between two rows of metrics, divided by the seconds between them."""
_PLACES = ("step", "examples_seen", "seconds")
_DIGITS = 6
_ROW = Mapping[str, float | None]


@dataclasses.dataclass(frozen=True)
class Curve:
    """A metric over the course of a run.

    Attributes:
      steps: the step of each value.
      examples: the examples trained on until then.
      seconds: the seconds of training until then.
      values: the values; None for one that was not finite.
      rows: number of values before thinning.
    """

    steps: Sequence[int]
    examples: Sequence[float]
    seconds: Sequence[float]
    values: Sequence[float | None]
    rows: int


def read_rows(run_dir: pathlib.Path) -> list[dict[str, Any]]:
    """Return the rows of metrics.jsonl, or none if there is no file; an incomplete last line is left out."""
    path = run_dir / writers.JSONL_NAME
    text = path.read_bytes() if path.exists() else b""
    lines = text[: text.rfind(b"\n") + 1].splitlines()
    return [_row(path, number, line) for number, line in enumerate(lines, start=1)]


def _row(path: pathlib.Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        row: dict[str, Any] = json.loads(line)
        wrong = json_kinds.misfit(row, _ROW, "a row")
        wrong = wrong or next((f"{name} must be a number" for name in _PLACES if row.get(name) is None), None)
        if wrong:
            raise ValueError(wrong)
        return row
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} must hold one JSON object per line, and line {number} is none ({error}). Remove the line, or move "
            "the file away for a report without curves."
        ) from error


def curves(rows: Sequence[Mapping[str, Any]], *, most_points: int) -> dict[str, Curve]:
    """Return the curve of each metric, in the order in which they appear, and the curve of the speed.

    The counts of a confusion matrix are left out; see `rundir.confusion`.
    """
    names = dict.fromkeys(name for row in rows for name in row if name not in _PLACES and not confusion.is_entry(name))
    found = {name: _curve([row for row in rows if name in row], name, most_points) for name in names}
    speeds = _speeds(rows)
    return found | ({SPEED: _curve(speeds, SPEED, most_points)} if speeds else {})


def _curve(rows: Sequence[Mapping[str, Any]], name: str, most_points: int) -> Curve:
    values = np.array([np.nan if row[name] is None else row[name] for row in rows], np.float64)
    kept = [rows[index] for index in thin(values, most_points)]
    return Curve(
        steps=[row["step"] for row in kept],
        examples=[row["examples_seen"] for row in kept],
        seconds=[round(row["seconds"], 2) for row in kept],
        values=[None if row[name] is None else float(f"{row[name]:.{_DIGITS}g}") for row in kept],
        rows=len(rows),
    )


def _speeds(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return rows with the examples per second since the row before."""
    return [
        {**{place: row[place] for place in _PLACES}, SPEED: (row["examples_seen"] - before["examples_seen"]) / seconds}
        for before, row in itertools.pairwise(rows)
        if (seconds := row["seconds"] - before["seconds"]) > 0 and row["examples_seen"] > before["examples_seen"]
    ]


def thin(values: np.ndarray, most: int) -> np.ndarray:
    """Return the indices of at most `most` values, ascending: all of them if possible.

    Otherwise the values are divided into equal parts. The first and the last value are kept, and of each part the
    smallest value, the largest, and one that is not finite, so that a spike of one step stays visible.
    """
    if len(values) <= most:
        return np.arange(len(values))
    kept = {0, len(values) - 1}
    for part in np.array_split(np.arange(len(values)), max((most - 2) // 3, 1)):
        finite = np.isfinite(values[part])
        if not finite.all():
            kept.add(int(part[~finite][0]))
        if finite.any():
            inside = part[finite]
            kept |= {int(inside[np.argmin(values[inside])]), int(inside[np.argmax(values[inside])])}
    return np.array(sorted(kept))
