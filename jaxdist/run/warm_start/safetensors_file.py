"""Reads safetensors files, bfloat16 included, without a package: eight bytes of length, a JSON header, the values."""

import dataclasses
import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from jaxdist.errors import UserError

_MOST_HEADER_BYTES = 100_000_000
"""The format's own limit."""
_DTYPES: dict[str, Any] = {
    "BOOL": np.bool_,
    "U8": np.uint8,
    "I8": np.int8,
    "U16": np.uint16,
    "I16": np.int16,
    "U32": np.uint32,
    "I32": np.int32,
    "U64": np.uint64,
    "I64": np.int64,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F32": np.float32,
    "F64": np.float64,
}


@dataclasses.dataclass(frozen=True)
class SafetensorsFile:
    """An open file: the entries of its header, and where the values begin."""

    path: pathlib.Path
    entries: Mapping[str, Mapping[str, Any]]
    start: int

    def read(self, name: str) -> np.ndarray:
        """Return the array of a name.

        Raises:
          UserError: its dtype is one that this module does not read.
        """
        entry = self.entries[name]
        if entry["dtype"] not in _DTYPES:
            raise UserError(
                f"{self.path} holds {name} as {entry['dtype']}; of safetensors, {', '.join(_DTYPES)} are read. Convert "
                "it with the program that wrote the file."
            )
        dtype, shape, (begin, end) = np.dtype(_DTYPES[entry["dtype"]]), tuple(entry["shape"]), entry["data_offsets"]
        if math.prod(shape) * dtype.itemsize != end - begin:
            raise _damaged(self.path, f"{name} has {end - begin} bytes, and shape {shape} of {dtype} needs others")
        with self.path.open("rb") as file:
            file.seek(self.start + begin)
            content = file.read(end - begin)
        if len(content) != end - begin:
            raise _damaged(self.path, f"it ends within {name}")
        return np.frombuffer(content, dtype).reshape(shape)


def open_file(path: pathlib.Path) -> SafetensorsFile:
    """Return an open file, after checking that it is whole.

    Raises:
      UserError: it is no safetensors file, or is damaged.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 2 <= length <= min(_MOST_HEADER_BYTES, size - 8):
            raise _damaged(path, "its header is longer than the file")
        header = file.read(length)
    try:
        content = json.loads(header)
        entries = {name: entry for name, entry in content.items() if name != "__metadata__"}
        end = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
        well_formed = all(
            isinstance(entry["dtype"], str) and 0 <= entry["data_offsets"][0] <= entry["data_offsets"][1]
            for entry in entries.values()
        )
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise _damaged(path, "its header is no description of arrays") from error
    if not well_formed or 8 + length + end != size:
        raise _damaged(path, f"its header describes {8 + length + end:,} bytes, and it has {size:,}")
    _check_apart(path, entries)
    return SafetensorsFile(path, entries, 8 + length)


def _check_apart(path: pathlib.Path, entries: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise UserError where arrays share bytes or leave some out: the format has one after the other."""
    before, at = "its header", 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
        begin, end = entry["data_offsets"]
        if begin != at:
            what = "overlap" if begin < at else "leave bytes out between them"
            raise _damaged(path, f"{before} and {name} {what}")
        before, at = name, end


def _damaged(path: pathlib.Path, why: str) -> UserError:
    return UserError(f"{path} is no whole safetensors file: {why}. Copy or download it again.")
