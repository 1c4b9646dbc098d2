"""The cores of one of several like processes of a machine, each of which computes on cores of its own.

Otherwise the system moves their threads from core to core, since each waits for others often and for a short time.
"""

import contextlib
import os
import pathlib
from collections.abc import Sequence


def share(place: int, of: int, cores: Sequence[int]) -> Sequence[int]:
    """Return the cores of the process number `place` of `of`: all of them if they cannot be divided evenly."""
    if max(of, len(cores)) % min(of, len(cores)):
        return cores
    first = place * len(cores) // of
    return cores[first : first + max(len(cores) // of, 1)]


class OwnCores:
    """Keeps this process on its share of the cores that it may use, which begins when `keep` is called first."""

    def __init__(self, place: int, of: int) -> None:
        self._all = sorted(os.sched_getaffinity(0))
        self._own = share(place, of, self._all)
        self._kept: Sequence[int] = self._all

    def keep(self, *, own: bool) -> None:
        """Have all threads of this process, and those that they start, run on its own cores; otherwise on all."""
        wanted = self._own if own else self._all
        if wanted == self._kept:
            return
        self._kept = wanted
        for thread in pathlib.Path("/proc/self/task").iterdir():
            with contextlib.suppress(OSError):  # it has just ended, or the cores were taken from this process
                os.sched_setaffinity(int(thread.name), wanted)
