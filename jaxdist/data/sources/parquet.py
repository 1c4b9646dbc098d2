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
from jaxdist.data.decoders.columns import Column, JoinedColumns, is_numeric, num_bytes_of, stacked
from jaxdist.data.decoders.kinds import check_kind
from jaxdist.data.fingerprints import FileList, fingerprint_files
from jaxdist.data.sources.listing import find_files
from jaxdist.data.sources.source import CorruptExample, Example, checked_ids, checked_index, fingerprint_text
from jaxdist.data.sources.tables import TableSettings
from jaxdist.data.sources.vocabulary import listed

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
        self._columns = None if columns is None else listed(columns, what="`columns`")
        if not isinstance(categories or {}, Mapping):
            raise ValueError(
                f"`categories` gives each column's texts, as in {{'colour': ('green', 'red')}}; got {categories!r}."
            )
        self.vocabulary = {
            name: listed(texts, what=f"The texts of {name!r}") for name, texts in (categories or {}).items()
        }
        self._paths, self._missing, self._cache_bytes = find_files(paths, "*.parquet"), missing, cache_bytes
        self._open()

    def _open(self) -> None:
        self.files = FileList(self._paths)
        self._lock, self._cache = threading.Lock(), collections.OrderedDict[int, dict[str, Column]]()
        self._fingerprint: str | None = None
        self._files = [open_parquet(path) for path in self._paths]
        self._groups = [
            (file, group) for file, opened in enumerate(self._files) for group in range(opened.num_row_groups)
        ]
        rows = [self._files[file].metadata.row_group(group).num_rows for file, group in self._groups]
        self._sizes, self._ends = tuple(rows), list(itertools.accumulate(rows))
        self._kept = self._check_schemas()
        self.table = TableSettings(tuple(self._kept), self._missing)
        self._joined = JoinedColumns(self._ends) if self._expected_bytes() <= self._cache_bytes else None

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
        if self._joined is not None and self._joined.is_whole:
            return {name: array.take(ids, axis=0) for name, array in self._joined.arrays.items()}
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
        return {name: stacked(name, parts).take(back, axis=0) for name, parts in found.items()}

    def _read(self, number: int) -> dict[str, "Column"]:
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
            num_rows = self._files[file].metadata.row_group(group).num_rows
            if table.num_rows != num_rows:  # pyarrow takes a damaged head of a page for the end
                raise CorruptExample(
                    f"{self._paths[file]}, row group {group}, is damaged: {table.num_rows} of its {num_rows} rows can "
                    "be read. Copy it or write it again."
                )
            path = self._paths[file]
            columns = {
                name: Column(path, name, table.column(name), self.vocabulary.get(name), self._missing)
                for name in self._kept
            }
            if self._joined is not None and not self._joined.add(number, columns):
                self._joined = None
            self._cache[number] = columns
            while len(self._cache) > 1 and sum(map(num_bytes_of, self._cache.values())) > self._cache_bytes:
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


def open_parquet(path: str) -> Any:
    """Return pyarrow's object of a Parquet file; CorruptExample where it is none, or not whole."""
    try:
        return extras.require("pyarrow.parquet").ParquetFile(path, page_checksum_verification=True)
    except extras.require("pyarrow").ArrowException as error:
        with open(path, "rb") as file:
            head = file.read(16).removeprefix(b"PAR1")
        check_kind(path, head, wanted="a Parquet file", do="Write it as Parquet, with pandas for example.")
        raise CorruptExample(f"{path} is not a whole Parquet file: {error}") from error


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
    if not (is_numeric(kind) or is_bytes or (is_list and is_numeric(kind.value_type))):
        raise ValueError(
            f"{column} is {kind}, which is not a number. Leave it out of `columns`"
            + (", or give its texts in `categories`." if is_text else ", or write it as numbers.")
        )
