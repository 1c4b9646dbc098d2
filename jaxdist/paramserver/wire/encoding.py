"""Messages as bytes: blocks for the network and for files.

A message consists of a *prefix*, a *head* (its numbers and names, and the dtype and shape of each array), the bytes of
the arrays, and their CRC-32Cs. The head has its own checksum. It is written and read as blocks of at most BLOCK_BYTES:
the memory of a large array is not copied, and its bytes arrive in the memory of the new array. Within a machine the
arrays may instead be placed in memory that both ends see, block by block, and for each block a checksum is sent. A
message whose checksums do not match is refused.
"""

import struct
import zlib
from collections.abc import Generator, Iterator
from typing import Any

import numpy as np

from jaxdist.paramserver.protocol import journal, messages
from jaxdist.paramserver.wire import lent_memory
from jaxdist.paramserver.wire.codec import Buffer, Decoder, Encoder, EncodingError, aligned, checksum, codec

BLOCK_BYTES = 256 << 10
"""A block stays in the cache of a core between its checksum and its copy into a socket."""
PLACED_BYTES = 2 << 20
"""A block in memory that both ends see: longer, because each costs a call of either. A large array of a run is one."""
SMALL_BYTES = 64 << 10
MAX_HEAD_BYTES = 64 << 20
MAGIC = b"jxd2"
_PREFIX = struct.Struct("<4sIIQI")
PREFIX_BYTES = _PREFIX.size
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
    messages.Offer,
    journal.StateRecord,
    messages.Diverged,
    journal.EmptyRecord,
    messages.Died,
    messages.Staged,
    messages.Retire,
    messages.Leave,
)
_NUMBERS = {kind: number for number, kind in enumerate(KINDS)}


class Encoded:
    """An encoded message. Iterating yields its blocks; the memory of the arrays is not copied before that."""

    def __init__(self, writer: Encoder, *, block_bytes: int) -> None:
        head = bytes(writer.head)
        size = sum(map(len, writer.arrays))
        self._start = _PREFIX.pack(MAGIC, len(head), zlib.crc32(head), size, len(writer.arrays)) + head
        self.arrays, self._block_bytes = writer.arrays, block_bytes
        self.num_bytes = len(self._start) + size + _CHECKSUM.size * len(writer.arrays)

    def identity(self) -> bytes:
        """Return what distinguishes this message from others: its numbers and names."""
        return self._start

    def is_same(self, other: "Encoded") -> bool:
        """Return whether both are the same message, sent twice: their heads are equal."""
        return self._start == other._start

    def forget_arrays(self) -> None:
        """Let go of the memory of the arrays: all blocks have been made, and will not be again."""
        self.arrays = []

    def __iter__(self) -> Iterator[Buffer]:
        """Yield blocks of at most `block_bytes`. Those of a large array are views of its memory."""
        if self.num_bytes <= self._block_bytes:
            arrays = [bytes(array) for array in self.arrays]
            yield b"".join((self._start, *arrays, *(_CHECKSUM.pack(checksum([array])) for array in arrays)))
            return
        pending = bytearray(self._start)
        checksums = bytearray()
        for array in self.arrays:
            if len(array) < SMALL_BYTES:
                small = bytes(array)
                checksums += _CHECKSUM.pack(checksum([small]))
                pending += small
                continue
            yield from self._blocks_of(pending)
            pending = bytearray()
            value = 0
            for start in range(0, len(array), self._block_bytes):
                block = array[start : start + self._block_bytes]
                value = checksum([block], value)
                yield block
            checksums += _CHECKSUM.pack(value)
        yield from self._blocks_of(pending + checksums)

    @property
    def placed_bytes(self) -> int:
        """The length of the memory that `place` needs."""
        return sum(aligned(len(array)) for array in self.arrays)

    def place(self, memory: np.ndarray) -> Iterator[bytes]:
        """Put the arrays into `memory`, and yield what is to be sent: the head, and checksums after their blocks."""
        pending, placed, at = bytearray(self._start), 0, 0
        for array in self.arrays:
            value = 0
            for start in range(0, len(array), PLACED_BYTES):
                block = array[start : start + PLACED_BYTES]
                value = checksum([block], value)
                memory[at + start : at + start + len(block)] = np.frombuffer(block, np.uint8)
                pending += _CHECKSUM.pack(value)
                placed += len(block)
                if placed >= PLACED_BYTES:
                    yield bytes(pending)
                    pending, placed = bytearray(), 0
            at += aligned(len(array))
        if pending:
            yield bytes(pending)

    def placed(self, checksums: bytes) -> bytes:
        """Return what is to be sent if the arrays are placed already, and these are the checksums of their blocks."""
        return self._start + checksums

    def _blocks_of(self, data: bytearray) -> Iterator[bytes]:
        for start in range(0, len(data), self._block_bytes):
            yield bytes(data[start : start + self._block_bytes])


def encode(message: messages.Message, *, block_bytes: int = BLOCK_BYTES) -> Encoded:
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


def declared_bytes(prefix: Buffer) -> int:
    """Return the length in bytes of the message that begins with `prefix`; raises EncodingError if it is invalid."""
    head_size, _, size, num_arrays = _declared(prefix)
    return PREFIX_BYTES + head_size + size + _CHECKSUM.size * num_arrays


def _declared(prefix: Buffer) -> tuple[int, int, int, int]:
    """Return the length and checksum of the head, and the length and number of the arrays."""
    if len(prefix) < PREFIX_BYTES:
        raise EncodingError(f"A message has at least {PREFIX_BYTES} bytes, got {len(prefix)}.")
    magic, head_size, head_checksum, size, num_arrays = _PREFIX.unpack_from(prefix)
    if magic != MAGIC:
        raise EncodingError(f"A message must begin with {MAGIC!r}, got {bytes(magic)!r}.")
    if not 0 < head_size <= MAX_HEAD_BYTES:
        raise EncodingError(f"The head of a message has 1 to {MAX_HEAD_BYTES} bytes, got {head_size}.")
    return head_size, head_checksum, size, num_arrays


def assemble(prefix: Buffer) -> Generator[memoryview, None, Any]:
    """Return the message that begins with `prefix`, once its other bytes have arrived.

    Yields one piece of memory after the other, at most BLOCK_BYTES each; the caller fills it completely and resumes.

    Raises:
      EncodingError: lengths, types, dtypes, shapes or checksums are not valid.
    """
    kind, message, arrays = yield from _assemble_head(prefix, None)
    if not arrays:
        return message
    if (size := sum(array.nbytes for array in arrays)) <= BLOCK_BYTES:
        yield from _assemble_together(arrays, size, kind)
        return message
    values = []
    for array in arrays:
        value = 0
        for block in _in_blocks(array.reshape(-1).view(np.uint8).data):
            yield block
            value = checksum([block], value)
        values.append(value)
        array.flags.writeable = False
    tail = memoryview(bytearray(_CHECKSUM.size * len(arrays)))
    yield from _in_blocks(tail)
    for place, value in enumerate(values):
        _compare(tail[_CHECKSUM.size * place :], value, place, kind)
    return message


def _assemble_together(arrays: list[np.ndarray], size: int, kind: str) -> Generator[memoryview, None, None]:
    """Fill arrays of `size` bytes in all from one piece of memory: one for each would cost more than the copy."""
    memory = memoryview(bytearray(size + _CHECKSUM.size * len(arrays)))
    yield from _in_blocks(memory)
    at = 0
    for place, array in enumerate(arrays):
        part = memory[at : at + array.nbytes]
        _compare(memory[size + _CHECKSUM.size * place :], checksum([part]), place, kind)
        array.reshape(-1).view(np.uint8).data[:] = part
        array.flags.writeable = False
        at += array.nbytes


def assemble_placed(prefix: Buffer, loan: lent_memory.Loan) -> Generator[memoryview, None, Any]:
    """Return the message that begins with `prefix` and whose arrays the sender puts into `loan`; see `assemble`."""
    kind, message, arrays = yield from _assemble_head(prefix, np.asarray(loan))
    expected, checksums = memoryview(bytearray(_CHECKSUM.size)), bytearray()
    for place, array in enumerate(arrays):
        value, data = 0, array.reshape(-1).view(np.uint8).data
        for start in range(0, len(data), PLACED_BYTES):
            yield expected
            value = checksum([data[start : start + PLACED_BYTES]], value)
            _compare(expected, value, place, kind)
            checksums += expected
    loan.sizes, loan.checksums = [array.nbytes for array in arrays], bytes(checksums)
    return message


def _assemble_head(
    prefix: Buffer, memory: np.ndarray | None
) -> Generator[memoryview, None, tuple[str, Any, list[np.ndarray]]]:
    head_size, head_checksum, size, num_arrays = _declared(prefix)
    head = bytearray(head_size)
    yield from _in_blocks(memoryview(head))
    kind, message, arrays = _read(head, head_checksum, size, memory)
    if len(arrays) != num_arrays:
        raise EncodingError(f"A {kind} message declares {num_arrays} arrays and has {len(arrays)}.")
    return kind, message, arrays


def _compare(expected: memoryview, value: int, place: int, kind: str) -> None:
    if _CHECKSUM.unpack_from(expected)[0] != value:
        raise EncodingError(f"Array {place} of a {kind} message is damaged: its checksum differs.")


def _in_blocks(memory: memoryview) -> Iterator[memoryview]:
    for start in range(0, len(memory), BLOCK_BYTES):
        yield memory[start : start + BLOCK_BYTES]


def _read(
    head: bytearray, head_checksum: int, size: int, memory: np.ndarray | None
) -> tuple[str, Any, list[np.ndarray]]:
    """Return the name of a message's type, the message, and its arrays, `size` bytes in all."""
    if zlib.crc32(head) != head_checksum:
        raise EncodingError("The head of a message is damaged: its checksum differs.")
    if head[0] >= len(KINDS):
        raise EncodingError(f"A message has the unknown number {head[0]}. It was sent by another version of jaxdist.")
    kind, reader = KINDS[head[0]], Decoder(bytes(head), size, memory)
    reader.take(1)
    message = codec(kind)[1](reader)
    if reader.head_left or reader.left:
        raise EncodingError(f"A {kind.__name__} message is shorter than its declared length.")
    return kind.__name__, message, reader.arrays


def decode(data: Buffer) -> Any:
    """Return the message in `data`: all the bytes that `encode` made.

    Raises:
      EncodingError: lengths, types, dtypes, shapes or checksums are not valid.
    """
    view, size = memoryview(data), declared_bytes(data)
    if len(view) != size:
        raise EncodingError(f"A message declares {size} bytes and has {len(view)}.")
    parts, at = assemble(view), PREFIX_BYTES
    try:
        while True:
            part = next(parts)
            part[:] = view[at : at + len(part)]
            at += len(part)
    except StopIteration as end:
        return end.value


def to_bytes(message: messages.Message) -> bytes:
    """Return `message` as one bytes object."""
    return b"".join(encode(message))
