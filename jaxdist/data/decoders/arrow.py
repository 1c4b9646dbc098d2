"""Arrow arrays as numpy arrays, without a copy and without pandas.

`to_numpy`, `fill_null` and `scalar` of pyarrow import pandas where that is installed: a third of a second and 50 MB in
every process.
"""

from typing import Any

import numpy as np

from jaxdist import extras


def as_numpy(column: Any, *, fill: float | None = None) -> np.ndarray:
    """Return a column of numbers or booleans; read-only where it shares Arrow's memory.

    `fill` stands for nulls, of which there are none where it is None.
    """
    chunks = getattr(column, "chunks", None)
    if chunks is None:
        return _of_chunk(column, fill)
    parts = [_of_chunk(chunk, fill) for chunk in chunks if len(chunk)]
    if not parts:
        return np.empty(0, _dtype_of(column.type))
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _of_chunk(array: Any, fill: float | None) -> np.ndarray:
    if array.null_count:
        assert fill is not None, "nulls have no number"
        values = _values_of(array).copy()
        values[_values_of(array.is_null())] = fill
        return values
    return _values_of(array)


def _values_of(array: Any) -> np.ndarray:
    """Return the values; those of nulls are anything."""
    if extras.require("pyarrow.types").is_boolean(array.type):
        return _values_of(array.cast("uint8")).view(bool)
    data = array.buffers()[1]
    dtype = _dtype_of(array.type)
    if data is None:
        return np.empty(0, dtype)
    return np.frombuffer(data, dtype, len(array), array.offset * dtype.itemsize)


def _dtype_of(kind: Any) -> np.dtype:
    return np.dtype(kind.to_pandas_dtype())
