"""Messages as bytes: an explicit little-endian encoding driven by the dataclasses' types. Nothing is ever unpickled.

A message is a *head* and its array buffers. The head declares, for each array, dtype, shape and CRC-32, and has a
checksum of its own; the buffers are the arrays' own memory, so sending them copies nothing. `blocks` cuts all of it
into blocks of at most 4 MiB for the wire; `frame` makes a record of a log. A reader refuses whatever does not match.
"""

import dataclasses
import struct
import types
import typing
import zlib
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import Any

import ml_dtypes
import numpy as np

from jaxdist.paramserver import messages

FRAME_BYTES = 4 << 20
MAX_MESSAGE_BYTES = 1 << 40
DTYPES = (
    *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *("float16", "float32", "float64", "bfloat16"),
)
MAGIC = b"jxd1"
_FRAME = struct.Struct("<4sII")
_HEAD = struct.Struct("<4sIIQ")

Buffer = bytes | memoryview


class EncodingError(ValueError):
    """Bytes that are not a message of ours, or a value that cannot be one."""


class _Reader:
    """Reads a head from front to back; arrays come from `buffers`, the bytes that followed it."""

    def __init__(self, head: memoryview, buffers: memoryview) -> None:
        self.head, self.buffers = head, buffers

    def take(self, count: int) -> memoryview:
        if count > len(self.head):
            raise EncodingError(f"a message's head ends {count - len(self.head)} bytes too early")
        part, self.head = self.head[:count], self.head[count:]
        return part

    def take_buffer(self, count: int) -> memoryview:
        if count > len(self.buffers):
            raise EncodingError(f"an array of {count} bytes was declared, {len(self.buffers)} bytes follow")
        part, self.buffers = self.buffers[:count], self.buffers[count:]
        return part

    def unpack(self, layout: struct.Struct) -> tuple[Any, ...]:
        return layout.unpack(self.take(layout.size))


class _Writer:
    """Collects a head, and beside it the memory of the arrays."""

    def __init__(self) -> None:
        self.head = bytearray()
        self.buffers: list[memoryview] = []


Write = Callable[[_Writer, Any], None]
Read = Callable[[_Reader], Any]
_INT, _FLOAT, _BYTE, _LENGTH = struct.Struct("<q"), struct.Struct("<d"), struct.Struct("<B"), struct.Struct("<I")


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


def _write_array(writer: _Writer, array: np.ndarray) -> None:
    _dtype(array.dtype.name)
    memory = _memory(array)
    _write_str(writer, array.dtype.name)
    writer.head += _BYTE.pack(array.ndim)
    for size in array.shape:
        writer.head += _INT.pack(size)
    writer.head += _LENGTH.pack(zlib.crc32(memory))
    writer.buffers.append(memory)


def _read_array(reader: _Reader) -> np.ndarray:
    dtype = _dtype(_read_str(reader))
    shape = tuple(reader.unpack(_INT)[0] for _ in range(reader.unpack(_BYTE)[0]))
    (checksum,) = reader.unpack(_LENGTH)
    count = dtype.itemsize
    for size in shape:
        if not 0 <= size <= MAX_MESSAGE_BYTES:
            raise EncodingError(f"an array of shape {shape} was declared")
        count *= size
    memory = reader.take_buffer(count)
    if zlib.crc32(memory) != checksum:
        raise EncodingError(f"an array of shape {shape} and dtype {dtype.name} arrived with another checksum")
    return np.frombuffer(memory, dtype=dtype).reshape(shape)


def _write_bytes(writer: _Writer, value: bytes) -> None:
    writer.head += _LENGTH.pack(len(value)) + value


def _read_bytes(reader: _Reader) -> bytes:
    return bytes(reader.take(reader.unpack(_LENGTH)[0]))


def _write_str(writer: _Writer, value: str) -> None:
    _write_bytes(writer, value.encode())


def _read_str(reader: _Reader) -> str:
    try:
        return _read_bytes(reader).decode()
    except UnicodeDecodeError as error:
        raise EncodingError("a name in a message is not UTF-8") from error


def _scalar(layout: struct.Struct, kind: type) -> tuple[Write, Read]:
    def write(writer: _Writer, value: Any) -> None:
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
    write_item, read_item = _codec(item)

    def write(writer: _Writer, values: tuple[Any, ...]) -> None:
        writer.head += _LENGTH.pack(len(values))
        for value in values:
            write_item(writer, value)

    def read(reader: _Reader) -> tuple[Any, ...]:
        (count,) = reader.unpack(_LENGTH)
        if count > len(reader.head):
            raise EncodingError(f"a list of {count} items was declared in {len(reader.head)} bytes")
        return tuple(read_item(reader) for _ in range(count))

    return write, read


def _fixed(items: tuple[Any, ...]) -> tuple[Write, Read]:
    codecs = [_codec(item) for item in items]

    def write(writer: _Writer, values: tuple[Any, ...]) -> None:
        for (write_item, _), value in zip(codecs, values, strict=True):
            write_item(writer, value)

    return write, lambda reader: tuple(read_item(reader) for _, read_item in codecs)


def _one_of(options: tuple[Any, ...]) -> tuple[Write, Read]:
    codecs = [_codec(option) for option in options]

    def write(writer: _Writer, value: Any) -> None:
        for tag, (option, (write_option, _)) in enumerate(zip(options, codecs, strict=True)):
            if type(value) is option:
                writer.head += _BYTE.pack(tag)
                write_option(writer, value)
                return
        raise EncodingError(f"{type(value).__name__} does not fit here")

    def read(reader: _Reader) -> Any:
        (tag,) = reader.unpack(_BYTE)
        if tag >= len(codecs):
            raise EncodingError(f"an unknown alternative, {tag}")
        return codecs[tag][1](reader)

    return write, read


def _record(kind: type) -> tuple[Write, Read]:
    hints = typing.get_type_hints(kind)
    fields = [(field.name, *_codec(hints[field.name])) for field in dataclasses.fields(kind)]

    def write(writer: _Writer, value: Any) -> None:
        for name, write_field, _ in fields:
            write_field(writer, getattr(value, name))

    return write, lambda reader: kind(*(read_field(reader) for _, _, read_field in fields))


def _nothing() -> tuple[Write, Read]:
    return (lambda writer, value: None), (lambda reader: None)


@cache
def _codec(kind: Any) -> tuple[Write, Read]:
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


# The position of a class in this table is its number on the wire: append, never reorder.
KINDS: tuple[type, ...] = (
    messages.Register,
    messages.Welcome,
    messages.Fenced,
    messages.Heartbeat,
    messages.View,
    messages.ViewAck,
    messages.Synced,
    messages.Ask,
    messages.Grant,
    messages.Revoke,
    messages.Pull,
    messages.Pulled,
    messages.Push,
    messages.PushAck,
    messages.Done,
    messages.DoneAck,
    messages.Commit,
    messages.Norms,
    messages.Finish,
    messages.CommitAck,
    messages.Snapshot,
    messages.SnapshotDone,
    messages.Stop,
    messages.StopAck,
    messages.Halt,
    messages.Replicate,
    messages.Replicated,
    messages.Transfer,
    messages.ShardState,
    messages.ViewRecord,
    messages.CommitRecord,
    messages.CompleteRecord,
    messages.SnapshotRecord,
    messages.StopRecord,
    messages.Manifest,
    messages.NormRecord,
    messages.Read,
    messages.ReadAnswer,
    messages.Verdict,
    messages.VerdictRecord,
    messages.CutFile,
)
_NUMBERS = {kind: number for number, kind in enumerate(KINDS)}


def encode(message: messages.Message) -> list[Buffer]:
    """Return `message` as buffers whose concatenation is its encoding; the arrays' memory is not copied.

    Raises:
      EncodingError: the message, or a dtype in it, is not one that travels.
    """
    if type(message) not in _NUMBERS:
        raise EncodingError(f"{type(message).__name__} is not a message that travels")
    writer = _Writer()
    writer.head += _BYTE.pack(_NUMBERS[type(message)])
    _codec(KINDS[_NUMBERS[type(message)]])[0](writer, message)
    size = sum(len(memory) for memory in writer.buffers)
    head = bytes(writer.head)
    return [_HEAD.pack(MAGIC, len(head), zlib.crc32(head), size), head, *writer.buffers]


def decode(data: Buffer) -> Any:
    """Return the message that `encode` gave as `data` (joined); its arrays are views of `data`.

    Raises:
      EncodingError: anything does not fit: lengths, types, dtypes, shapes or checksums.
    """
    view = memoryview(data)
    if len(view) < _HEAD.size:
        raise EncodingError(f"{len(view)} bytes are too few for a message")
    magic, head, checksum, buffers = _HEAD.unpack(view[: _HEAD.size])
    if magic != MAGIC:
        raise EncodingError(f"a message begins with {MAGIC!r}, not with {magic!r}")
    if head + buffers + _HEAD.size != len(view) or head < 1:
        raise EncodingError(f"a message of {head} + {buffers} bytes was declared, {len(view) - _HEAD.size} arrived")
    if zlib.crc32(view[_HEAD.size : _HEAD.size + head]) != checksum:
        raise EncodingError("a message's head arrived with another checksum")
    reader = _Reader(view[_HEAD.size : _HEAD.size + head], view[_HEAD.size + head :])
    (number,) = reader.unpack(_BYTE)
    if number >= len(KINDS):
        raise EncodingError(f"unknown message number {number}")
    message = _codec(KINDS[number])[1](reader)
    if len(reader.head) or len(reader.buffers):
        raise EncodingError(
            f"{len(reader.head) + len(reader.buffers)} bytes are left over after a {KINDS[number].__name__}"
        )
    return message


def to_bytes(message: messages.Message) -> bytes:
    """Return `message` as one string of bytes."""
    return b"".join(encode(message))


def frame(payload: Buffer) -> bytes:
    """Return `payload` behind a header with its length and CRC-32: a record of a log."""
    return b"".join((_FRAME.pack(MAGIC, len(payload), zlib.crc32(payload)), payload))


def unframe(data: Buffer) -> Iterator[memoryview]:
    """Yield the payloads of the frames in `data` up to the first that is torn or damaged."""
    view = memoryview(data)
    while len(view) >= _FRAME.size:
        magic, size, checksum = _FRAME.unpack(view[: _FRAME.size])
        payload = view[_FRAME.size : _FRAME.size + size]
        if magic != MAGIC or len(payload) != size or zlib.crc32(payload) != checksum:
            return
        yield payload
        view = view[_FRAME.size + size :]


def blocks(buffers: Iterable[Buffer], *, block_bytes: int = FRAME_BYTES) -> Iterator[bytes]:
    """Yield the concatenation of `buffers` as blocks of at most `block_bytes`; small buffers share one."""
    pending: list[Buffer] = []
    size = 0
    for buffer in buffers:
        view = memoryview(buffer)
        while len(view):
            part, view = view[: block_bytes - size], view[block_bytes - size :]
            pending.append(part)
            size += len(part)
            if size == block_bytes:
                yield b"".join(pending)
                pending, size = [], 0
    if pending:
        yield b"".join(pending)
