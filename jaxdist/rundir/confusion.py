"""Confusion matrices among the metrics of a run: each count is a metric of its own, `eval/confusion_2_1`.

Rows of metrics hold them all. A line for people has no room for them; they are put together as a table.
"""

import re
from collections.abc import Mapping
from typing import Any

_ENTRY = re.compile(r"(?:(?P<where>.*)/)?confusion_(?P<label>\d+)_(?P<predicted>\d+)")


def is_entry(name: str) -> bool:
    """Return whether a metric is a count of a confusion matrix."""
    return _ENTRY.fullmatch(name) is not None


def without_entries(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Return the metrics that are no counts of a confusion matrix."""
    return {name: value for name, value in metrics.items() if not is_entry(name)}


def evaluated(metrics: Mapping[str, float | None]) -> dict[str, float]:
    """Return the finite metrics of an evaluation that are no counts of a confusion matrix."""
    values = without_entries(metrics).items()
    return {name: value for name, value in values if name.startswith("eval/") and value is not None}


def matrices(metrics: Mapping[str, float | None]) -> dict[str, list[list[float]]]:
    """Return the confusion matrices among the metrics, by the data they are of: counts[label][class]."""
    found: dict[str, dict[tuple[int, int], float]] = {}
    for name, value in metrics.items():
        if (match := _ENTRY.fullmatch(name)) and value is not None:
            place = int(match["label"]), int(match["predicted"])
            found.setdefault(match["where"] or "", {})[place] = value
    return {where: _square(counts) for where, counts in found.items()}


def format_tables(metrics: Mapping[str, float | None]) -> str:
    """Return the confusion matrices among the metrics as tables for people; "" where there are none."""
    return "\n".join(_table(where, counts) for where, counts in matrices(metrics).items())


def _table(where: str, counts: list[list[float]]) -> str:
    cells = [["", *map(str, range(len(counts)))]]
    cells += [[str(label), *(f"{count:g}" for count in row)] for label, row in enumerate(counts)]
    width = max(len(cell) for row in cells for cell in row)
    title = f"{where}/confusion" if where else "confusion"
    lines = ["  ".join(cell.rjust(width) for cell in row) for row in cells]
    return "\n".join([f"{title} (a row for each label, a column for each class it was taken for)", *lines])


def _square(counts: Mapping[tuple[int, int], float]) -> list[list[float]]:
    size = 1 + max(max(place) for place in counts)
    return [[counts.get((label, predicted), 0.0) for predicted in range(size)] for label in range(size)]
