"""Memory that a process lends to a peer on its machine: a large message is copied into it once, and read where it is.

Over a socket the kernel copies each byte twice, which takes three times as long. The sender writes the arrays of a
message into a *segment* and sends the rest through the connection; the arrays that the receiver makes are views of the
segment. When the last of them is gone, the receiver returns the segment, and the sender uses it again: new memory would
cost as much as a copy. Segments have no names, so the system frees them when both processes have ended, however.
"""

import contextlib
import fcntl
import mmap
import os
import socket
import struct
import threading
from collections.abc import Callable

import numpy as np

from jaxdist.paramserver.wire.codec import EncodingError

LEAST_BYTES = 1 << 20
"""Smaller messages go through the socket: the return of a segment costs more than copying them."""
MOST_SEGMENTS = 3
"""Segments of one connection; while the receiver has all of them, messages go through the socket."""
MAGIC = b"jxdm"
_NOTICE = struct.Struct("<4sIQQ")  # number and size of a segment, and the number of one that is no longer used


class Segment:
    """Memory of a sender. `descriptor` names it for the receiver until it is sent, and is -1 then.

    Raises:
      OSError: the system has no memory for it, or no more descriptors.
    """

    def __init__(self, number: int, size: int) -> None:
        self.number, self.size = number, size
        self.descriptor = os.memfd_create("jaxdist", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.posix_fallocate(self.descriptor, 0, size)
            fcntl.fcntl(self.descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)  # see Borrowed
            self.memory = np.frombuffer(mmap.mmap(self.descriptor, size), np.uint8)
        except OSError:
            self.close()
            raise

    def close(self) -> None:
        """Close the descriptor; the memory stays while an array refers to it."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


class Lender:
    """The segments of the sending end of a connection. `give_back` may be called from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._number = 0
        self._free: list[Segment] = []
        self._lent: dict[int, Segment] = {}

    def lend(self, size: int) -> tuple[Segment, bytes] | None:
        """Return a segment of at least this size, and what tells the receiver of it; None if none can be lent."""
        with self._lock:
            segment = next((each for each in self._free if size <= each.size <= 2 * size), None)
            unfit = self._free[0] if self._free and segment is None else None
            if segment is not None:
                self._free.remove(segment)
            else:
                segment = self._new(size) if unfit or len(self._lent) < MOST_SEGMENTS else None
            if segment is None:
                return None
            if unfit is not None:
                self._free.remove(unfit)
                unfit.close()
            self._lent[segment.number] = segment
            return segment, _NOTICE.pack(MAGIC, segment.number, segment.size, unfit.number if unfit else 0)

    def _new(self, size: int) -> Segment | None:
        self._number += 1
        with contextlib.suppress(OSError):
            return Segment(self._number, size)
        return None

    def give_back(self, number: int) -> None:
        """Take back a segment."""
        with self._lock:
            segment = self._lent.pop(number, None)
            if segment is not None:
                self._free.append(segment)

    def close(self) -> None:
        """Forget all segments: the connection has ended."""
        with self._lock:
            for segment in (*self._free, *self._lent.values()):
                segment.close()
            self._free, self._lent = [], {}


class _Loan:
    """What arrays in a segment refer to; the segment is returned when it is gone."""

    def __init__(self, mapping: mmap.mmap, give_back: Callable[[], None]) -> None:
        self._mapping, self._give_back = mapping, give_back
        self.__array_interface__ = np.frombuffer(mapping, np.uint8).__array_interface__

    def __del__(self) -> None:
        self._give_back()


class Borrowed:
    """The segments that the receiving end of a connection knows.

    Args:
      give_back: called with the number of a segment, from any thread, when no array refers to it any more.
    """

    def __init__(self, give_back: Callable[[int], None]) -> None:
        self._give_back = give_back
        self._mappings: dict[int, mmap.mmap] = {}
        self._arrived: list[int] = []  # descriptors without a notice yet

    def receive(self, connected: socket.socket, memory: memoryview) -> int:
        """Receive bytes and descriptors from a connection; return the number of bytes, 0 at its end."""
        room = socket.CMSG_LEN(MOST_SEGMENTS * struct.calcsize("i"))
        count, ancillary, _, _ = connected.recvmsg_into([memory], room, socket.MSG_CMSG_CLOEXEC)
        for level, kind, data in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                self._arrived += struct.unpack(f"{len(data) // 4}i", data[: len(data) // 4 * 4])
        return count

    def memory(self, notice: bytes) -> np.ndarray:
        """Return the memory of the segment that `notice` tells of, as bytes that cannot be written.

        Raises:
          EncodingError: the notice does not belong to a segment.
        """
        _, number, size, dropped = _NOTICE.unpack(notice)
        self._mappings.pop(dropped, None)
        if number not in self._mappings:
            self._mappings[number] = self._map(size)
        mapping = self._mappings[number]
        return np.asarray(_Loan(mapping, lambda: self._give_back(number)))

    def _map(self, size: int) -> mmap.mmap:
        if not self._arrived:
            raise EncodingError("A message is in a segment of memory that was not sent.")
        descriptor = self._arrived.pop(0)
        try:
            # If the memory could shrink, reading it could end this process.
            sealed = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK
            if not sealed or not 0 < size <= os.fstat(descriptor).st_size:
                raise EncodingError(f"A segment of memory is not one of {size} bytes.")
            return mmap.mmap(descriptor, size, access=mmap.ACCESS_READ)
        except OSError as error:
            raise EncodingError(f"A segment of memory cannot be used: {error.strerror}.") from error
        finally:
            os.close(descriptor)

    def close(self) -> None:
        """Forget all segments: the connection has ended."""
        self._mappings = {}
        while self._arrived:
            with contextlib.suppress(OSError):
                os.close(self._arrived.pop())
