"""The `changes` of a parameter-server run: when workers joined, left or restarted, and the seconds that it cost."""

import collections
import statistics
from collections.abc import Collection, Mapping, Sequence
from typing import Any

_MOST_STEPS = 50


def _count(workers: Collection[int]) -> str:
    return "1 worker takes part" if len(workers) == 1 else f"{len(workers)} workers take part"


class WorkerChanges:
    """Collects the changes as run.json has them.

    `earlier` are those of the attempts before. The first start of the `num_workers` of the configuration is no change;
    `num_others` processes are no workers.
    """

    def __init__(self, earlier: Sequence[Mapping[str, Any]], *, num_workers: int, num_others: int) -> None:
        self.rows: list[dict[str, Any]] = [dict(row) for row in earlier]
        self._seen, self._num_others = set(range(num_workers)), num_others
        self._members: dict[int, int] = {}
        self._gone: dict[int, dict[str, Any]] = {}
        self._returning: set[int] = set()
        self._waiting: list[tuple[dict[str, Any], float]] = []
        self._stepped_at: float | None = None
        self._usual: collections.deque[float] = collections.deque(maxlen=_MOST_STEPS)

    def note_members(self, workers: Mapping[int, int], step: int, at: float, *, returned: bool = False) -> list[str]:
        """Note who takes part from `at` on, after `step`; return what a user is told.

        When the shards have `returned` to a saved cut, all workers join again: one restart, of the lost server.
        """
        before, self._members = self._members, dict(workers)
        if returned:
            self._returning |= set(before)
            processes = self._num_others + len(before)
            self.rows.append({"kind": "restart", "step": step, "processes": processes, "seconds_lost": None})
            self._wait_for_step(self.rows[-1], at)
            return []
        told = []
        for worker in sorted({*before, *workers}):
            kind = self._kind(worker, before.get(worker), workers.get(worker))
            if kind == "return":
                row = self._gone.pop(worker)
                row |= {"kind": "restart", "processes": self._num_others + len(workers)}
            elif kind:
                row = {"kind": kind, "step": step, "processes": self._num_others + len(workers), "seconds_lost": None}
                self.rows.append(row)
                if kind == "leave":
                    self._gone[worker] = row
                    told.append(f"Worker {worker} is gone after step {step}; {_count(workers)}.")
                elif kind == "join":
                    told.append(f"Worker {worker} joins after step {step}; {_count(workers)}.")
            else:
                continue
            self._wait_for_step(row, at)
        return told

    def _wait_for_step(self, row: dict[str, Any], at: float) -> None:
        self._waiting.append((row, at if self._stepped_at is None else self._stepped_at))

    def _kind(self, worker: int, before: int | None, after: int | None) -> str:
        if before == after:
            return ""
        if worker in self._returning and before is None:
            self._returning.discard(worker)
            return ""
        if after is None:
            return "leave"
        if worker in self._gone:
            return "return"
        if before is not None:
            return "restart"
        first = worker in self._seen
        self._seen.discard(worker)
        return "" if first else "join"

    def note_step(self, at: float) -> None:
        """Note that a step was made; a change before it cost the time beyond that of the usual step."""
        if self._waiting:
            usual = statistics.median(self._usual) if self._usual else 0.0
            for row, since in self._waiting:
                # A worker that died and is back has cost both: its work waited for another, and it joined again.
                row["seconds_lost"] = round((row["seconds_lost"] or 0.0) + max(at - since - usual, 0.0), 3)
            self._waiting = []
        elif self._stepped_at is not None:
            self._usual.append(max(at - self._stepped_at, 0.0))
        self._stepped_at = at
