"""The history of a process for the picture of a run: what happened when, in a file of limited size.

The time since the start is divided into at most MOST_BINS equal bins; when it has become longer, each two are joined.
The last leases are kept one by one. So the file is as small after a million steps as after a thousand. `reporting.
server_timeline` draws it.
"""

import collections
import pathlib
import time
from collections.abc import Callable
from typing import Any

from jaxdist.paramserver.processes.process_world import try_report
from jaxdist.paramserver.processes.run_folder import HISTORY_NAME, Spec
from jaxdist.paramserver.protocol import effects, journal, messages
from jaxdist.paramserver.protocol.settings import SCHEDULER, server_shard
from jaxdist.run.use.reporting import server_timeline

MOST_BINS = 240
MOST_LEASES, MOST_EVENTS = 200, 400
_FIRST_WIDTH = 0.05
_WRITE_SECONDS = 1.0
_SHARE_OF_WRITING = 0.01

_LEASE_PHASES = ("pulling", "computing", "pushing")

Clock = Callable[[], float]


class Bins:
    """Sums over equal bins of time, from `began` on; the bins grow with the time."""

    def __init__(self, began: float, width: float = _FIRST_WIDTH, series: dict[str, list[float]] | None = None) -> None:
        self.began, self.width = began, width
        self.series: dict[str, list[float]] = series or {}

    def add(self, name: str, at: float, value: float = 1.0) -> None:
        """Add `value` to the bin of time `at`."""
        number = self._bin(at)
        row = self._row(name, number)
        row[number] += value

    def add_span(self, name: str, since: float, until: float) -> None:
        """Add the seconds from `since` to `until` to the bins that they are in."""
        since = max(since, self.began)
        last = self._bin(until)
        for number in range(self._bin(since), last + 1):
            first = self.began + number * self.width
            part = min(until, first + self.width) - max(since, first)
            if part > 0:
                self._row(name, number)[number] += part

    def _bin(self, at: float) -> int:
        while at - self.began >= MOST_BINS * self.width:
            self._widen()
        return max(int((at - self.began) / self.width), 0)

    def _row(self, name: str, number: int) -> list[float]:
        row = self.series.setdefault(name, [])
        row.extend([0.0] * (number + 1 - len(row)))
        return row

    def _widen(self) -> None:
        self.width *= 2
        for name, row in self.series.items():
            self.series[name] = [sum(row[first : first + 2]) for first in range(0, len(row), 2)]

    def to_json(self) -> dict[str, Any]:
        """Return the bins as JSON."""
        series = {name: [round(value, 4) for value in row] for name, row in self.series.items()}
        return {"began": self.began, "width": self.width, "series": series}


class History:
    """The history of one process, continued from its file by a process that is restarted.

    The clock counts seconds since 1970, the same for all processes of a machine (see `Spec.make_clock`).
    """

    def __init__(self, name: str, directory: pathlib.Path, clock: Clock) -> None:
        self.path = directory / HISTORY_NAME / f"{name.replace('/', '-')}.json"
        found = server_timeline.read_one(self.path) or {}
        self.continues = bool(found)
        behind = max(found.get("written", 0.0) - clock(), 0.0)  # of an attempt before the machine's clock was set back
        self.clock: Clock = lambda: clock() + behind
        self.bins = Bins(**found["bins"]) if found else Bins(self.clock())
        self.leases = collections.deque[list[Any]](found.get("leases", ()), MOST_LEASES)
        self.lost = collections.deque[list[Any]](found.get("lost", ()), MOST_LEASES)
        self.events: list[list[Any]] = found.get("events", [])
        self.omitted = found.get("omitted", 0)
        self._write_at = 0.0

    def note(self, kind: str, text: str) -> None:
        """Add an event; of more than MOST_EVENTS only the number is kept."""
        if len(self.events) < MOST_EVENTS:
            self.events.append([self.clock(), kind, text])
        else:
            self.omitted += 1
        self._write_at = 0.0  # events are rare, and what causes them may kill this process next

    def look(self, *, now: bool = False) -> None:
        """Write the file if it is time; writing takes at most a hundredth of the time."""
        began = time.monotonic()
        if not now and began < self._write_at:
            return
        content = {
            "bins": self.bins.to_json(),
            "leases": list(self.leases),
            "lost": list(self.lost),
            "events": self.events,
            "omitted": self.omitted,
            "written": self.clock(),
        }
        try_report(self.path, content)
        after = time.monotonic()
        self._write_at = after + max(_WRITE_SECONDS, (after - began) / _SHARE_OF_WRITING)


class Watched:
    """A state machine whose history is recorded: `watch` looks at what it hears, says and does."""

    def __init__(self, machine: Any, watch: "SchedulerWatch | ServerWatch | WorkerWatch") -> None:
        self.machine, self._watch = machine, watch

    def handle(self, message: messages.Message, now: float) -> tuple[list[effects.Send], list[effects.Effect]]:
        """Handle one message; return what to send after the effects are done."""
        replies, todo = self.machine.handle(message, now)
        self._watch.look(message, replies, todo)
        if isinstance(message, messages.Tick) or any(isinstance(each, effects.Exit) for each in todo):
            self._watch.history.look(now=not isinstance(message, messages.Tick))
        return replies, todo


def watched(name: str, machine: Any, spec: Spec) -> Watched:
    """Return the state machine of the process `name` with its history recorded in the folder of the run."""
    history = History(name, pathlib.Path(spec.directory), spec.make_clock())
    if name == SCHEDULER:
        return Watched(machine, SchedulerWatch(history, machine.state.membership))
    return Watched(machine, WorkerWatch(history, machine) if server_shard(name) is None else ServerWatch(history))


class SchedulerWatch:
    """Records who held which lease, the steps, and each change of the membership."""

    def __init__(self, history: History, membership: messages.Membership | None) -> None:
        self.history, self._membership = history, membership
        self._open: dict[int, list[Any]] = {}  # worker -> [sequence, step, slice, since]
        self._cut_since = 0.0
        if history.continues:
            history.note("restart", "scheduler restarted")

    def look(self, message: messages.Message, replies: list[effects.Send], todo: list[effects.Effect]) -> None:
        """Record what followed from `message`."""
        if isinstance(message, messages.Done):
            self._close(message.worker, message.sequence, "done")
        elif isinstance(message, messages.Ask):
            self._close(message.worker, message.sequence, "returned")
        for effect in todo:
            self._note(effect)
        for _, reply in replies:
            if isinstance(reply, messages.Grant):
                self._grant(reply)
            elif isinstance(reply, messages.Offer):
                self._cut_since = self._cut_since or self.history.clock()

    def _grant(self, grant: messages.Grant) -> None:
        held = self._open.get(grant.worker)
        if held is not None and held[0] == grant.sequence:
            self.history.bins.add("again", self.history.clock())
        else:
            self._open[grant.worker] = [grant.sequence, grant.lease.step, grant.lease.slice, self.history.clock()]

    def _close(self, worker: int, sequence: int, how: str) -> None:
        held = self._open.get(worker)
        if held is None or held[0] > sequence:
            return
        del self._open[worker]
        _, step, slice_, since = held
        now = self.history.clock()
        (self.history.lost if how == "lost" else self.history.leases).append([worker, step, slice_, since, now, how])
        self.history.bins.add_span(f"worker/{worker}", since, now)

    def _note(self, effect: effects.Effect) -> None:
        now = self.history.clock()
        if isinstance(effect, effects.Committed):
            self.history.bins.add("steps", now)
            if self._cut_since:
                self.history.bins.add_span("cut", self._cut_since, now)
                self._cut_since = 0.0
        elif isinstance(effect, effects.Append) and isinstance(effect.record, journal.MembershipRecord):
            self._compare(effect.record.membership)
        elif isinstance(effect, effects.Append) and isinstance(effect.record, journal.StopRecord):
            self.history.note("end", effect.record.reason)

    def _compare(self, after: messages.Membership) -> None:
        before, self._membership = self._membership, after
        old = {m.worker: m.incarnation for m in before.members} if before else {}
        new = {m.worker: m.incarnation for m in after.members}
        for worker in sorted(old.keys() | new.keys()):
            if old.get(worker) == new.get(worker):
                continue
            if worker in old:
                self._close(worker, 1 << 62, "lost")
            if worker not in new:
                self.history.note("leave", f"worker {worker} left")
            else:
                again = "restarted" if worker in old else "joined"
                self.history.note("restart" if worker in old else "join", f"worker {worker} {again}")
        if before is None:
            return
        if after.restore_term != before.restore_term:
            self.history.note("rollback", "returned to the last saved cut")
        for number, (was, place) in enumerate(zip(before.shards, after.shards)):
            if place.primary != was.primary:
                self.history.note("failover", f"shard {number}: {place.primary} took over")
            elif was.backup and not place.backup:
                self.history.note("failover", f"shard {number}: {was.backup} lost")
            elif place.synced and not was.synced:
                self.history.note("join", f"shard {number}: {place.backup} holds a copy")


class ServerWatch:
    """Records the staleness of updates and the pushes that arrived again."""

    def __init__(self, history: History) -> None:
        self.history = history

    def look(self, message: messages.Message, replies: list[effects.Send], todo: list[effects.Effect]) -> None:
        """Record what followed from `message`."""
        for effect in todo:
            if isinstance(effect, effects.Applied):
                now = self.history.clock()
                self.history.bins.add("updates", now)
                self.history.bins.add("staleness", now, effect.staleness)


class WorkerWatch:
    """Records in which phase a worker was, and the requests that it sent again."""

    def __init__(self, history: History, machine: Any) -> None:
        self.history, self._machine = history, machine
        self._phase, self._since = machine.phase, history.clock()
        self._lease: tuple[int, int] | None = None
        self._marks = [0.0, 0.0, 0.0]
        self._sent: set[tuple[type, int, int]] = set()

    def look(self, message: messages.Message, replies: list[effects.Send], todo: list[effects.Effect]) -> None:
        """Record what followed from `message`."""
        phase = self._machine.phase
        if phase != self._phase:
            self._enter(phase)
        for _, reply in replies:
            if isinstance(reply, (messages.Pull, messages.Push, messages.Done)):
                # Done is sent with the pushes, and another time if this worker says itself that they are staged.
                which = reply.staged if isinstance(reply, messages.Done) else reply.shard
                key = (type(reply), which, reply.sequence)
                if key in self._sent:
                    self.history.bins.add("again", self.history.clock())
                self._sent.add(key)

    def _enter(self, phase: str) -> None:
        now = self.history.clock()
        self.history.bins.add_span(self._phase, self._since, now)
        if self._phase in _LEASE_PHASES:
            self._marks[_LEASE_PHASES.index(self._phase)] = now - self._since
        if self._phase in _LEASE_PHASES and phase not in _LEASE_PHASES and self._lease is not None:
            self.history.leases.append([self._machine.worker, *self._lease, now - sum(self._marks), *self._marks])
        if phase in _LEASE_PHASES and self._phase not in _LEASE_PHASES:
            lease = self._machine.lease
            self._lease, self._marks = (lease.step, lease.slice), [0.0, 0.0, 0.0]
            self._sent = {key for key in self._sent if key[2] >= self._machine.sequence}
        self._phase, self._since = phase, now
