"""Messages as bytes: blocks for the network and for files, frames for a log.

A message consists of a *prefix*, a *head* (its numbers and names, and the dtype and shape of each array), the bytes of
the arrays, and their CRC-32Cs. It is written as blocks of at most 2 MiB. A large array begins a new block, so that a
reader can use it without a copy; small arrays share blocks. The head has its own checksum. A reader refuses a message
whose checksums do not match.
"""

import struct
import zlib
from collections.abc import Iterable, Iterator
from typing import Any

from jaxdist.paramserver.protocol import journal, messages
from jaxdist.paramserver.wire.codec import Buffer, Decoder, Encoder, EncodingError, Stream, checksum, codec

FRAME_BYTES = 2 << 20
"""Twice this size and an eighth of it were slower in benchmarks/parameter_server.py; half of it was not faster."""
SMALL_BYTES = 64 << 10
MAGIC = b"jxd2"
_FRAME = struct.Struct("<4sII")
_PREFIX = struct.Struct("<4sIIQI")
_CHECKSUM = struct.Struct("<I")

# The position of a class in this table is its number on the wire: append, never reorder.
KINDS: tuple[type, ...] = (
    messages.Register,
    messages.Welcome,
    messages.Fenced,
    messages.Heartbeat,
    messages.Membership,
    messages.MembershipAck,
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
    messages.SaveCut,
    messages.CutSaved,
    messages.StopRun,
    messages.StopAck,
    messages.Halt,
    messages.Replicate,
    messages.Replicated,
    messages.Transfer,
    messages.ShardState,
    journal.MembershipRecord,
    journal.CommitRecord,
    journal.CompleteRecord,
    journal.SavedCutRecord,
    journal.StopRecord,
    journal.SavedCut,
    journal.NormRecord,
    messages.Read,
    messages.ReadAnswer,
    messages.Verdict,
    journal.VerdictRecord,
    journal.Cut,
    journal.StateRecord,
    messages.Diverged,
    journal.EmptyRecord,
)
_NUMBERS = {kind: number for number, kind in enumerate(KINDS)}


class Encoded:
    """An encoded message. Iterating yields its blocks; the memory of the arrays is not copied before that."""

    def __init__(self, writer: Encoder, *, block_bytes: int) -> None:
        head = bytes(writer.head)
        size = sum(map(len, writer.arrays))
        self._start = _PREFIX.pack(MAGIC, len(head), zlib.crc32(head), size, len(writer.arrays)) + head
        self._arrays, self._block_bytes = writer.arrays, block_bytes
        self.num_bytes = len(self._start) + size + _CHECKSUM.size * len(writer.arrays)

    def is_same(self, other: "Encoded") -> bool:
        """Return whether both are the same message, sent twice: their heads are equal."""
        return self._start == other._start

    def __iter__(self) -> Iterator[bytes]:
        """Yield blocks of at most `block_bytes`."""
        pending = bytearray(self._start)
        checksums = bytearray()
        for array in self._arrays:
            if len(array) < SMALL_BYTES:
                small = bytes(array)
                checksums += _CHECKSUM.pack(checksum([small]))
                pending += small
                continue
            yield from self._blocks_of(pending)
            pending = bytearray()
            value = 0
            for start in range(0, len(array), self._block_bytes):
                block = bytes(array[start : start + self._block_bytes])
                value = checksum([block], value)
                yield block
            checksums += _CHECKSUM.pack(value)
        yield from self._blocks_of(pending + checksums)

    def _blocks_of(self, data: bytearray) -> Iterator[bytes]:
        for start in range(0, len(data), self._block_bytes):
            yield bytes(data[start : start + self._block_bytes])


def encode(message: messages.Message, *, block_bytes: int = FRAME_BYTES) -> Encoded:
    """Return `message` as blocks, each of which is made when it is needed.

    Raises:
      EncodingError: the message has no number in KINDS, or an array in it has a dtype that cannot be sent.
    """
    if type(message) not in _NUMBERS:
        raise EncodingError(f"Messages of type {type(message).__name__} cannot be sent.")
    writer = Encoder()
    writer.head.append(_NUMBERS[type(message)])
    codec(KINDS[_NUMBERS[type(message)]])[0](writer, message)
    return Encoded(writer, block_bytes=block_bytes)


def declared_bytes(start: Buffer) -> int:
    """Return the length in bytes of the message that begins with `start`; raises EncodingError if it is invalid."""
    if len(start) < _PREFIX.size:
        raise EncodingError(f"A message has at least {_PREFIX.size} bytes, got {len(start)}.")
    magic, head_size, _, size, num_arrays = _PREFIX.unpack(start[: _PREFIX.size])
    if magic != MAGIC:
        raise EncodingError(f"A message must begin with {MAGIC!r}, got {magic!r}.")
    return _PREFIX.size + head_size + size + _CHECKSUM.size * num_arrays


def decode(data: Buffer | Iterable[Buffer]) -> Any:
    """Return the message in `data`: the blocks that `encode` made, or the same bytes divided differently.

    Each block is read and added to the checksum before the next is requested. An array in one block is a view of it.

    Raises:
      EncodingError: lengths, types, dtypes, shapes or checksums are not valid.
    """
    stream = Stream([data] if isinstance(data, Buffer) else data, _PREFIX.size)
    prefix = stream.take(_PREFIX.size)
    stream.left = declared_bytes(prefix) - _PREFIX.size
    _, head_size, head_checksum, _, num_arrays = _PREFIX.unpack(prefix)
    if not head_size:
        raise EncodingError("A message has an empty head.")
    head = stream.take(head_size)
    if zlib.crc32(head) != head_checksum:
        raise EncodingError("The head of a message is damaged: its checksum differs.")
    return _read(head, stream, num_arrays)


def _read(head: Buffer, stream: Stream, num_arrays: int) -> Any:
    number, reader = head[0], Decoder(memoryview(head)[1:], stream)
    if number >= len(KINDS):
        raise EncodingError(f"A message has the unknown number {number}. It was sent by another version of jaxdist.")
    message = codec(KINDS[number])[1](reader)
    if len(reader.head) or len(reader.checksums) != num_arrays or stream.left != _CHECKSUM.size * num_arrays:
        raise EncodingError(f"A {KINDS[number].__name__} message is shorter than its declared length.")
    for place, value in enumerate(reader.checksums):
        if _CHECKSUM.unpack(stream.take(_CHECKSUM.size))[0] != value:
            raise EncodingError(
                f"Array {place} of a {KINDS[number].__name__} message is damaged: its checksum differs."
            )
    if not stream.is_at_end():
        raise EncodingError(f"A {KINDS[number].__name__} message is longer than its declared length.")
    return message


def to_bytes(message: messages.Message) -> bytes:
    """Return `message` as one bytes object."""
    return b"".join(encode(message))


def frame(payload: Buffer) -> bytes:
    """Return `payload` after a header with its length and CRC-32: one record of a log."""
    return b"".join((_FRAME.pack(MAGIC, len(payload), zlib.crc32(payload)), payload))


def unframe(data: Buffer) -> Iterator[memoryview]:
    """Yield the payloads of the frames in `data` up to the first frame that is incomplete or damaged."""
    view = memoryview(data)
    while len(view) >= _FRAME.size:
        magic, size, checksum = _FRAME.unpack(view[: _FRAME.size])
        payload = view[_FRAME.size : _FRAME.size + size]
        if magic != MAGIC or len(payload) != size or zlib.crc32(payload) != checksum:
            return
        yield payload
        view = view[_FRAME.size + size :]
