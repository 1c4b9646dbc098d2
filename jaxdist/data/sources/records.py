"""Record files with random access: TFRecord (by an index built here) and ArrayRecord; and a plain encoding of examples.

A TFRecord file is a chain: length (8 bytes, little-endian), its checksum (4), the data, their checksum (4). Walking the
lengths once gives every record's place. The checksum is CRC-32C, rotated and offset ("masked").
"""

import bisect
import itertools
import json
import mmap
import os
import struct
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxdist import extras
from jaxdist.data.fingerprints import FileList, fingerprint_files
from jaxdist.data.sources.listing import PREPARED, file_beside, find_files
from jaxdist.data.sources.source import CorruptExample, Example, checked_index, fingerprint_text

DecodeFn = Callable[[bytes], Example]


class FilePart(NamedTuple):
    """Some consecutive records of a file."""

    path: str
    skip: int
    take: int


class TfRecords:
    """The records of TFRecord files as bytes, by number. Needs no TensorFlow.

    Raises:
      CorruptExample: a file that ends within a record, or a length that contradicts its checksum, when opened; data
        that contradict theirs, when read. The message names the file and the record's number in it.
    """

    def __init__(self, parts: Sequence[FilePart]):
        self._parts = tuple(parts)
        self._crc32c = extras.require("google_crc32c")
        self._places = [self._index(part) for part in self._parts]
        self._ends = list(itertools.accumulate(len(places) for places in self._places))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> bytes:
        index = checked_index(index, len(self))
        number = bisect.bisect_right(self._ends, index)
        part, within = self._parts[number], index - self._ends[number] + len(self._places[number])
        begin, length = self._places[number][within].tolist()
        with open(part.path, "rb") as file:
            data = os.pread(file.fileno(), length + 4, begin)
        if len(data) != length + 4 or self._masked(data[:-4]) != struct.unpack("<I", data[-4:])[0]:
            raise CorruptExample(f"{part.path}, record {part.skip + within}: the data contradict their checksum.")
        return data[:-4]

    def read(self, ids: Sequence[int] | np.ndarray) -> list[bytes]:
        """Return some records, in the order of their ids."""
        return [self[index] for index in ids]

    def _index(self, part: FilePart) -> np.ndarray:
        """Return the offset and the length of the data of each record, shape (records, 2)."""
        size = os.path.getsize(part.path)
        if size == 0:
            return np.empty((0, 2), np.int64)
        places: list[tuple[int, int]] = []
        offset = 0
        with open(part.path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            while offset < size and len(places) < part.skip + part.take:
                header = data[offset : offset + 12]
                if len(header) < 12:
                    raise CorruptExample(f"{part.path}, record {len(places)}: the file ends within its header.")
                length, checksum = struct.unpack("<QI", header)
                if self._masked(header[:8]) != checksum:
                    raise CorruptExample(f"{part.path}, record {len(places)}: its length contradicts its checksum.")
                if offset + 16 + length > size:
                    raise CorruptExample(f"{part.path}, record {len(places)}: the file ends within its data.")
                places.append((offset + 12, length))
                offset += 16 + length
        if len(places) < part.skip + part.take:
            raise CorruptExample(f"{part.path} has {len(places)} records; {part.skip + part.take} were expected.")
        return np.array(places[part.skip :], np.int64).reshape(-1, 2)

    def _masked(self, data: bytes) -> int:
        crc = self._crc32c.value(data)
        return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF

    def __getstate__(self) -> dict:
        return {"parts": self._parts}

    def __setstate__(self, state: dict) -> None:
        self.__init__(state["parts"])  # type: ignore[misc]


class ArrayRecords:
    """The records of ArrayRecord files as bytes, by number, one or many at a time; files are opened when first read.

    The package's own data source starts threads for each call, which takes longer than reading small records.

    Raises:
      CorruptExample: no such record can be read; the message names it and the file.
    """

    def __init__(self, parts: Sequence[FilePart]):
        self._parts, self._lock = tuple(parts), threading.Lock()
        self._ends = np.cumsum([part.take for part in self._parts])
        self._readers: dict[int, Any] = {}

    @classmethod
    def of_files(cls, paths: Sequence[str]) -> "ArrayRecords":
        """Return all records of files; CorruptExample where one is no whole ArrayRecord file."""
        readers = [_open_array_record(path) for path in paths]
        found = cls([FilePart(path, 0, reader.num_records()) for path, reader in zip(paths, readers)])
        found._readers.update(enumerate(readers))
        return found

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._parts) else 0

    def __getitem__(self, index: int) -> bytes:
        return self.read([index])[0]

    def read(self, ids: Sequence[int] | np.ndarray) -> list[bytes]:
        """Return some records, in the order of their ids."""
        numbers = np.asarray(ids, np.int64)
        files, found = np.searchsorted(self._ends, numbers, side="right"), [b""] * len(numbers)
        for number in dict.fromkeys(files.tolist()):
            places = np.flatnonzero(files == number)
            part = self._parts[number]
            within = numbers[places] - int(self._ends[number]) + part.take + part.skip
            reader = self._reader(number)
            try:
                records = reader.read(within.tolist())
            except (RuntimeError, ValueError, IndexError) as error:
                for index in numbers[places].tolist() if len(places) > 1 else ():
                    self.read([index])  # raises for the one that cannot be read
                raise CorruptExample(f"Record {within[0]} of {part.path} cannot be read: {error}") from error
            for place, record in zip(places.tolist(), records):
                found[place] = record
        return found

    def _reader(self, number: int) -> Any:
        with self._lock:
            if number not in self._readers:
                part, reader = self._parts[number], _open_array_record(self._parts[number].path)
                if reader.num_records() < part.skip + part.take:
                    raise CorruptExample(
                        f"{part.path} has {reader.num_records()} records; {part.skip + part.take} were expected."
                    )
                self._readers[number] = reader
            return self._readers[number]


def _open_array_record(path: str) -> Any:
    module = extras.require("array_record.python.array_record_module")
    try:
        # Each record is a chunk of its own in files that are meant for random access: reading on would not help.
        reader = module.ArrayRecordReader(path, options="readahead_buffer_size:0", file_reader_buffer_size=2**15)
        if not reader.ok():
            reader.close()  # raises the reason
        return reader
    except (RuntimeError, ValueError, IndexError) as error:
        raise CorruptExample(f"Not a whole ArrayRecord file: {path}: {error}") from error


class ArrayRecordSource:
    """The records of ArrayRecord files, each decoded to an example.

    Args:
      paths: a file, several, or a folder of `.array_record` files.
      decode_fn: bytes to example; the default reads what `encode_example` wrote.
    """

    def __init__(
        self,
        paths: str | os.PathLike | Sequence[str | os.PathLike],
        *,
        decode_fn: DecodeFn | None = None,
    ):
        self._paths, self._decode_fn = find_files(paths, "*.array_record*"), decode_fn or decode_example
        self.vocabulary = _prepared_vocabulary(paths)
        self._open()

    def _open(self) -> None:
        self.files = FileList(self._paths)
        self._records = ArrayRecords.of_files(self._paths)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Example:
        index = checked_index(index, len(self))
        return self._decode_fn(self._records[index])

    def fingerprint(self) -> str:
        """Return the hash of the files' sizes and contents (samples of them)."""
        return fingerprint_files("array_record", self.files)

    def __getstate__(self) -> dict:
        return {"_paths": self._paths, "_decode_fn": self._decode_fn, "vocabulary": self.vocabulary}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._open()


def _prepared_vocabulary(paths: str | os.PathLike | Sequence[str | os.PathLike]) -> dict[str, tuple[str, ...]]:
    """Return the names that `prepare` wrote next to files of records; empty where it did not make them."""
    notes = file_beside(paths, PREPARED)
    found = {} if notes is None else json.loads(notes.read_text()).get("vocabulary", {})
    return {field: tuple(names) for field, names in found.items()}


def sample_records(records: Any, num_records: int) -> list[str]:
    """Return the sizes and hashes of up to 16 evenly spread records."""
    ids = np.unique(np.linspace(0, max(num_records - 1, 0), min(num_records, 16), dtype=np.int64)).tolist()
    return [fingerprint_text("record", records[index].hex()) for index in ids]


def encode_example(example: Mapping[str, np.ndarray]) -> bytes:
    """Return the example as bytes: a line of JSON with names, dtypes and shapes, then the arrays' bytes in C order."""
    arrays = {name: np.asarray(value) for name, value in example.items()}
    header = [[name, array.dtype.str, list(array.shape)] for name, array in arrays.items()]
    return json.dumps(header).encode() + b"\n" + b"".join(array.tobytes() for array in arrays.values())


def decode_example(data: bytes) -> dict[str, np.ndarray]:
    """Return the example that `encode_example` wrote; its arrays are read-only views of `data`."""
    line, _, body = data.partition(b"\n")
    try:
        header = json.loads(line)
    except ValueError as error:
        raise CorruptExample(f"Not an encoded example: it begins with {data[:20]!r}. Give a decode_fn.") from error
    arrays, offset = {}, 0
    for name, dtype, shape in header:
        array = np.frombuffer(body, dtype, int(np.prod(shape)), offset).reshape(shape)
        arrays[name], offset = array, offset + array.nbytes
    return arrays
