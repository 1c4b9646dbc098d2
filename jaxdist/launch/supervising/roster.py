"""Who takes part in a job: the supervisor's own processes and those that have joined, and how many of them can be used.

Some numbers of processes do not suit an experiment: the batch may not be divisible by the number of devices. That is
learnt by trying: an attempt on a new number that ends as the user's mistake marks the number as unsuitable, and the job
continues on the largest number that suits. The others are spare until their number suits, or others leave.
"""

import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import IO, Protocol

from jaxdist.errors import UserError
from jaxdist.launch.supervising import local_job


class Team(Protocol):
    """A group of processes that joined together."""

    @property
    def num_processes(self) -> int:
        """How many it offers; 0 once it leaves or is lost."""

    @property
    def lost(self) -> bool:
        """Whether it ended without leaving."""

    def offer(self, num_processes: int) -> None:
        """Lower the number of processes that it offers."""

    def start(
        self, command: Sequence[str], environment: Mapping[str, str], output: IO[bytes] | None
    ) -> local_job.Process:
        """Start one of them."""


def usable(available: int, unsuitable: Collection[int]) -> int:
    """Return the largest number of processes up to `available` that is not known to be unsuitable, 0 for none."""
    return next((count for count in range(available, 0, -1) if count not in unsuitable), 0)


class Roster:
    """The processes of a job, in order: the supervisor's own first, then those of each member.

    `own` is the number of the supervisor's own, which `start` starts. `on_due` is called, by any thread, when the
    running attempt should end at its next step, so that the number of its processes can change.
    """

    def __init__(self, own: int, start: local_job.Start, on_due: Callable[[], object] = lambda: None):
        self._own, self._start, self._on_due = own, start, on_due
        self._members: list[Team] = []
        self._lock = threading.RLock()
        self._unsuitable: set[int] = set()
        self._suitable: set[int] = set()
        self._most: int | None = None
        self._wanted = own
        self._running: list[Team | None] = []

    def available(self) -> int:
        """Return how many processes could be started."""
        with self._lock:
            return self._own + sum(member.num_processes for member in self._members)

    def target(self) -> int:
        """Return how many processes the job should have, 0 if no number suits it."""
        with self._lock:
            available = self.available()
            return usable(available if self._most is None else min(available, self._most), self._unsuitable)

    def begin(self, num_processes: int) -> list[local_job.Start]:
        """Note that an attempt begins on so many processes, and return what starts each of them.

        Fewer than were wanted at the end of the attempt before are a limit until the next change: the job keeps failing
        on more.
        """
        with self._lock:
            self._members = [member for member in self._members if member.num_processes]
            if num_processes < self._wanted:
                self._most = num_processes
            self._running = self.slots(num_processes)
            starters = self.starters(self._running)
        self._tell()
        return starters

    def slots(self, num_processes: int) -> list[Team | None]:
        """Return whose processes would be the first `num_processes`, in order: None for the supervisor's own."""
        with self._lock:
            slots: list[Team | None] = [None] * self._own
            slots += [member for member in self._members for _ in range(member.num_processes)]
            return slots[:num_processes]

    def starters(self, slots: Sequence[Team | None]) -> list[local_job.Start]:
        """Return what starts the process of each slot."""
        return [self._start if member is None else member.start for member in slots]

    def running(self) -> list[Team | None]:
        """Return the slots of the running attempt, none between two."""
        with self._lock:
            return list(self._running)

    def end(self) -> int:
        """Note that the attempt has ended; return how many processes the job should have now."""
        with self._lock:
            self._running, self._wanted = [], self.target()
            return self._wanted

    def is_due(self) -> bool:
        """Return whether the running attempt should end, because other processes should take part."""
        with self._lock:
            return bool(self._running) and (self.target() != len(self._running) or not self._all_present())

    def _all_present(self) -> bool:
        taking_part = {id(member): member for member in self._running if member is not None}
        return all(
            member.num_processes >= sum(each is member for each in self._running) for member in taking_part.values()
        ) and self._own >= sum(each is None for each in self._running)

    def judge(self, num_processes: int, *, mistaken: bool) -> None:
        """Note whether an attempt on so many processes ended as the user's mistake: the number may be unsuitable."""
        with self._lock:
            if not mistaken:
                self._suitable.add(num_processes)
            elif self._suitable and num_processes not in self._suitable:
                self._unsuitable.add(num_processes)

    def add(self, member: Team) -> None:
        """Take a member in."""
        with self._lock:
            self._members.append(member)
        self.changed()

    def changed(self) -> None:
        """Have the job take note of a member that came, leaves or is lost."""
        with self._lock:
            self._most = None
        self._tell()

    def _tell(self) -> None:
        if self.is_due():
            self._on_due()

    def lower(self, count: int) -> None:
        """Take `count` processes out: those of the newest members first, the supervisor's own last.

        Raises:
          UserError: none would be left.
        """
        with self._lock:
            available = self.available()
            if not 0 < count < available:
                raise UserError(
                    f"A job keeps at least one process; this one has {available}, so {count} cannot leave. "
                    "To end all of them, end the job."
                )
            for member in reversed(self._members):
                taken = min(count, member.num_processes)
                member.offer(member.num_processes - taken)
                count -= taken
            self._own -= count
        self.changed()

    def lost(self) -> int:
        """Return how many processes of the running attempt belong to members that were lost."""
        with self._lock:
            return sum(member is not None and member.lost for member in self._running)
