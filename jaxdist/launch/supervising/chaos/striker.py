"""Delivers the strikes of a plan to a running job, which is observed only from outside."""

import contextlib
import functools
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import NamedTuple, Protocol, TypeVar

from jaxdist.launch.supervising.chaos import chaos_changes, strikes

Found = TypeVar("Found")

_POLL_SECONDS = 0.005
HOLD_SECONDS = 600.0
"""How long a job is held at most for a change, which may be impossible."""


class Target(NamedTuple):
    """The process that a strike is for, now that its moment has come.

    Attributes:
      process_id: of the process.
      follow: called once it is struck; yields None until the job has recovered, then the Hit.
    """

    process_id: int
    follow: Callable[[], Iterator[strikes.Hit | None]]


class JobUnderFire(Protocol):
    """The job under fire."""

    def target(self, strike: strikes.Strike) -> Target | None:
        """Return the process to strike; None while the moment of `strike` has not come."""

    def has_size(self, num_processes: int) -> bool:
        """Return whether the job makes steps on so many processes."""

    def hold(self, num_processes: int) -> Generator[bool, None, None]:
        """Hold the job, which might end before the change, until closed; yield whether it is about to have this size.

        From then on it need not be held.
        """


class Striker:
    """The thread that delivers strikes, one after the other.

    Of the `planned` strikes, in order, the next is due once the job has recovered from the one before. `size` is the
    number of processes at the start, of those that may join and leave.

    Attributes:
      hits: the strikes on single processes that the job recovered from.
      changes: how many joins and leaves took effect.
    """

    def __init__(
        self, job: JobUnderFire, planned: Sequence[strikes.Strike], commands: chaos_changes.Commands, *, size: int
    ):
        self.hits: list[strikes.Hit] = []
        self.changes = 0
        self._job, self._planned, self._commands, self._size = job, planned, commands, size
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="jaxdist-chaos", daemon=True)

    def __enter__(self) -> "Striker":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        for strike in self._planned:
            target = self._await(functools.partial(self._job.target, strike))
            if target is None:
                return
            if strike.num_processes is not None:
                self._change(strike, strike.num_processes)
            elif strikes.deliver(strike, target.process_id):
                hit = self._await(functools.partial(next, target.follow()))
                self.hits += [hit] if hit else []

    def _await(self, look: Callable[[], Found | None]) -> Found | None:
        """Return what `look` finds; None if the job ends before."""
        while not self._over.wait(_POLL_SECONDS):
            found = look()
            if found is not None:
                return found
        return None

    def _change(self, strike: strikes.Strike, num_processes: int) -> None:
        """Have processes join or leave, and wait until the job makes steps on the new number, or ends."""
        with contextlib.closing(self._job.hold(num_processes)) as holding:
            next(holding)
            is_told = self._commands.change(abs(num_processes - self._size), joins=strike.kind == "join")
            end = time.monotonic() + HOLD_SECONDS
            self._await(lambda: (next(holding) and is_told()) or time.monotonic() >= end or None)
        self._size = num_processes
        self.changes += bool(self._await(lambda: self._job.has_size(num_processes) or None))
