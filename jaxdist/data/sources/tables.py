"""Tables: CSV files held in memory, Parquet files read by row group. A row is an example, a column a field."""

import bisect
import csv
import itertools
import os
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxdist import extras
from jaxdist.data.sources.memmap import find_files
from jaxdist.data.sources.source import ArraySource, CorruptExample, Example, fingerprint_text


def csv_source(
    path: str | os.PathLike, *, columns: Sequence[str] | None = None, categories: Sequence[str] = ()
) -> ArraySource:
    """Return the rows of a CSV file with a header line: whole-number columns int64, others float64.

    Args:
      path: the file, UTF-8.
      columns: the columns to keep; None keeps all.
      categories: columns of texts, which become int32 numbers: the place of the text among the column's sorted texts.

    Raises:
      ValueError: a column that is missing, or a cell that is no number (its line is named).
    """
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    if len(rows) < 2:
        raise ValueError(f"{os.fspath(path)} needs a header line and at least one row; it has {len(rows)} lines.")
    header = rows[0]
    wanted = list(columns) if columns is not None else header
    for name in [*wanted, *categories]:
        if name not in header:
            raise ValueError(f"{os.fspath(path)} has no column {name!r}; its columns are {header}.")
    for number, row in enumerate(rows[1:], start=2):
        if len(row) != len(header):
            raise CorruptExample(f"{os.fspath(path)}, line {number}: {len(row)} cells under {len(header)} columns.")
    cells = {name: [row[header.index(name)] for row in rows[1:]] for name in wanted}
    return ArraySource({name: _column(path, name, texts, name in categories) for name, texts in cells.items()})


def _column(path: str | os.PathLike, name: str, texts: list[str], is_category: bool) -> np.ndarray:
    if is_category:
        return np.unique(np.array(texts), return_inverse=True)[1].astype(np.int32)
    try:
        return np.array([int(text) for text in texts], np.int64)
    except ValueError:
        pass  # not all whole numbers: read all as floats
    for number, text in enumerate(texts, start=2):
        try:
            float(text)
        except ValueError:
            raise CorruptExample(
                f"{os.fspath(path)}, line {number}: column {name!r} holds {text!r}, which is no number. Leave the "
                "column out of `columns`, or name it in `categories`."
            ) from None
    return np.array([float(text) for text in texts])


class ParquetSource:
    """The rows of Parquet files: numbers, lists of equally many numbers, and bytes (as uint8, for `example_fn`).

    Row groups are the unit of reading, and a few are kept. Files with large row groups read best in the order
    `BlockShuffled(rows of a row group)`.
    """

    def __init__(
        self,
        paths: str | os.PathLike | Sequence[str | os.PathLike],
        *,
        columns: Sequence[str] | None = None,
        row_groups_kept: int = 8,
    ):
        self._paths, self._columns, self._kept = find_files(paths, "*.parquet"), columns, row_groups_kept
        self._open()

    def _open(self) -> None:
        parquet = extras.require("pyarrow.parquet")
        self._lock, self._cache = threading.Lock(), dict[int, Any]()
        self._files = [_open_parquet(parquet, path) for path in self._paths]
        self._groups = [
            (file, group) for file, opened in enumerate(self._files) for group in range(opened.num_row_groups)
        ]
        rows = [self._files[file].metadata.row_group(group).num_rows for file, group in self._groups]
        self._ends = list(itertools.accumulate(rows))
        names = self._files[0].schema_arrow.names
        missing = [name for name in self._columns or [] if name not in names]
        if missing:
            raise ValueError(f"{self._paths[0]} has no columns {missing}; its columns are {names}.")

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> Example:
        number = bisect.bisect_right(self._ends, index)
        begin = self._ends[number - 1] if number else 0
        columns = self._read(number)
        return {name: _value(column[index - begin], name, index) for name, column in columns.items()}

    def _read(self, number: int) -> dict[str, Any]:
        """Return the columns of a row group, from the few that were read last where it is among them."""
        with self._lock:
            if number in self._cache:
                self._cache[number] = self._cache.pop(number)  # now the last to be dropped
                return self._cache[number]
            file, group = self._groups[number]
            try:
                table = self._files[file].read_row_group(group, columns=self._columns)
            except (OSError, extras.require("pyarrow").ArrowException) as error:
                raise CorruptExample(f"{self._paths[file]}, row group {group}, cannot be read: {error}") from error
            columns = {name: _to_numpy(table.column(name)) for name in table.column_names}
            while len(self._cache) >= self._kept:
                self._cache.pop(next(iter(self._cache)))
            self._cache[number] = columns
            return columns

    def fingerprint(self) -> str:
        """Return the hash of the schema and of each row group's rows, sizes and column statistics."""
        parts: list[object] = [self._columns]
        for opened in self._files:
            metadata = opened.metadata
            parts.append(opened.schema_arrow)
            parts += [metadata.row_group(group).to_dict() for group in range(metadata.num_row_groups)]
        return fingerprint_text("parquet", *parts)

    def __getstate__(self) -> dict:
        return {"_paths": self._paths, "_columns": self._columns, "_kept": self._kept}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._open()


def _open_parquet(parquet: Any, path: str) -> Any:
    try:
        return parquet.ParquetFile(path)
    except extras.require("pyarrow").ArrowException as error:
        raise CorruptExample(f"{path} is not a whole Parquet file: {error}") from error


def _to_numpy(column: Any) -> Any:
    """Return numbers as an array, anything else as a list of Python values."""
    types = extras.require("pyarrow.types")
    is_number = types.is_integer(column.type) or types.is_floating(column.type) or types.is_boolean(column.type)
    if is_number and not column.null_count:
        return column.to_numpy()
    return column.to_pylist()


def _value(value: Any, name: str, index: int) -> np.ndarray:
    if value is None:
        raise CorruptExample(f"Column {name!r} of row {index} is empty; fill it, or leave the column out of `columns`.")
    return np.frombuffer(value, np.uint8) if isinstance(value, bytes) else np.asarray(value)
