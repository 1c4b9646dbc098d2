"""Delivers the strikes of a plan to a running job, which is observed only from outside."""

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol, TypeVar

from jaxdist.launch.supervising.chaos import chaos_changes, strikes

Found = TypeVar("Found")

_POLL_SECONDS = 0.005


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

    def held(self) -> contextlib.AbstractContextManager[None]:
        """Return a context in which the job makes no step, if it would not wait by itself for processes that join."""

    def is_ready(self, num_processes: int) -> bool:
        """Return whether so many processes have started, if the job does not wait for them by itself."""


class Striker:
    """The thread that delivers strikes, one after the other.

    Args:
      job: the job under fire.
      planned: the strikes in order; the next is due once the job has recovered from the one before.
      commands: change the number of processes.
      size: number of processes at the start, of those that may join and leave.

    Attributes:
      hits: the strikes on single processes that the job recovered from.
    """

    def __init__(
        self, job: JobUnderFire, planned: Sequence[strikes.Strike], commands: chaos_changes.Commands, *, size: int
    ):
        self.hits: list[strikes.Hit] = []
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
        with self._job.held():
            self._commands.change(abs(num_processes - self._size), joins=strike.kind == "join")
            if strike.kind == "join":
                self._await(lambda: self._job.is_ready(num_processes) or None)
        self._size = num_processes
        self._await(lambda: self._job.has_size(num_processes) or None)
