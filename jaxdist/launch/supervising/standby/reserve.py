"""The reserve: while an attempt runs, the processes of the next one are made ready, so that it begins at once.

Starting processes again takes seconds, most of them for tracing and loading the programs; with a reserve it takes a
word. Being ready costs as much as one start, in the background, and the memory of the processes. So the reserve of the
first attempt is made only once that has made steps for as long as it took to start, or for a few seconds: many jobs
are short. Failures come in groups, so that after one the reserve is made at once. The next attempt takes it even if
it is not ready yet: what it has done until then need not be done again.

If the number of processes is to change, the reserve is made for the new number, and the running attempt is asked to
end only when it is ready.
"""

import dataclasses
import os
import pathlib
import threading
import time
from collections.abc import Callable, Sequence

from jaxdist.errors import ExitStatus, say
from jaxdist.launch.supervising import local_job, roster
from jaxdist.launch.supervising.standby import standby_job

WANTED_NAME = "standby"
"""The file in the job's directory in memory by which process 0 says that a reserve is useful and may be made."""
CHANGE_SECONDS = 120.0
"""How long a change of the number of processes waits for the reserve."""
_LONG_SECONDS = 5.0
"""How long to wait at most before the reserve is made: the first attempt also compiles, which the next need not."""
_MOST_FAILURES = 3
_LOOK_SECONDS = 0.1
_MEMORY_SHARE = 1.5
"""The free memory that the reserve needs, in multiples of what the running processes take."""
_PAGE = os.sysconf("SC_PAGE_SIZE")

Make = Callable[[int, Sequence[local_job.Start]], standby_job.StandbyJob]


def is_due(*, number: int, now: float, started: float, wanted: float | None) -> bool:
    """Return whether to make a reserve: the attempt has made steps, the first for as long as it took to start.

    Times are by one clock: when attempt `number`, from 0, began, and when it was first seen to make steps, None if it
    was not.
    """
    return wanted is not None and (number > 0 or now - wanted >= min(wanted - started, _LONG_SECONDS))


@dataclasses.dataclass
class _Watched:
    """The running attempt: its number, its processes, when it began and when it was first seen to make steps.

    `change_since` is when it was first to end for a change of the number of processes, `asked` whether it was asked to.
    """

    number: int
    process_ids: Sequence[int]
    started: float
    wanted: float | None = None
    change_since: float | None = None
    asked: bool = False


class Reserve:
    """Keeps a job in reserve while an attempt runs; from `watch` to `take` of the next attempt.

    `make(number, starters)` starts the processes of attempt `number`, to wait; `ask` asks the running attempt to end at
    its next step. A `sparing` reserve is made only where there is memory for it.
    """

    def __init__(
        self,
        memory: pathlib.Path,
        taking_part: roster.Roster,
        make: Make,
        ask: Callable[[], object],
        *,
        sparing: bool = True,
    ):
        self._memory, self._roster, self._make, self._ask, self._sparing = memory, taking_part, make, ask, sparing
        self._lock = threading.RLock()
        self._over = threading.Event()
        self._watched: _Watched | None = None
        self._job: standby_job.StandbyJob | None = None
        self._slots: list[roster.Team | None] = []
        self._failures = 0
        # One thread for the whole job: a process can be ended by the kernel with the thread that started it.
        self._thread = threading.Thread(target=self._run, name="jaxdist-reserve", daemon=True)

    def __enter__(self) -> "Reserve":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self._drop()

    def watch(self, number: int, process_ids: Sequence[int]) -> None:
        """Make a reserve for the attempt after `number`, which has just begun."""
        with self._lock:
            self._watched = _Watched(number, process_ids, time.monotonic())

    def take(self, slots: Sequence[roster.Team | None]) -> standby_job.StandbyJob | None:
        """Return the job in reserve if it has processes of these slots; None, and end it, if not."""
        with self._lock:
            self._watched = None
            (self._memory / WANTED_NAME).unlink(missing_ok=True)
            job = self._job
            if job is None or self._slots != list(slots) or job.group.has_ended():
                self._drop()
                return None
            self._job = None
            return job

    def change(self) -> None:
        """Have the running attempt end because the number of processes changes, once a reserve is ready."""
        with self._lock:
            if self._watched is None or self._watched.wanted is None or self._failures >= _MOST_FAILURES:
                self._ask()
            elif self._watched.change_since is None:
                self._watched.change_since = time.monotonic()

    def _run(self) -> None:
        while not self._over.wait(_LOOK_SECONDS):
            with self._lock:
                if self._watched is not None:
                    self.look(self._watched)

    def look(self, watched: _Watched) -> None:
        """Make, replace or drop the reserve, as the running attempt needs it."""
        now = time.monotonic()
        if watched.wanted is None and (self._memory / WANTED_NAME).exists():
            watched.wanted = now
        changing = self._roster.is_due()
        if not changing:
            watched.change_since, watched.asked = None, False
        slots = self._roster.slots(self._roster.target()) if changing else self._roster.running()
        self._check(watched, slots)
        made_steps = is_due(number=watched.number, now=now, started=watched.started, wanted=watched.wanted)
        due = watched.change_since is not None or made_steps
        if self._job is None and due and slots and self._failures < _MOST_FAILURES and self._has_room(watched):
            self._start(watched.number + 1, slots)
        if watched.change_since is None or watched.asked:
            return
        late = now - watched.change_since >= CHANGE_SECONDS
        if self._roster.is_due() and (self._job is None or self._job.is_ready() or late):
            watched.asked = True
            self._ask()

    def _start(self, number: int, slots: list[roster.Team | None]) -> None:
        try:
            self._job, self._slots = self._make(number, self._roster.starters(slots)), slots
        except OSError as error:
            self._failed(f"{error.strerror or error}")

    def _check(self, watched: _Watched, slots: Sequence[roster.Team | None]) -> None:
        """Drop a reserve that has ended, or has other processes than the next attempt needs."""
        job = self._job
        if job is None:
            return
        ended = [process.returncode for process in job.group.processes if process.poll() is not None]
        if not ended and self._slots == list(slots):
            return
        self._drop()
        if ExitStatus.USER in ended and len(self._slots) != len(watched.process_ids):
            self._roster.judge(len(watched.process_ids), mistaken=False)
            self._roster.judge(len(self._slots), mistaken=True)
            say(f"This experiment cannot be trained by {len(self._slots)} processes.")
        elif ended:
            self._failed(f"a process ended with status {ended[0]}")

    def _failed(self, reason: str) -> None:
        self._failures += 1
        if self._failures == _MOST_FAILURES:
            say(f"No processes are kept in reserve any more: {reason}. A restart takes longer.")

    def _has_room(self, watched: _Watched) -> bool:
        return not self._sparing or has_room(watched.process_ids)

    def _drop(self) -> None:
        job, self._job = self._job, None
        if job is not None:
            job.group.close()


def has_room(process_ids: Sequence[int], *, root: pathlib.Path = pathlib.Path("/proc")) -> bool:
    """Return whether there is memory for as many processes as these again, by what the system says of them."""
    try:
        pages = [(root / str(process_id) / "statm").read_text().split() for process_id in process_ids]
        text = (root / "meminfo").read_text()
    except OSError:  # one has just ended
        return False
    taken = sum((int(resident) - int(shared)) * _PAGE for _, resident, shared, *_ in pages)
    free = next((int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("MemAvailable:")), 0)
    return free >= _MEMORY_SHARE * taken
