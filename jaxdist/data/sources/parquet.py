"""Parquet files, read by row group: a row is an example, a column a field of the dtype that the schema declares."""

import bisect
import collections
import dataclasses
import functools
import itertools
import logging
import os
import re
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxdist import extras
from jaxdist.data import order
from jaxdist.data.fingerprints import FileList, fingerprint_files
from jaxdist.data.sources.listing import find_files
from jaxdist.data.sources.source import CorruptExample, Example, checked_ids, checked_index, fingerprint_text
from jaxdist.data.sources.tables import numbered

_logger = logging.getLogger(__name__)

_SHARE_OF_CACHE = 0.8
"""How much of the cache the row groups that are read together may take: those of the next turn need room, too."""

_INDEX = re.compile(r"__index_level_\d+__")
"""What pandas calls the numbers of rows where it writes them as a column."""

_WIDTHS = {"BOOLEAN": 1, "INT32": 4, "INT64": 8, "FLOAT": 4, "DOUBLE": 8}
"""Bytes of a number of each physical type of Parquet; dictionaries take less in the file."""


class ParquetSource:
    """The rows of Parquet files, which all have one schema.

    A row group is read as a whole. Where all of them fit into `cache_bytes`, examples come in the order of
    `data.Shuffled`; where they do not, in that of `GroupShuffled`, which `order()` returns and the log names.

    Numbers and booleans keep their dtype, decimals become float64, bytes uint8 (for `example_fn`), lists of numbers
    arrays of their elements' dtype. Texts are numbered where `categories` names them. Dates, times, structs and other
    texts are refused: leave them out of `columns`.

    Args:
      paths: a file, several, or a folder of `.parquet` files.
      columns: the columns to keep; None keeps all but an index of pandas. Columns in `categories` are kept in any case.
      categories: columns of texts that become int32 numbers, each with its texts by number, as in {"colour": ("green",
        "red")}.
      missing: what a missing number becomes, in the column's dtype; None refuses the row when it is read.
      cache_bytes: the row groups that were read last and are kept. Where all fit, each is read once.
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
        self._sizes, self._ends = tuple(rows), list(itertools.accumulate(rows))
        self._kept = self._check_schemas()

    def _check_schemas(self) -> list[str]:
        """Return the columns to read; ValueError where one is missing, no number, or of two types in two files."""
        first = self._files[0].schema_arrow
        twice = sorted({name for name in first.names if first.names.count(name) > 1})
        if twice:
            raise ValueError(f"{self._paths[0]} has several columns named {twice}. Write it with a name for each.")
        unknown = [name for name in [*(self._columns or ()), *self.vocabulary] if name not in first.names]
        if unknown:
            raise ValueError(f"{self._paths[0]} has no columns {unknown}; its columns are {first.names}.")
        own = [name for name in first.names if not _INDEX.fullmatch(name)] if self._columns is None else self._columns
        kept = [name for name in first.names if name in own or name in self.vocabulary]
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
            _check_type(f"{self._paths[0]}: column {name!r}", first.field(name).type, name in self.vocabulary)
        return kept

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> Example:
        index = checked_index(index, len(self))
        number = bisect.bisect_right(self._ends, index)
        row = index - (self._ends[number - 1] if number else 0)
        return {name: column.row(row, name, index) for name, column in self._read(number).items()}

    def __getitems__(self, ids: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
        """Return the rows `ids`, each column stacked; ValueError where lists of a batch differ in length."""
        ids = checked_ids(ids, len(self))
        if not len(ids):
            return {name: array[:0] for name, array in self.__getitems__([0]).items()}
        places = np.argsort(ids, kind="stable")
        ascending, found = ids[places], {name: list[np.ndarray]() for name in self._kept}
        begin = 0
        while begin < len(ids):
            number = bisect.bisect_right(self._ends, int(ascending[begin]))
            end = int(np.searchsorted(ascending, self._ends[number]))
            mine = ascending[begin:end]
            rows = mine - (self._ends[number - 1] if number else 0)
            for name, column in self._read(number).items():
                found[name].append(column.rows(rows, name, mine))
            begin = end
        back = np.empty(len(ids), np.int64)
        back[places] = np.arange(len(ids))
        return {name: _stacked(name, parts).take(back, axis=0) for name, parts in found.items()}

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
            path = self._paths[file]
            columns = {
                name: _Column(path, name, table.column(name), self.vocabulary.get(name), self._missing)
                for name in self._kept
            }
            self._cache[number] = columns
            while len(self._cache) > 1 and sum(map(_num_bytes, self._cache.values())) > self._cache_bytes:
                self._cache.popitem(last=False)
            return columns

    def order(self, *, shuffle: bool = True) -> order.Order:
        """Return the order that reads each row group about once an epoch, also where not all fit into the cache."""
        if not shuffle:
            return order.Sequential()
        num_bytes = self._expected_bytes()
        if num_bytes <= self._cache_bytes or len(self._groups) == 1:
            return order.Shuffled()
        together = max(int(_SHARE_OF_CACHE * self._cache_bytes * len(self._groups) / num_bytes), 1)
        _logger.warning(
            "The %d row groups of %s take about %.1f GB, more than cache_bytes (%.1f GB). They are read %d at a time, "
            "in an order of their own, and rows are shuffled among those (GroupShuffled). Raise cache_bytes, or write "
            "smaller row groups, to shuffle more rows together.",
            len(self._groups),
            self._paths[0],
            num_bytes / 1e9,
            self._cache_bytes / 1e9,
            together,
        )
        return GroupShuffled(self._sizes, together)

    def _expected_bytes(self) -> int:
        """Return about how many bytes all rows take once they are read, from the files' metadata."""
        total = 0
        for file, group in self._groups:
            metadata = self._files[file].metadata.row_group(group)
            for number in range(metadata.num_columns):
                column = metadata.column(number)
                if column.path_in_schema.split(".")[0] in self._kept:
                    least = metadata.num_rows * _WIDTHS.get(column.physical_type, 0)
                    total += max(column.total_uncompressed_size, least)
        return total

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


@dataclasses.dataclass(frozen=True)
class GroupShuffled(order.Contiguous):
    """Row groups of the given sizes in a shuffled order, `together` at a time, and all rows of these shuffled.

    A run of positions touches `together` groups, so a source that keeps these in memory reads each once an epoch.
    """

    sizes: tuple[int, ...]
    together: int

    @property
    def version(self) -> str:
        """See Order."""
        return f"groups-{order.ORDER_VERSION}:{fingerprint_text('sizes', *self.sizes)} {self.together}"

    def __call__(self, num_examples: int, seed: int, epoch: int, start: int, stop: int) -> np.ndarray:
        """Return the ids at positions [start, stop) of the epoch, int64."""
        order.check_range(num_examples, epoch, start, stop)
        if num_examples != sum(self.sizes):
            raise ValueError(f"These row groups have {sum(self.sizes)} rows; got num_examples={num_examples}.")
        groups, begins = _places_of_groups(self.sizes, seed, epoch)
        firsts = begins[:: self.together]
        parts = [np.empty(0, np.int64)]
        while start < stop:
            turn = int(np.searchsorted(firsts, start, side="right")) - 1
            mine = groups[turn * self.together : (turn + 1) * self.together]
            begin, ends = int(firsts[turn]), np.cumsum([self.sizes[group] for group in mine])
            end = min(stop, begin + int(ends[-1]))
            inside = order.Permutation.make(int(ends[-1]), "in groups", seed, epoch, turn)
            rows = inside(np.arange(start, end, dtype=np.int64) - begin)
            place = np.searchsorted(ends, rows, side="right")
            first_ids = _starts_of(self.sizes)[mine]
            parts.append(first_ids[place] + rows - np.concatenate([[0], ends])[place])
            start = end
        return np.concatenate(parts)


@functools.lru_cache(maxsize=8)
def _places_of_groups(sizes: tuple[int, ...], seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the row groups that have rows in their order, and the position at which each begins."""
    groups = order.Permutation.make(len(sizes), "groups", seed, epoch)(np.arange(len(sizes)))
    groups = groups[np.array(sizes)[groups] > 0]
    counts = np.array(sizes)[groups]
    return groups, np.cumsum(counts) - counts


@functools.lru_cache(maxsize=8)
def _starts_of(sizes: tuple[int, ...]) -> np.ndarray:
    return np.cumsum([0, *sizes])


class _Column:
    """A column of a row group as numpy arrays: values, where each row of lists or bytes begins, which rows are null."""

    def __init__(self, path: str, name: str, column: Any, names: Sequence[str] | None, missing: float | None):
        pyarrow, types = extras.require("pyarrow"), extras.require("pyarrow.types")
        column = column.combine_chunks()
        if isinstance(column, pyarrow.ChunkedArray):  # without any rows
            column = pyarrow.concat_arrays(column.chunks) if column.num_chunks else pyarrow.array([], column.type)
        if types.is_dictionary(column.type):
            column = column.dictionary_decode()
        self._null = column.is_null().to_numpy(zero_copy_only=False) if column.null_count else None
        self._path, self._missing, self._ends = path, missing, None
        if names is not None:
            column, self._null = pyarrow.array(numbered(f"{path}: column {name!r}", column, names)[1]), None
        if types.is_fixed_size_list(column.type) or types.is_list(column.type) or types.is_large_list(column.type):
            column = column.cast(pyarrow.large_list(column.type.value_type))
            self._ends = column.offsets.to_numpy()
            column = column.values
            self._null = _rows_with_nulls(column, self._ends, self._null)
        elif not _is_numeric(column.type):
            column = column.cast(pyarrow.large_binary())
            ends, data = column.buffers()[1:]
            self._ends = np.frombuffer(ends, np.int64)[column.offset : column.offset + len(column) + 1]
            self._values: np.ndarray = np.frombuffer(data, np.uint8) if data is not None else np.empty(0, np.uint8)
            return
        if types.is_decimal(column.type):
            column = column.cast(pyarrow.float64())
        if column.null_count:
            column = column.fill_null(False if types.is_boolean(column.type) else 0)
        self._values = column.to_numpy(zero_copy_only=False)
        if self._ends is not None and self._null is None and len(self._ends) > 1:
            lengths = np.diff(self._ends)
            if lengths.min() == lengths.max():  # lists of one length are the rows of a matrix
                begin, end = int(self._ends[0]), int(self._ends[-1])
                self._values, self._ends = self._values[begin:end].reshape(len(lengths), -1), None

    @property
    def num_bytes(self) -> int:
        """The memory that the column takes."""
        return self._values.nbytes + (0 if self._ends is None else self._ends.nbytes)

    def rows(self, rows: np.ndarray, name: str, ids: np.ndarray) -> np.ndarray:
        """Return the values of some rows, stacked; `ids` are their numbers in the source."""
        if self._null is None and self._ends is None:
            return self._values.take(rows, axis=0)
        null = np.empty(0, np.int64) if self._null is None else np.flatnonzero(self._null[rows])
        if len(null) and (self._missing is None or self._ends is not None):
            self.row(int(rows[null[0]]), name, int(ids[null[0]]))  # which raises
        if self._ends is None:
            values = self._values[rows]
            if len(null):
                assert self._missing is not None
                values[null] = _missing_as(values.dtype, self._missing, name)
            return values
        begins, lengths = self._ends[rows], self._ends[rows + 1] - self._ends[rows]
        if lengths.min() != lengths.max():
            raise ValueError(_LENGTHS_DIFFER.format(name, sorted({(length,) for length in lengths.tolist()})[:3]))
        return self._values[begins[:, None] + np.arange(lengths[0])]

    def row(self, row: int, name: str, index: int) -> np.ndarray | np.generic:
        """Return the value of a row; CorruptExample where it has none."""
        if self._null is not None and self._null[row]:
            if self._missing is None or self._ends is not None:
                what = "has no value" if self._ends is None else "has no value, or an element without one"
                hint = "Say what stands for it with `missing`, or leave" if self._ends is None else "Leave"
                raise CorruptExample(
                    f"{self._path}: column {name!r} of row {index} {what}. {hint} the column out of `columns`."
                )
            return _missing_as(self._values.dtype, self._missing, name)
        if self._ends is None:
            return self._values[row]
        return self._values[self._ends[row] : self._ends[row + 1]]


def _stacked(name: str, parts: Sequence[np.ndarray]) -> np.ndarray:
    shapes = {part.shape[1:] for part in parts}
    if len(shapes) > 1:
        raise ValueError(_LENGTHS_DIFFER.format(name, sorted(shapes)[:3]))
    return np.concatenate(parts)


_LENGTHS_DIFFER = (
    "Examples of a batch must have the same fields, shapes and dtypes; column {!r} has lists of the shapes {}. Pad, "
    "crop or bucket them, for example in `example_fn`."
)


def _num_bytes(columns: Mapping[str, _Column]) -> int:
    return sum(column.num_bytes for column in columns.values())


def _missing_as(dtype: np.dtype, missing: float, name: str) -> np.generic:
    if dtype.kind in "iub":
        limits = (0, 1) if dtype.kind == "b" else (np.iinfo(dtype).min, np.iinfo(dtype).max)
        fits = bool(np.isfinite(missing)) and missing == int(missing) and limits[0] <= missing <= limits[1]
        hint = f"Choose a whole number from {limits[0]} to {limits[1]}."
    else:
        fits = not np.isfinite(missing) or abs(missing) <= float(np.finfo(dtype).max)
        hint = f"Choose a number up to {np.finfo(dtype).max:.3g}."
    if not fits:
        raise ValueError(f"Column {name!r} is {dtype}, which cannot hold missing={missing}. {hint}")
    return dtype.type(missing)


def _rows_with_nulls(elements: Any, ends: np.ndarray, null: np.ndarray | None) -> np.ndarray | None:
    """Return which lists have no value, or an element without one; None where none of them."""
    if not elements.null_count:
        return null
    counts = np.concatenate([[0], np.cumsum(elements.is_null().to_numpy(zero_copy_only=False))])
    found = counts[ends[1:]] > counts[ends[:-1]]
    found = found if null is None else found | null
    return found if found.any() else None


def _open_parquet(path: str) -> Any:
    try:
        return extras.require("pyarrow.parquet").ParquetFile(path)
    except extras.require("pyarrow").ArrowException as error:
        raise CorruptExample(f"{path} is not a whole Parquet file: {error}") from error


def _is_numeric(kind: Any) -> bool:
    types = extras.require("pyarrow.types")
    return types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind) or types.is_decimal(kind)


def _check_type(column: str, kind: Any, is_category: bool) -> None:
    """Raise ValueError, beginning with `column`, where a column cannot become numbers."""
    types = extras.require("pyarrow.types")
    if types.is_dictionary(kind):
        kind = kind.value_type
    is_text = types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)
    is_bytes = types.is_binary(kind) or types.is_large_binary(kind) or types.is_fixed_size_binary(kind)
    is_list = types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
    if is_category and is_text:
        return
    if is_category:
        raise ValueError(f"{column} is {kind}; only columns of texts are numbered by `categories`.")
    if not (_is_numeric(kind) or is_bytes or (is_list and _is_numeric(kind.value_type))):
        raise ValueError(
            f"{column} is {kind}, which is not a number. Leave it out of `columns`"
            + (", or give its texts in `categories`." if is_text else ", or write it as numbers.")
        )
