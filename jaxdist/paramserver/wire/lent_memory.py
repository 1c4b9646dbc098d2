"""Memory that a process lends to a peer on its machine: a large message is copied into it once, and read where it is.

Over a socket the kernel copies each byte twice, which takes three times as long. The sender writes the arrays of a
message into a *segment* and sends the rest through the connection; the arrays that the receiver makes are views of the
segment. When the last of them is gone, the receiver returns the segment, and the sender uses it again: new memory would
cost as much as a copy. Segments have no names, so the system frees them when both processes have ended, however.

A receiver that sends just these arrays on passes the segment on, with the checksums it came with, and copies nothing: a
primary does that with the pushes that its backup needs. It returns the segment when neither uses it any more.
"""

import contextlib
import fcntl
import mmap
import os
import socket
import struct
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxdist.paramserver.wire.codec import EncodingError, aligned

LEAST_BYTES = 1 << 20
"""Smaller messages go through the socket: the return of a segment costs more than copying them."""
MOST_SEGMENTS = 3
"""Segments of one connection; while the receiver has all of them, messages go through the socket."""
MAGIC = b"jxdm"
_NOTICE = struct.Struct("<4sIQQ")  # number and size of a segment, and the number of one that is no longer used


class Segment:
    """Memory of a sender. `descriptor` names it for the receiver until it is taken to be sent, and is -1 then.

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

    def take_descriptor(self) -> int:
        """Return the descriptor, which the caller closes; -1 if it has been taken before."""
        descriptor, self.descriptor = self.descriptor, -1
        return descriptor

    def close(self) -> None:
        """Close the descriptor; the memory stays while an array refers to it."""
        if self.descriptor >= 0:
            os.close(self.take_descriptor())


class Lender:
    """The segments of the sending end of a connection. `give_back` may be called from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._number = 0
        self._free: list[Segment] = []
        self._lent: dict[int, Segment] = {}
        self._known: dict[int, weakref.ref[_Mapped]] = {}  # segments of others that the receiver knows
        self._passed: dict[int, list[Loan]] = {}  # those that it has not returned

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

    def pass_on(self, loan: "Loan") -> tuple[int, bytes] | None:
        """Return a descriptor to be sent, -1 if it need not be, and what tells the receiver of a segment of another.

        The loan is held until the receiver returns it. The result is None if the system has no more descriptors.
        """
        with self._lock:
            number = next((each for each, mapped in self._known.items() if mapped() is loan.mapped), 0)
            descriptor = -1
            if not number:
                try:
                    descriptor = os.dup(loan.mapped.descriptor)
                except OSError:
                    return None
                self._number += 1
                number = self._number
                self._known[number] = weakref.ref(loan.mapped)
            gone = next((each for each, mapped in self._known.items() if mapped() is None), 0)
            self._known.pop(gone, None)
            self._passed.setdefault(number, []).append(loan)
            return descriptor, _NOTICE.pack(MAGIC, number, loan.mapped.size, gone)

    def give_back(self, number: int) -> None:
        """Take back a segment."""
        with self._lock:
            segment = self._lent.pop(number, None)
            if segment is not None:
                self._free.append(segment)
            loans = self._passed.get(number)
            loan = loans.pop() if loans else None
        del loan  # without the lock: it may return the segment to its owner

    def close(self) -> None:
        """Forget all segments: the connection has ended."""
        with self._lock:
            for segment in (*self._free, *self._lent.values()):
                segment.close()
            self._free, self._lent = [], {}
            passed, self._known, self._passed = self._passed, {}, {}
        del passed


class _Mapped:
    """A segment of a sender in the memory of this process."""

    def __init__(self, descriptor: int, size: int) -> None:
        self.descriptor, self.size = descriptor, size
        self.mapping = mmap.mmap(descriptor, size, access=mmap.ACCESS_READ)

    def __del__(self) -> None:
        os.close(self.descriptor)


class Loan:
    """What arrays in a segment refer to; the segment is returned when it is gone.

    `sizes` are the lengths of these arrays in bytes, and `checksums` what was sent for them, once all have arrived.
    """

    def __init__(self, mapped: _Mapped, give_back: Callable[[], None]) -> None:
        self.mapped, self._give_back = mapped, give_back
        self.__array_interface__ = np.frombuffer(mapped.mapping, np.uint8).__array_interface__
        self.sizes: list[int] = []
        self.checksums = b""

    def __del__(self) -> None:
        self._give_back()


def loan_of(arrays: Sequence[memoryview]) -> Loan | None:
    """Return the loan that these arrays are, all of them and in their order; None if they are not one."""
    owner: Any = next((array.obj for array in arrays if len(array)), None)
    while isinstance(owner, np.ndarray):
        owner = owner.base
    if not isinstance(owner, Loan) or owner.sizes != [len(array) for array in arrays]:
        return None
    at = owner.__array_interface__["data"][0]
    for array in arrays:
        if len(array) and np.frombuffer(array, np.uint8).__array_interface__["data"][0] != at:
            return None
        at += aligned(len(array))
    return owner


class Borrowed:
    """The segments that the receiving end of a connection knows.

    Args:
      give_back: called with the number of a segment, from any thread, when no array refers to it any more.
    """

    def __init__(self, give_back: Callable[[int], None]) -> None:
        self._give_back = give_back
        self._mapped: dict[int, _Mapped] = {}
        self._arrived: list[int] = []  # descriptors without a notice yet

    def receive(self, connected: socket.socket, memory: memoryview) -> int:
        """Receive bytes and descriptors from a connection; return the number of bytes, 0 at its end."""
        room = socket.CMSG_LEN(MOST_SEGMENTS * struct.calcsize("i"))
        count, ancillary, _, _ = connected.recvmsg_into([memory], room, socket.MSG_CMSG_CLOEXEC)
        for level, kind, data in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                self._arrived += struct.unpack(f"{len(data) // 4}i", data[: len(data) // 4 * 4])
        return count

    def loan(self, notice: bytes) -> Loan:
        """Return the loan of the segment that `notice` tells of; as an array, it is bytes that cannot be written.

        Raises:
          EncodingError: the notice does not belong to a segment.
        """
        _, number, size, dropped = _NOTICE.unpack(notice)
        self._mapped.pop(dropped, None)
        if number not in self._mapped:
            self._mapped[number] = self._map(size)
        return Loan(self._mapped[number], lambda: self._give_back(number))

    def _map(self, size: int) -> _Mapped:
        if not self._arrived:
            raise EncodingError("A message is in a segment of memory that was not sent.")
        descriptor = self._arrived.pop(0)
        try:
            # If the memory could shrink, reading it could end this process.
            sealed = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK
            if not sealed or not 0 < size <= os.fstat(descriptor).st_size:
                raise EncodingError(f"A segment of memory is not one of {size} bytes.")
            return _Mapped(os.dup(descriptor), size)
        except OSError as error:
            raise EncodingError(f"A segment of memory cannot be used: {error.strerror}.") from error
        finally:
            os.close(descriptor)

    def close(self) -> None:
        """Forget all segments: the connection has ended."""
        self._mapped = {}
        while self._arrived:
            with contextlib.suppress(OSError):
                os.close(self._arrived.pop())
