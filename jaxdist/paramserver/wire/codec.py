"""How a value of an annotated type is written and read: numbers and names in a head, arrays beside it.

The dataclasses' own annotations drive it, so a message's fields are declared once. Nothing is ever unpickled: a reader
knows beforehand which types come, and refuses whatever does not fit.
"""

import dataclasses
import struct
import types
import typing
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import Any

import ml_dtypes
import numpy as np

from jaxdist import extras

_crc32c = extras.require("google_crc32c", extra="paramserver")

DTYPES = (
    *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *("float16", "float32", "float64", "bfloat16"),
)
MAX_ARRAY_BYTES = 1 << 40

Buffer = bytes | memoryview


class EncodingError(ValueError):
    """Bytes that are not a message of ours, or a value that cannot be one."""


class Stream:
    """Reads a message from front to back as its blocks arrive, without joining what lies in one block.

    `left` is how many of its bytes are still to come; the reader sets it once it is known.
    """

    def __init__(self, blocks: Iterable[Buffer], left: int) -> None:
        self._blocks = iter(blocks)
        self._block: Buffer = b""
        self._at = 0
        self.left = left

    def pieces(self, count: int) -> Iterator[Buffer]:
        """Yield the next `count` bytes as they lie in their blocks; whole blocks as the objects they are."""
        if count > self.left:
            raise EncodingError(f"{count} bytes were declared, {self.left} follow")
        self.left -= count
        while count:
            block = self._current()
            part = block if self._at == 0 and len(block) <= count else memoryview(block)[self._at : self._at + count]
            count -= len(part)
            self._at += len(part)
            yield part

    def _current(self) -> Buffer:
        """Return the block that the next byte is in."""
        while self._at == len(self._block):
            block = next(self._blocks, None)
            if block is None:
                raise EncodingError(f"a message ends before the {self.left} bytes and more that are missing")
            self._block, self._at = block, 0
        return self._block

    def take(self, count: int) -> Buffer:
        """Return the next `count` bytes in one piece."""
        pieces = list(self.pieces(count))
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def is_at_end(self) -> bool:
        """Return True when neither this message nor its blocks go on."""
        return not self.left and self._at == len(self._block) and not any(map(len, self._blocks))


class Reader:
    """Reads a head from front to back; arrays come from `arrays`, the bytes that followed it.

    `checksums` collects what each array's bytes give: what they were sent with is known only after the last of them.
    """

    def __init__(self, head: Buffer, arrays: Stream) -> None:
        self.head, self.arrays = memoryview(head), arrays
        self.checksums: list[int] = []

    def take(self, count: int) -> memoryview:
        """Return the next bytes of the head."""
        if count > len(self.head):
            raise EncodingError(f"a message's head ends {count - len(self.head)} bytes too early")
        part, self.head = self.head[:count], self.head[count:]
        return part

    def unpack(self, layout: struct.Struct) -> tuple[Any, ...]:
        """Return the next numbers of the head."""
        return layout.unpack(self.take(layout.size))


class Writer:
    """Collects a head, and beside it the arrays' own memory, which is not copied."""

    def __init__(self) -> None:
        self.head = bytearray()
        self.arrays: list[memoryview] = []


Write = Callable[[Writer, Any], None]
Read = Callable[[Reader], Any]
_INT, _FLOAT, _BYTE, _LENGTH = struct.Struct("<q"), struct.Struct("<d"), struct.Struct("<B"), struct.Struct("<I")


def checksum(pieces: Iterable[Buffer], value: int = 0) -> int:
    """Return the CRC-32C of what `value` is the CRC-32C of, followed by `pieces`."""
    for piece in pieces:
        # The package takes nothing but a bytes object, and has the processor's own instruction do the work.
        value = _crc32c.extend(value, piece if isinstance(piece, bytes) else bytes(piece))
    return value


def _dtype(name: str) -> np.dtype:
    if name not in DTYPES:
        raise EncodingError(f"dtype {name!r} does not travel; one of {', '.join(DTYPES)} does")
    if name == "bfloat16":
        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name).newbyteorder("<")


def _memory(array: np.ndarray) -> memoryview:
    contiguous = np.ascontiguousarray(array)
    if contiguous.dtype.byteorder == ">":
        contiguous = contiguous.astype(contiguous.dtype.newbyteorder("<"))
    return contiguous.reshape(-1).view(np.uint8).data if contiguous.size else memoryview(b"")


def _write_array(writer: Writer, array: np.ndarray) -> None:
    _dtype(array.dtype.name)
    _write_str(writer, array.dtype.name)
    writer.head += _BYTE.pack(array.ndim)
    for size in array.shape:
        writer.head += _INT.pack(size)
    writer.arrays.append(_memory(array))


def _read_array(reader: Reader) -> np.ndarray:
    dtype = _dtype(_read_str(reader))
    shape = tuple(reader.unpack(_INT)[0] for _ in range(reader.unpack(_BYTE)[0]))
    count = dtype.itemsize
    for size in shape:
        if not 0 <= size <= MAX_ARRAY_BYTES:
            raise EncodingError(f"an array of shape {shape} was declared")
        count *= size
    pieces, value = [], 0
    for piece in reader.arrays.pieces(count):  # while the next one is on its way
        value = checksum([piece], value)
        pieces.append(piece)
    reader.checksums.append(value)
    memory = pieces[0] if len(pieces) == 1 else b"".join(pieces)
    return np.frombuffer(memory, dtype=dtype).reshape(shape)


def _write_bytes(writer: Writer, value: bytes) -> None:
    writer.head += _LENGTH.pack(len(value)) + value


def _read_bytes(reader: Reader) -> bytes:
    return bytes(reader.take(reader.unpack(_LENGTH)[0]))


def _write_str(writer: Writer, value: str) -> None:
    _write_bytes(writer, value.encode())


def _read_str(reader: Reader) -> str:
    try:
        return _read_bytes(reader).decode()
    except UnicodeDecodeError as error:
        raise EncodingError("a name in a message is not UTF-8") from error


def _scalar(layout: struct.Struct, kind: type) -> tuple[Write, Read]:
    def write(writer: Writer, value: Any) -> None:
        writer.head += layout.pack(value)

    return write, lambda reader: kind(reader.unpack(layout)[0])


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

    def write(writer: Writer, values: tuple[Any, ...]) -> None:
        writer.head += _LENGTH.pack(len(values))
        for value in values:
            write_item(writer, value)

    def read(reader: Reader) -> tuple[Any, ...]:
        (count,) = reader.unpack(_LENGTH)
        if count > len(reader.head):
            raise EncodingError(f"a list of {count} items was declared in {len(reader.head)} bytes")
        return tuple(read_item(reader) for _ in range(count))

    return write, read


def _fixed(items: tuple[Any, ...]) -> tuple[Write, Read]:
    codecs = [codec(item) for item in items]

    def write(writer: Writer, values: tuple[Any, ...]) -> None:
        for (write_item, _), value in zip(codecs, values, strict=True):
            write_item(writer, value)

    return write, lambda reader: tuple(read_item(reader) for _, read_item in codecs)


def _one_of(options: tuple[Any, ...]) -> tuple[Write, Read]:
    codecs = [codec(option) for option in options]

    def write(writer: Writer, value: Any) -> None:
        for tag, (option, (write_option, _)) in enumerate(zip(options, codecs, strict=True)):
            if type(value) is option:
                writer.head += _BYTE.pack(tag)
                write_option(writer, value)
                return
        raise EncodingError(f"{type(value).__name__} does not fit here")

    def read(reader: Reader) -> Any:
        (tag,) = reader.unpack(_BYTE)
        if tag >= len(codecs):
            raise EncodingError(f"an unknown alternative, {tag}")
        return codecs[tag][1](reader)

    return write, read


def _record(kind: type) -> tuple[Write, Read]:
    hints = typing.get_type_hints(kind)
    fields = [(field.name, *codec(hints[field.name])) for field in dataclasses.fields(kind)]

    def write(writer: Writer, value: Any) -> None:
        for name, write_field, _ in fields:
            write_field(writer, getattr(value, name))

    return write, lambda reader: kind(*(read_field(reader) for _, _, read_field in fields))


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
    raise TypeError(f"no encoding for {kind}")
