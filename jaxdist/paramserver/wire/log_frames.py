"""The records of a log as bytes, each in a frame: a header with its length and checksums, then the record.

The checksum of a record continues that of the record before it. So a record that is missing, repeated or moved is
noticed like one whose bytes have changed. The header has a checksum of its own: only so can a record that was not
written to its end, as its process died, be told from a damaged one.
"""

import struct
import zlib

from jaxdist.paramserver.wire.codec import Buffer

_MAGIC = b"jxd3"
_FIELDS = struct.Struct("<4sII")
_HEADER = struct.Struct("<4sIII")


class DamagedLogError(ValueError):
    """A log is not as it was written; the message says where."""


class LogFrames:
    """The frames of one log, from its first record on.

    Attributes:
      size: the bytes of all frames until now.
    """

    def __init__(self) -> None:
        self.size = 0
        self._number, self._checksum = 0, 0

    def frame(self, record: Buffer) -> bytes:
        """Return the next frame of the log."""
        checksum = zlib.crc32(record, self._checksum)
        fields = _FIELDS.pack(_MAGIC, len(record), checksum)
        frame = b"".join((fields, zlib.crc32(fields).to_bytes(4, "little"), record))
        self._count(len(frame), checksum)
        return frame

    def read(self, data: Buffer) -> list[memoryview]:
        """Return the records of a whole log; an incomplete one at its end is left out, and `size` does not count it.

        Raises:
          DamagedLogError: anything else is wrong with it.
        """
        view, records = memoryview(data), []
        while self.size < len(view):
            rest = view[self.size :]
            record = self._first(rest)
            if record is None:
                # A file system may have made the file longer and not have written the bytes before a crash: zeros.
                if _is_incomplete(bytes(rest).rstrip(b"\0")):
                    break
                raise DamagedLogError(f"Record {self._number + 1}, at byte {self.size}, is not as it was written.")
            records.append(record)
            self._count(_HEADER.size + len(record), zlib.crc32(record, self._checksum))
        return records

    def _first(self, rest: memoryview) -> memoryview | None:
        """Return the record that `rest` begins with; None if it is incomplete or damaged."""
        size = _size_of(rest)
        record = None if size is None else rest[_HEADER.size : _HEADER.size + size]
        if record is None or len(record) != size:
            return None
        checksum = _HEADER.unpack(rest[: _HEADER.size])[2]
        return record if zlib.crc32(record, self._checksum) == checksum else None

    def _count(self, size: int, checksum: int) -> None:
        self.size += size
        self._number += 1
        self._checksum = checksum


def _size_of(rest: Buffer) -> int | None:
    """Return the length of a record from its header; None if that is not whole."""
    if len(rest) < _HEADER.size:
        return None
    magic, size, _, checksum = _HEADER.unpack(rest[: _HEADER.size])
    return size if magic == _MAGIC and zlib.crc32(rest[: _FIELDS.size]) == checksum else None


def _is_incomplete(rest: bytes) -> bool:
    """Return whether these bytes may be the beginning of a frame and no more."""
    if len(rest) < _HEADER.size:
        return rest[: len(_MAGIC)] == _MAGIC[: len(rest)]
    size = _size_of(rest)
    return size is not None and len(rest) < _HEADER.size + size
