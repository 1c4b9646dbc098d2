"""The crew of a run that others may join: its own processes, and those of the commands that were admitted.

When a machine of `ps.hosts` is lost and does not come back, its processes are started on the machines that are left.
"""

import contextlib
import time
from collections.abc import Callable, Sequence

from jaxdist.errors import say
from jaxdist.paramserver.processes import admission, peer_addresses
from jaxdist.paramserver.processes.crew import Crew, LocalCrew
from jaxdist.paramserver.protocol.settings import worker_number

LOST_AFTER = 2.0
"""How many times `dead_after_seconds` a machine may be away before its processes are placed elsewhere."""


class OpenCrew:
    """See `crew.Crew`.

    `crew` has the processes of this machine, or of a cluster; `door` admits the others. A machine may be away for
    `lost_after_seconds` before its processes are placed elsewhere.
    """

    def __init__(
        self,
        crew: Crew,
        door: admission.Admission,
        *,
        lost_after_seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._crew, self._door, self._lost_after, self._clock = crew, door, lost_after_seconds, clock
        self._away: dict[str, tuple[float, list[str]]] = {}  # host -> since when, and its processes
        self._note_own()

    def _note_own(self) -> None:
        self._door.own = [name for name in self.names if worker_number(name) is not None]

    @property
    def names(self) -> list[str]:
        """The processes of the crew itself."""
        return self._crew.names

    @property
    def restarts(self) -> int:
        """How many times processes were restarted."""
        return self._crew.restarts

    def start(self) -> None:
        """Start all processes, and admit commands."""
        self._crew.start()
        self._door.open()

    def look_after(self) -> dict[str, int]:
        """See Crew; of commands that joined, the processes that died are told as well."""
        died = self._crew.look_after()
        self._door.tell_missed()
        for note in self._door.deaths():
            died[note.name] = max(note.boot, died.get(note.name, 0))
        if count := self._door.leaves():
            self.retire(self._door.own[-count:])
        left = self._crew.take_left()
        self._note_own()
        if left and not self._door.own and not self._door.guests:
            say("No worker is left. The run waits until one joins: jaxdist join RUN_DIR.")
        self._look_for_lost_machines()
        return died

    def retire(self, names: Sequence[str]) -> None:
        """See Crew."""
        self._crew.retire(names)

    def take_left(self) -> list[str]:
        """See Crew."""
        return self._crew.take_left()

    def progressed(self) -> None:
        """Note that the run made progress."""
        self._crew.progressed()

    def close(self, *, orderly: bool) -> None:
        """End all processes, and tell the commands that the run is over."""
        self._door.close()
        self._crew.close(orderly=orderly)

    # Machines that are lost.

    def _look_for_lost_machines(self) -> None:
        for guest in self._door.lost_hosts():
            self._away[guest.host] = (self._clock(), list(guest.names))
            say(f"The machine {guest.host} does not answer. It has {self._lost_after:.0f} s to come back.")
        there = {guest.host for guest in self._door.guests}
        for host, (since, names) in list(self._away.items()):
            if host in there:
                del self._away[host]
            elif self._clock() - since >= self._lost_after:
                del self._away[host]
                self._place(host, names)

    def _place(self, host: str, names: Sequence[str]) -> None:
        """Start the processes of a lost machine on the others, in turn."""
        if not isinstance(self._crew, LocalCrew):
            return
        homes: list[admission.Guest | None] = [None, *(guest for guest in self._door.guests if guest.host)]
        for number, name in enumerate(names):
            home = homes[number % len(homes)]
            if home is None:
                self._door.move(name, peer_addresses.free_addresses(self._door.own_host(), 1)[0])
                self._crew.add(name)
            else:
                with contextlib.suppress(OSError):  # it is lost, too, which is noticed next
                    home.names.append(name)
                    home.line.say(place=[name])
        say(f"The machine {host} is lost. Its processes run on the others from now on: {', '.join(names)}.")
