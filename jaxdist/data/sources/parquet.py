"""Parquet files, read by row group: a row is an example, a column a field of the dtype that the schema declares."""

import bisect
import collections
import itertools
import os
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxdist import extras
from jaxdist.data.fingerprints import FileList, fingerprint_files
from jaxdist.data.sources.listing import find_files
from jaxdist.data.sources.source import CorruptExample, Example, checked_index
from jaxdist.data.sources.tables import numbered


class ParquetSource:
    """The rows of Parquet files, which all have one schema.

    Numbers and booleans keep their dtype, decimals become float64, bytes uint8 (for `example_fn`), lists of numbers
    arrays of their elements' dtype. Texts are numbered where `categories` names them. Dates, times, structs and other
    texts are refused: leave them out of `columns`.

    Args:
      paths: a file, several, or a folder of `.parquet` files.
      columns: the columns to keep; None keeps all. Columns in `categories` are kept in any case.
      categories: columns of texts that become int32 numbers, each with its texts by number, as in {"colour": ("green",
        "red")}.
      missing: what a missing number becomes, in the column's dtype; None refuses the row when it is read.
      cache_bytes: read row groups that are kept. Where all fit, each is read once.
    """

    def __init__(
        self,
        paths: str | os.PathLike | Sequence[str | os.PathLike],
        *,
        columns: Sequence[str] | None = None,
        categories: Mapping[str, Sequence[str]] | None = None,
        missing: float | None = None,
        cache_bytes: int = 2**30,
    ):
        self._paths, self._columns, self._missing = find_files(paths, "*.parquet"), columns, missing
        self._cache_bytes = cache_bytes
        self.vocabulary = {name: tuple(texts) for name, texts in (categories or {}).items()}
        self._open()

    def _open(self) -> None:
        self.files = FileList(self._paths)
        self._lock, self._cache = threading.Lock(), collections.OrderedDict[int, dict[str, _Column]]()
        self._fingerprint: str | None = None
        self._files = [_open_parquet(path) for path in self._paths]
        self._groups = [
            (file, group) for file, opened in enumerate(self._files) for group in range(opened.num_row_groups)
        ]
        rows = [self._files[file].metadata.row_group(group).num_rows for file, group in self._groups]
        self._ends = list(itertools.accumulate(rows))
        self._kept = self._check_schemas()

    def _check_schemas(self) -> list[str]:
        """Return the columns to read; ValueError where one is missing, no number, or of two types in two files."""
        first = self._files[0].schema_arrow
        unknown = [name for name in [*(self._columns or ()), *self.vocabulary] if name not in first.names]
        if unknown:
            raise ValueError(f"{self._paths[0]} has no columns {unknown}; its columns are {first.names}.")
        kept = [n for n in first.names if self._columns is None or n in self._columns or n in self.vocabulary]
        for path, opened in zip(self._paths, self._files):
            for name in kept:
                found = opened.schema_arrow.field(name).type if name in opened.schema_arrow.names else "missing"
                if found != first.field(name).type:
                    raise ValueError(
                        f"Files of one data set have one schema: column {name!r} is {found} in {path}, and "
                        f"{first.field(name).type} in {self._paths[0]}. Write the files again with one type."
                    )
            added = [name for name in opened.schema_arrow.names if name not in first.names]
            if self._columns is None and added:
                raise ValueError(f"{path} has the columns {added}, which {self._paths[0]} lacks. Name `columns`.")
        for name in kept:
            _check_type(name, first.field(name).type, name in self.vocabulary)
        return kept

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> Example:
        index = checked_index(index, len(self))
        number = bisect.bisect_right(self._ends, index)
        row = index - (self._ends[number - 1] if number else 0)
        return {name: column.row(row, name, index) for name, column in self._read(number).items()}

    def _read(self, number: int) -> dict[str, "_Column"]:
        """Return the columns of a row group, from the cache of those that were read last if it is there."""
        with self._lock:
            if number in self._cache:
                self._cache.move_to_end(number)
                return self._cache[number]
            file, group = self._groups[number]
            try:
                table = self._files[file].read_row_group(group, columns=self._kept)
            except (OSError, extras.require("pyarrow").ArrowException) as error:
                raise CorruptExample(f"{self._paths[file]}, row group {group}, cannot be read: {error}") from error
            columns = {
                name: _Column(name, table.column(name), self.vocabulary.get(name), self._missing) for name in self._kept
            }
            self._cache[number] = columns
            while len(self._cache) > 1 and sum(map(_num_bytes, self._cache.values())) > self._cache_bytes:
                self._cache.popitem(last=False)
            return columns

    def fingerprint(self) -> str:
        """Return the hash of the settings, and of the files' sizes and contents (samples of them)."""
        if self._fingerprint is None:
            settings = (self._kept, self._missing, sorted(self.vocabulary.items()))
            self._fingerprint = fingerprint_files("parquet", self.files, *settings)
        return self._fingerprint

    def __getstate__(self) -> dict:
        names = ("_paths", "_columns", "_missing", "_cache_bytes", "vocabulary")
        return {name: getattr(self, name) for name in names}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._open()


class _Column:
    """A column of a row group as numpy arrays: values, where each row of lists or bytes begins, which rows are null."""

    def __init__(self, name: str, column: Any, names: Sequence[str] | None, missing: float | None):
        pyarrow, types = extras.require("pyarrow"), extras.require("pyarrow.types")
        column = column.combine_chunks()
        if isinstance(column, pyarrow.ChunkedArray):  # without any rows
            column = pyarrow.concat_arrays(column.chunks) if column.num_chunks else pyarrow.array([], column.type)
        if types.is_dictionary(column.type):
            column = column.dictionary_decode()
        self._null = column.is_null().to_numpy(zero_copy_only=False) if column.null_count else None
        self._missing, self._ends = missing, None
        if names is not None:
            column, self._null = pyarrow.array(numbered(name, column, names)[1]), None
        if types.is_fixed_size_list(column.type) or types.is_list(column.type) or types.is_large_list(column.type):
            column = column.cast(pyarrow.large_list(column.type.value_type))
            self._ends = column.offsets.to_numpy()
            column = column.values
            if column.null_count:
                raise CorruptExample(f"Lists of column {name!r} have {column.null_count} elements without a value.")
        elif not _is_numeric(column.type):
            column = column.cast(pyarrow.large_binary())
            ends, data = column.buffers()[1:]
            self._ends = np.frombuffer(ends, np.int64)[column.offset : column.offset + len(column) + 1]
            self._values = np.frombuffer(data, np.uint8) if data is not None else np.empty(0, np.uint8)
            return
        if types.is_decimal(column.type):
            column = column.cast(pyarrow.float64())
        if column.null_count:
            column = column.fill_null(0)
        self._values = column.to_numpy(zero_copy_only=False)

    @property
    def num_bytes(self) -> int:
        """The memory that the column takes."""
        return self._values.nbytes + (0 if self._ends is None else self._ends.nbytes)

    def row(self, row: int, name: str, index: int) -> np.ndarray | np.generic:
        """Return the value of a row; CorruptExample where it has none."""
        if self._null is not None and self._null[row]:
            if self._missing is None or self._ends is not None:
                raise CorruptExample(
                    f"Column {name!r} of row {index} has no value. Say what stands for it with `missing`, or leave the "
                    "column out of `columns`."
                )
            return _missing_as(self._values.dtype, self._missing, name)
        if self._ends is None:
            return self._values[row]
        return self._values[self._ends[row] : self._ends[row + 1]]


def _num_bytes(columns: Mapping[str, _Column]) -> int:
    return sum(column.num_bytes for column in columns.values())


def _missing_as(dtype: np.dtype, missing: float, name: str) -> np.generic:
    if dtype.kind in "iub" and missing != int(np.nan_to_num(missing)):
        raise ValueError(f"Column {name!r} is {dtype}, which cannot hold missing={missing}. Choose a whole number.")
    return dtype.type(missing)


def _open_parquet(path: str) -> Any:
    try:
        return extras.require("pyarrow.parquet").ParquetFile(path)
    except extras.require("pyarrow").ArrowException as error:
        raise CorruptExample(f"{path} is not a whole Parquet file: {error}") from error


def _is_numeric(kind: Any) -> bool:
    types = extras.require("pyarrow.types")
    return types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind) or types.is_decimal(kind)


def _check_type(name: str, kind: Any, is_category: bool) -> None:
    """Raise ValueError where a column cannot become numbers."""
    types = extras.require("pyarrow.types")
    if types.is_dictionary(kind):
        kind = kind.value_type
    is_text = types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)
    is_bytes = types.is_binary(kind) or types.is_large_binary(kind) or types.is_fixed_size_binary(kind)
    is_list = types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
    if is_category and is_text:
        return
    if is_category:
        raise ValueError(f"Column {name!r} is {kind}; only columns of texts are numbered by `categories`.")
    if not (_is_numeric(kind) or is_bytes or (is_list and _is_numeric(kind.value_type))):
        raise ValueError(
            f"Column {name!r} is {kind}, which is not a number. Leave it out of `columns`"
            + (", or give its texts in `categories`." if is_text else ", or write it as numbers.")
        )
