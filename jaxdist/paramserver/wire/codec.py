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
from collections.abc import Callable, Iterable
from functools import cache
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

Buffer = bytes | memoryview


class EncodingError(ValueError):
    """The bytes are not a valid message, or the value cannot be encoded as one."""


class Decoder:
    """Reads a head from start to end. Arrays are made as the head declares them; their data is filled in later.

    `left` is the number of bytes of array data that the message declares and no array has claimed yet.
    """

    def __init__(self, head: Buffer, left: int) -> None:
        self.head, self.left = memoryview(head), left
        self.arrays: list[np.ndarray] = []

    def take(self, count: int) -> memoryview:
        """Return the next `count` bytes of the head."""
        if count > len(self.head):
            raise EncodingError(f"The head of a message ends {count - len(self.head)} bytes too early.")
        part, self.head = self.head[:count], self.head[count:]
        return part

    def unpack(self, layout: struct.Struct) -> tuple[Any, ...]:
        """Return the next numbers of the head."""
        return layout.unpack(self.take(layout.size))

    def array(self, shape: tuple[int, ...], dtype: np.dtype, num_bytes: int) -> np.ndarray:
        """Return a new array of the message; its values are undefined until its data has arrived."""
        if num_bytes > self.left:
            raise EncodingError(f"A message declares an array of {num_bytes} bytes, but only {self.left} are left.")
        self.left -= num_bytes
        try:
            memory = np.empty(num_bytes + _ALIGNMENT, np.uint8)
        except MemoryError as error:
            raise EncodingError(f"There is no memory for an array of {num_bytes} bytes.") from error
        start = -memory.ctypes.data % _ALIGNMENT
        array = memory[start : start + num_bytes].view(dtype).reshape(shape)
        self.arrays.append(array)
        return array


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
        # The package accepts only bytes objects; it computes the checksum with a CPU instruction.
        value = _crc32c.extend(value, piece if isinstance(piece, bytes) else bytes(piece))
    return value


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


def _write_array(writer: Encoder, array: np.ndarray) -> None:
    _dtype(array.dtype.name)
    _write_str(writer, array.dtype.name)
    writer.head += _BYTE.pack(array.ndim)
    for size in array.shape:
        writer.head += _INT.pack(size)
    writer.arrays.append(_memory(array))


def _read_array(reader: Decoder) -> np.ndarray:
    dtype = _dtype(_read_str(reader))
    shape = tuple(reader.unpack(_INT)[0] for _ in range(reader.unpack(_BYTE)[0]))
    count = dtype.itemsize
    for size in shape:
        if not 0 <= size <= MAX_ARRAY_BYTES:
            raise EncodingError(f"A message declares an array of the invalid shape {shape}.")
        count *= size
    return reader.array(shape, dtype, count)


def _write_bytes(writer: Encoder, value: bytes) -> None:
    writer.head += _LENGTH.pack(len(value)) + value


def _read_bytes(reader: Decoder) -> bytes:
    return bytes(reader.take(reader.unpack(_LENGTH)[0]))


def _write_str(writer: Encoder, value: str) -> None:
    _write_bytes(writer, value.encode())


def _read_str(reader: Decoder) -> str:
    try:
        return _read_bytes(reader).decode()
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
        if count > len(reader.head):
            raise EncodingError(
                f"A message declares a list of {count} items, but only {len(reader.head)} bytes are left."
            )
        return tuple(read_item(reader) for _ in range(count))

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
    hints = typing.get_type_hints(kind)
    names = [field.name for field in dataclasses.fields(kind)]
    parts = []
    for are_numbers, group in itertools.groupby(names, lambda name: hints[name] in _FORMATS):
        run = list(group)
        parts += [_numbers(run, hints)] if are_numbers else [_field(name, hints[name]) for name in run]

    def write(writer: Encoder, value: Any) -> None:
        for write_part, _ in parts:
            write_part(writer, value)

    def read(reader: Decoder) -> Any:
        values: list[Any] = []
        for _, read_part in parts:
            values += read_part(reader)
        return kind(*values)

    return write, read


def _field(name: str, hint: Any) -> tuple[Write, Read]:
    write, read = codec(hint)
    return (lambda writer, value: write(writer, getattr(value, name))), lambda reader: (read(reader),)


def _numbers(names: list[str], hints: dict[str, Any]) -> tuple[Write, Read]:
    layout = struct.Struct("<" + "".join(_FORMATS[hints[name]] for name in names))
    values_of = operator.attrgetter(*names) if len(names) > 1 else lambda value: (getattr(value, names[0]),)

    def write(writer: Encoder, value: Any) -> None:
        writer.head += layout.pack(*values_of(value))

    return write, lambda reader: reader.unpack(layout)


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
