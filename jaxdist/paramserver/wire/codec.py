"""The encoding of values by their annotated types: numbers and names go into a head, array data beside it.

The annotations of the dataclasses drive it, so the fields of a message are declared once. Nothing is unpickled: the
reader knows the expected types, and refuses bytes that do not match them.
"""

import dataclasses
import itertools
import operator
import struct
import types
import typing
from collections.abc import Callable, Iterable, Sequence
from functools import cache, lru_cache
from typing import Any

import ml_dtypes
import numpy as np

from jaxdist import extras

_crc32c = extras.require("google_crc32c", extra="paramserver")

DTYPES = (
    *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *("float16", "float32", "float64", "bfloat16", "complex64", "complex128"),
)
MAX_ARRAY_BYTES = 1 << 40
_ALIGNMENT = 64
"""JAX uses the memory of an array without a copy only if it is aligned like its own."""
_TOGETHER_BYTES = 1 << 20
"""The arrays of a message up to this size share their memory: they are used, and freed, together."""

Buffer = bytes | memoryview


class EncodingError(ValueError):
    """The bytes are not a valid message, or the value cannot be encoded as one."""


class Decoder:
    """Reads a head from start to end. Arrays are made as the head declares them; their data is filled in later.

    `left` is the number of bytes of array data that the message declares and no array has claimed yet. With `memory`,
    the arrays are in it already, one after the other, each in the room that `aligned` gives.
    """

    def __init__(self, head: bytes, left: int, memory: np.ndarray | None = None) -> None:
        self.left, self._memory, self._room = left, memory, _NO_ROOM
        self.arrays: list[np.ndarray] = []
        self._head, self._at = head, 0

    @property
    def head_left(self) -> int:
        """The number of bytes of the head that have not been read yet."""
        return len(self._head) - self._at

    def take(self, count: int) -> bytes:
        """Return the next `count` bytes of the head."""
        part = self._head[self._at : self._at + count]
        if len(part) != count:
            raise self._too_short(count)
        self._at += count
        return part

    def unpack(self, layout: struct.Struct) -> tuple[Any, ...]:
        """Return the next numbers of the head."""
        try:
            numbers = layout.unpack_from(self._head, self._at)
        except struct.error:
            raise self._too_short(layout.size) from None
        self._at += layout.size
        return numbers

    def _too_short(self, count: int) -> EncodingError:
        return EncodingError(f"The head of a message ends {count - self.head_left} bytes too early.")

    def array(self, shape: tuple[int, ...], dtype: np.dtype, num_bytes: int) -> np.ndarray:
        """Return a new array of the message; its values are undefined until its data has arrived."""
        if num_bytes > self.left:
            raise EncodingError(f"A message declares an array of {num_bytes} bytes, but only {self.left} are left.")
        self.left -= num_bytes
        if self._memory is None:
            memory = self._take_memory(num_bytes)
        else:
            memory, self._memory = self._memory[:num_bytes], self._memory[aligned(num_bytes) :]
            if len(memory) != num_bytes:
                raise EncodingError(f"The memory of a message ends before an array of {num_bytes} bytes.")
        array = memory.view(dtype).reshape(shape)
        self.arrays.append(array)
        return array

    def _take_memory(self, num_bytes: int) -> np.ndarray:
        size = aligned(num_bytes)
        if len(self._room) < size:
            together = num_bytes + self.left
            self._room = _new_memory(max(together + 16 * _ALIGNMENT if together <= _TOGETHER_BYTES else 0, size))
        memory, self._room = self._room[:num_bytes], self._room[size:]
        return memory


def aligned(num_bytes: int) -> int:
    """Return the room that an array of this length takes in a memory of several arrays."""
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT


_NO_ROOM = np.empty(0, np.uint8)


def _new_memory(num_bytes: int) -> np.ndarray:
    try:
        memory = np.empty(num_bytes + _ALIGNMENT, np.uint8)
    except MemoryError as error:
        raise EncodingError(f"There is no memory for an array of {num_bytes} bytes.") from error
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + num_bytes]


class Encoder:
    """Collects the head of a message, and views of the memory of its arrays, which is not copied."""

    def __init__(self) -> None:
        self.head = bytearray()
        self.arrays: list[memoryview] = []


Write = Callable[[Encoder, Any], None]
Read = Callable[[Decoder], Any]
_INT, _FLOAT, _BYTE, _LENGTH = struct.Struct("<q"), struct.Struct("<d"), struct.Struct("<B"), struct.Struct("<I")


def checksum(pieces: Iterable[Buffer], value: int = 0) -> int:
    """Return the CRC-32C of `pieces`, appended to data whose CRC-32C is `value`."""
    for piece in pieces:
        # The package accepts bytes and arrays, and no memoryviews; it computes the checksum with a CPU instruction.
        if len(piece):
            value = _crc32c.extend(value, piece if isinstance(piece, bytes) else np.frombuffer(piece, np.uint8))
    return value


@lru_cache(maxsize=64)
def _dtype(name: str) -> np.dtype:
    if name not in DTYPES:
        raise EncodingError(f"Arrays of dtype {name!r} cannot be sent. Use one of {', '.join(DTYPES)}.")
    if name == "bfloat16":
        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name).newbyteorder("<")


def _memory(array: np.ndarray) -> memoryview:
    contiguous = np.ascontiguousarray(array)
    if contiguous.dtype.byteorder == ">":
        contiguous = contiguous.astype(contiguous.dtype.newbyteorder("<"))
    return contiguous.reshape(-1).view(np.uint8).data if contiguous.size else memoryview(b"")


@lru_cache(maxsize=4096)
def _declaration(dtype: np.dtype, shape: tuple[int, ...]) -> bytes:
    """Return what the head says of an array; messages repeat it, and NumPy takes long to name a dtype."""
    _dtype(dtype.name)
    name = dtype.name.encode()
    return _LENGTH.pack(len(name)) + name + struct.pack(f"<B{len(shape)}q", len(shape), *shape)


def _write_array(writer: Encoder, array: np.ndarray) -> None:
    writer.head += _declaration(array.dtype, array.shape)
    writer.arrays.append(_memory(array))


def _read_array(reader: Decoder) -> np.ndarray:
    name = reader.take(reader.unpack(_LENGTH)[0])
    return reader.array(*_declared(name, reader.take(_INT.size * reader.unpack(_BYTE)[0])))


@lru_cache(maxsize=4096)
def _declared(name: bytes, sizes: bytes) -> tuple[tuple[int, ...], np.dtype, int]:
    """Return shape, dtype and number of bytes of an array; the inverse of `_declaration`."""
    dtype, shape = _dtype(_as_str(name)), struct.unpack(f"<{len(sizes) // _INT.size}q", sizes)
    count = dtype.itemsize
    for size in shape:
        if not 0 <= size <= MAX_ARRAY_BYTES:
            raise EncodingError(f"A message declares an array of the invalid shape {shape}.")
        count *= size
    return shape, dtype, count


def _write_bytes(writer: Encoder, value: bytes) -> None:
    writer.head += _LENGTH.pack(len(value)) + value


def _read_bytes(reader: Decoder) -> bytes:
    return reader.take(reader.unpack(_LENGTH)[0])


def _write_str(writer: Encoder, value: str) -> None:
    _write_bytes(writer, value.encode())


def _read_str(reader: Decoder) -> str:
    return _as_str(_read_bytes(reader))


def _as_str(value: bytes) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        raise EncodingError("A string in a message is not valid UTF-8.") from error


def _scalar(layout: struct.Struct, kind: type) -> tuple[Write, Read]:
    def write(writer: Encoder, value: Any) -> None:
        writer.head += layout.pack(value)

    return write, lambda reader: kind(reader.unpack(layout)[0])


_FORMATS = {int: "q", float: "d", bool: "?"}
"""As in _SCALARS, for several at once."""
_SCALARS: dict[Any, tuple[Write, Read]] = {
    int: _scalar(_INT, int),
    float: _scalar(_FLOAT, float),
    bool: _scalar(_BYTE, bool),
    str: (_write_str, _read_str),
    bytes: (_write_bytes, _read_bytes),
    np.ndarray: (_write_array, _read_array),
}


def _many(item: Any) -> tuple[Write, Read]:
    write_item, read_item = codec(item)

    def write(writer: Encoder, values: tuple[Any, ...]) -> None:
        writer.head += _LENGTH.pack(len(values))
        for value in values:
            write_item(writer, value)

    def read(reader: Decoder) -> tuple[Any, ...]:
        (count,) = reader.unpack(_LENGTH)
        if count > reader.head_left:
            raise EncodingError(
                f"A message declares a list of {count} items, but only {reader.head_left} bytes are left."
            )
        return tuple([read_item(reader) for _ in range(count)])

    return write, read


def _fixed(items: tuple[Any, ...]) -> tuple[Write, Read]:
    codecs = [codec(item) for item in items]

    def write(writer: Encoder, values: tuple[Any, ...]) -> None:
        for (write_item, _), value in zip(codecs, values, strict=True):
            write_item(writer, value)

    return write, lambda reader: tuple(read_item(reader) for _, read_item in codecs)


def _one_of(options: tuple[Any, ...]) -> tuple[Write, Read]:
    codecs = [codec(option) for option in options]

    def write(writer: Encoder, value: Any) -> None:
        for tag, (option, (write_option, _)) in enumerate(zip(options, codecs, strict=True)):
            if type(value) is option:
                writer.head += _BYTE.pack(tag)
                write_option(writer, value)
                return
        raise EncodingError(
            f"Expected one of {', '.join(option.__name__ for option in options)}, got {type(value).__name__}."
        )

    def read(reader: Decoder) -> Any:
        (tag,) = reader.unpack(_BYTE)
        if tag >= len(codecs):
            raise EncodingError(f"A message contains the unknown type number {tag}; there are {len(codecs)} types.")
        return codecs[tag][1](reader)

    return write, read


def _record(kind: type) -> tuple[Write, Read]:
    """Return how a dataclass is written and read: numbers that follow each other in one call."""
    hints, parts = _hints(kind), []
    for are_numbers, group in itertools.groupby(hints, lambda name: bool(_number_paths(hints[name], name))):
        run = {name: hints[name] for name in group}
        parts += [_numbers(run)] if are_numbers else [_field(*pair) for pair in run.items()]

    writers, readers = zip(*parts) if parts else ((), ())

    def write(writer: Encoder, value: Any) -> None:
        for write_part in writers:
            write_part(writer, value)

    def read(reader: Decoder) -> Any:
        values: list[Any] = []
        for read_part in readers:
            values += read_part(reader)
        return kind(*values)

    return write, read


def _field(name: str, hint: Any) -> tuple[Write, Read]:
    write, read = codec(hint)
    return (lambda writer, value: write(writer, getattr(value, name))), lambda reader: (read(reader),)


def _number_paths(hint: Any, path: str) -> list[tuple[str, str]]:
    """Return path and format of the numbers in a field that is a number, or a dataclass of numbers; else nothing."""
    if hint in _FORMATS:
        return [(path, _FORMATS[hint])]
    inner = _hints(hint).items() if dataclasses.is_dataclass(hint) else ()
    found = [_number_paths(each, f"{path}.{name}") for name, each in inner]
    return list(itertools.chain(*found)) if all(found) else []


def _hints(kind: Any) -> dict[str, Any]:
    hints = typing.get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def _numbers(hints: dict[str, Any]) -> tuple[Write, Read]:
    """Return how fields are written and read that are numbers, or dataclasses of numbers."""
    paths = [pair for name, hint in hints.items() for pair in _number_paths(hint, name)]
    layout = struct.Struct("<" + "".join(each for _, each in paths))
    values_of, several = operator.attrgetter(*(path for path, _ in paths)), len(paths) > 1

    def write(writer: Encoder, value: Any) -> None:
        values = values_of(value)
        writer.head += layout.pack(*values) if several else layout.pack(values)

    if len(paths) == len(hints):
        return write, lambda reader: reader.unpack(layout)
    nest = _nesting(list(hints.values()))
    return write, lambda reader: nest(reader.unpack(layout))


def _nesting(hints: list[Any]) -> Callable[[Sequence[Any]], Sequence[Any]]:
    """Return how values of these types, numbers and dataclasses of numbers, are made from all their numbers."""
    places: list[tuple[slice, Any]] = []
    at = 0
    for hint in hints:
        count = len(_number_paths(hint, ""))
        places.append(
            (slice(at, at + count), None if hint in _FORMATS else (hint, _nesting(list(_hints(hint).values()))))
        )
        at += count
    if not any(made for _, made in places):
        return lambda numbers: numbers

    def nest(numbers: Sequence[Any]) -> Sequence[Any]:
        values: list[Any] = []
        for place, made in places:
            if made is None:
                values += numbers[place]
            else:
                values.append(made[0](*made[1](numbers[place])))
        return values

    return nest


def _nothing() -> tuple[Write, Read]:
    return (lambda writer, value: None), (lambda reader: None)


@cache
def codec(kind: Any) -> tuple[Write, Read]:
    """Return how values of the annotated type `kind` are written and read."""
    if kind in _SCALARS:
        return _SCALARS[kind]
    if kind is type(None):
        return _nothing()
    if isinstance(kind, types.UnionType):
        return _one_of(typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        items = typing.get_args(kind)
        return _many(items[0]) if items[-1] is Ellipsis else _fixed(items)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return _record(kind)
    raise TypeError(f"Values of type {kind} cannot be encoded.")
