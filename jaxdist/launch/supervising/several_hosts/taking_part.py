"""Which hosts take part in the next attempt of a job: those that answer the one that decides.

That is the one with the lowest number at first, and for as long as it lives. It writes its decision into the run
directory while it holds the lock of that directory. So two parts of a job that cannot reach each other never both
train, and a host that was cut off waits until it is taken in.
"""

import contextlib
import dataclasses
import json
import pathlib
import time
from collections.abc import Callable, Mapping

from jaxdist.launch.supervising.several_hosts import neighbours
from jaxdist.rundir import files, lock

_FILE_NAME = "members.json"
_LOOK_SECONDS = 0.1


@dataclasses.dataclass(frozen=True)
class Members:
    """The hosts of an attempt.

    Attributes:
      term: number of the decision, each greater than the one before.
      hosts: host -> where its supervisor answers, in the order of their processes; the first one decides.
      coordinator: HOST:PORT where the processes meet.
    """

    term: int
    hosts: Mapping[int, str]
    coordinator: str

    def next_to(self, host: int) -> str | None:
        """Return where the supervisor of the next host answers, None if there is no other."""
        order = list(self.hosts)
        following = order[(order.index(host) + 1) % len(order)]
        return None if following == host else self.hosts[following]

    def others(self, host: int) -> list[str]:
        """Return where the supervisors of the other hosts answer."""
        return [address for number, address in self.hosts.items() if number != host]


def read(folder: pathlib.Path) -> Members | None:
    """Return the newest decision, None before the first."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        content = json.loads((folder / _FILE_NAME).read_text())
        hosts = {int(number): address for number, address in content["hosts"].items()}
        return Members(content["term"], hosts, content["coordinator"])
    return None


@dataclasses.dataclass
class Assembly:
    """One host's view of the hosts.

    Attributes:
      run_dir: of the job, on a file system that all hosts share.
      host: number of this one.
      count: how many hosts the job was started on.
      address: where this host's supervisor answers.
      key: the secret of the job.
      coordinator: returns the HOST:PORT at which processes meet on this host.
      stack: keeps the lock of the run directory once this host decides.
      members: of the present attempt, None before the first.
      decides: whether this host does.
    """

    run_dir: pathlib.Path
    host: int
    count: int
    address: str
    key: bytes
    coordinator: Callable[[], str]
    stack: contextlib.ExitStack
    members: Members | None = None
    decides: bool = False

    def begin(self) -> None:
        """Take the lock of the run directory on host 0, unless another host has come to decide.

        Raises:
          LockedError: another job works there.
        """
        if self.host:
            return
        found = read(self.folder)
        first = None if found is None else next(iter(found.hosts.items()))
        if first is None or first[0] == 0 or neighbours.ask(first[1], self.key, {}) is None:
            self._take_lock()

    @property
    def folder(self) -> pathlib.Path:
        """The folder in which the hosts find each other."""
        return self.run_dir / neighbours.FOLDER_NAME

    def reachable(self) -> dict[int, str] | None:
        """Return the hosts that answer, this one included; None while processes of one of them still train."""
        found = {self.host: self.address}
        running = False
        for number, address in sorted(neighbours.announced(self.folder).items()):
            reply = None if number == self.host else neighbours.ask(address, self.key, {"ended": self.term})
            if reply is not None:
                found[number] = address
                running = running or reply["running"]
        return None if running else dict(sorted(found.items()))

    @property
    def term(self) -> int:
        """The term of the present attempt, 0 before the first."""
        return self.members.term if self.members else 0

    def next(self, *, patience_seconds: float, first_seconds: float, stopped: Callable[[], bool]) -> Members | None:
        """Wait for the hosts of the next attempt and return them; None if stopped, or if not all came to the first.

        All hosts are waited for before the first attempt, for `first_seconds`; later those of the attempt before that
        do not answer, for `patience_seconds`.
        """
        began = time.monotonic()
        needed = len(self.members.hosts) if self.members else self.count
        limit = patience_seconds if self.members else first_seconds
        while not stopped():
            found, late = self.reachable(), time.monotonic() - began >= limit
            if found is not None and self._may_decide(found):
                if len(found) >= needed or (late and self.members):
                    return self._decide(found)
                if late:
                    return None
            elif followed := self._followed():
                return followed
            time.sleep(_LOOK_SECONDS)
        return None

    def newcomers(self) -> bool:
        """Return whether hosts answer that do not take part."""
        theirs = neighbours.announced(self.folder)
        taking_part = self.members.hosts if self.members else {}
        return any(
            taking_part.get(number) != address and neighbours.ask(address, self.key, {}) is not None
            for number, address in theirs.items()
        )

    def _may_decide(self, found: Mapping[int, str]) -> bool:
        """Return whether this host decides: it did so before, or it is the first of those that are left."""
        known = self.members is not None or len(found) == self.count
        if not self.decides and known and min(found) == self.host:
            with contextlib.suppress(lock.LockedError):
                self._take_lock()
        return self.decides

    def _take_lock(self) -> None:
        self.stack.enter_context(lock.locked(self.run_dir, purpose=f"a job on {self.count} hosts, host {self.host}"))
        self.decides = True

    def _decide(self, hosts: Mapping[int, str]) -> Members:
        before = read(self.folder)
        order = {self.host: self.address} | dict(hosts)
        made = Members(1 + (before.term if before else 0), order, self.coordinator())
        files.write_text(self.folder / _FILE_NAME, json.dumps(dataclasses.asdict(made)))
        self.members = made
        return made

    def _followed(self) -> Members | None:
        """Return a new decision that counts on this host as it is now, by a host that still is as it was."""
        found = read(self.folder)
        if found is None or found.term == self.term or found.hosts.get(self.host) != self.address:
            return None
        first, address = next(iter(found.hosts.items()))
        if first == self.host or neighbours.announced(self.folder).get(first) != address:
            return None
        self.members = found
        return found
