"""Columns of tables as numpy arrays: numbers, lists of numbers, bytes, and which rows have no value."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxdist import extras
from jaxdist.data.decoders.arrow import as_numpy
from jaxdist.data.sources.source import CorruptExample
from jaxdist.data.sources.tables import numbered


class Column:
    """A column of a row group as numpy arrays: values, where each row of lists or bytes begins, which rows are null."""

    def __init__(self, path: str, name: str, column: Any, names: Sequence[str] | None, missing: float | None):
        pyarrow, types = extras.require("pyarrow"), extras.require("pyarrow.types")
        column = column.combine_chunks()
        if isinstance(column, pyarrow.ChunkedArray):  # without any rows
            column = pyarrow.concat_arrays(column.chunks) if column.num_chunks else pyarrow.array([], column.type)
        if types.is_dictionary(column.type):
            column = column.dictionary_decode()
        self._null = as_numpy(column.is_null()) if column.null_count else None
        self._path, self._missing = path, missing
        self._ends: np.ndarray | None = None
        self.values: np.ndarray
        if names is not None:
            self.values, self._null = numbered(f"{path}: column {name!r}", column, names)[1], None
            return
        if types.is_fixed_size_list(column.type) or types.is_list(column.type) or types.is_large_list(column.type):
            column, self._ends = _elements(column)
            self._null = _rows_with_nulls(column, self._ends, self._null)
        elif not is_numeric(column.type):
            column = column.cast(pyarrow.large_binary())
            ends, data = column.buffers()[1:]
            self._ends = np.frombuffer(ends, np.int64)[column.offset : column.offset + len(column) + 1]
            self.values = np.frombuffer(data, np.uint8) if data is not None else np.empty(0, np.uint8)
            return
        if types.is_decimal(column.type):
            # By way of its text, the nearest float: pyarrow's own cast multiplies by 10**-scale, which is none.
            column = column.cast(pyarrow.string()).cast(pyarrow.float64())
        self.values = as_numpy(column, fill=0)
        if self._ends is not None and self._null is None and len(self._ends) > 1:
            lengths = np.diff(self._ends)
            if lengths.min() == lengths.max():  # lists of one length are the rows of a matrix
                begin, end = int(self._ends[0]), int(self._ends[-1])
                self.values, self._ends = self.values[begin:end].reshape(len(lengths), -1), None

    @property
    def is_plain(self) -> bool:
        """Whether each row is a row of `values`."""
        return self._null is None and self._ends is None

    @property
    def num_bytes(self) -> int:
        """The memory that the column takes."""
        return self.values.nbytes + (0 if self._ends is None else self._ends.nbytes)

    def rows(self, rows: np.ndarray, name: str, ids: np.ndarray) -> np.ndarray:
        """Return the values of some rows, stacked; `ids` are their numbers in the source."""
        if self.is_plain:
            return self.values.take(rows, axis=0)
        null = np.empty(0, np.int64) if self._null is None else np.flatnonzero(self._null[rows])
        if len(null) and (self._missing is None or self._ends is not None):
            self.row(int(rows[null[0]]), name, int(ids[null[0]]))  # which raises
        if self._ends is None:
            values = self.values[rows]
            if len(null):
                assert self._missing is not None
                values[null] = _missing_as(values.dtype, self._missing, name)
            return values
        begins, lengths = self._ends[rows], self._ends[rows + 1] - self._ends[rows]
        if lengths.min() != lengths.max():
            raise ValueError(_LENGTHS_DIFFER.format(name, sorted({(length,) for length in lengths.tolist()})[:3]))
        return self.values[begins[:, None] + np.arange(lengths[0])]

    def row(self, row: int, name: str, index: int) -> np.ndarray | np.generic:
        """Return the value of a row; CorruptExample where it has none."""
        if self._null is not None and self._null[row]:
            if self._missing is None or self._ends is not None:
                what = "has no value" if self._ends is None else "has no value, or an element without one"
                hint = "Say what stands for it with `missing`, or leave" if self._ends is None else "Leave"
                raise CorruptExample(
                    f"{self._path}: column {name!r} of row {index} {what}. {hint} the column out of `columns`."
                )
            return _missing_as(self.values.dtype, self._missing, name)
        if self._ends is None:
            return self.values[row]
        return self.values[self._ends[row] : self._ends[row + 1]]


class JoinedColumns:
    """The columns of all row groups as one array each, filled as groups are read; a batch is one gather of each."""

    def __init__(self, ends: Sequence[int]):
        self.arrays: dict[str, np.ndarray] = {}
        self.is_whole = False
        self._ends, self._missing = ends, set(range(len(ends)))

    def add(self, number: int, columns: Mapping[str, Column]) -> bool:
        """Move a row group's values here, and return True; False where they do not all have one shape."""
        begin, end = self._ends[number - 1] if number else 0, self._ends[number]
        if not all(column.is_plain for column in columns.values()):
            return False
        for name, column in columns.items():
            if name not in self.arrays:
                self.arrays[name] = np.empty((self._ends[-1], *column.values.shape[1:]), column.values.dtype)
            if column.values.shape[1:] != self.arrays[name].shape[1:]:
                return False
            self.arrays[name][begin:end] = column.values
            column.values = self.arrays[name][begin:end]
            column.values.flags.writeable = False
        self._missing.discard(number)
        self.is_whole = not self._missing
        return True


def _elements(column: Any) -> tuple[Any, np.ndarray]:
    """Return the elements of all lists of a column, and where each list begins, and the last ends."""
    if extras.require("pyarrow.types").is_fixed_size_list(column.type):
        lengths = column.type.list_size * as_numpy(column.is_valid()).astype(np.int64)
        return column.flatten(), np.concatenate([[0], np.cumsum(lengths)])  # a null has elements, which are left out
    return column.values, as_numpy(column.offsets).astype(np.int64, copy=False)


def stacked(name: str, parts: Sequence[np.ndarray]) -> np.ndarray:
    """Return the parts of a batch as one array; ValueError where they differ in shape."""
    shapes = {part.shape[1:] for part in parts}
    if len(shapes) > 1:
        raise ValueError(_LENGTHS_DIFFER.format(name, sorted(shapes)[:3]))
    return np.concatenate(parts)


_LENGTHS_DIFFER = (
    "Examples of a batch must have the same fields, shapes and dtypes; column {!r} has lists of the shapes {}. Pad, "
    "crop or bucket them, for example in `example_fn`."
)


def num_bytes_of(columns: Mapping[str, Column]) -> int:
    """Return the memory that some columns take."""
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
    counts = np.concatenate([[0], np.cumsum(as_numpy(elements.is_null()))])
    found = counts[ends[1:]] > counts[ends[:-1]]
    found = found if null is None else found | null
    return found if found.any() else None


def is_numeric(kind: Any) -> bool:
    """Return whether the values of an Arrow type are numbers."""
    types = extras.require("pyarrow.types")
    return types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind) or types.is_decimal(kind)
