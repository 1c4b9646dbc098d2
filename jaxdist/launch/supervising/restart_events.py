"""The file restarts.jsonl: when the attempts of a job began and ended; and how long a job made no new steps."""

import contextlib
import json
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any, NotRequired, TypedDict

from jaxdist.errors import say
from jaxdist.launch.supervising import board
from jaxdist.rundir import json_kinds

EVENTS_NAME = "restarts.jsonl"
LOST_SINCE, REACHED = "JAXDIST_LOST_SINCE", "JAXDIST_REACHED"
"""Environment variables: since when the job makes no new steps, by the monotonic clock, and the newest step it made."""
CHANGE_NAME = "change"
"""The file in the directory in memory that asks the processes to end at their next step, so that their number can
change; process 0 writes into it when they did."""


class _Event(TypedDict):
    """A line, as far as it is read; which keys it has depends on the event."""

    event: str
    time: float
    monotonic: float
    attempt: NotRequired[int]
    process_ids: NotRequired[list[int]]
    cause: NotRequired[str]
    reached: NotRequired[int]
    step: NotRequired[int]
    seconds: NotRequired[float]
    failed: NotRequired[int | None]
    status: NotRequired[int | None]
    saved: NotRequired[int | None]


_NEEDED = {"start": {"attempt", "process_ids"}, "end": {"attempt"}, "recovered": {"step", "seconds"}}


def _is_whole(event: Any) -> bool:
    """Return whether a line has what its readers take from it, each of its kind."""
    if json_kinds.misfit(event, _Event, "") is not None:
        return False
    needed = _NEEDED.get(event["event"], set()) | ({"reached"} if "cause" in event else set())
    return needed <= event.keys()


class Events:
    """Records in restarts.jsonl in the run directory when attempts began and ended, one object a line.

    A line that cannot be written is omitted, with one warning: the job does not depend on it.
    """

    def __init__(self, run_dir: pathlib.Path):
        self._path = run_dir / EVENTS_NAME
        self._told = False
        self.failed_at: float | None = None

    def note(self, event: str, **details: object) -> None:
        """Add a line with the time in seconds since 1970, and by the monotonic clock, for what measures."""
        monotonic = time.monotonic()  # one clock for all processes of this machine, which is never set
        if event == "end":
            self.failed_at = monotonic
        try:
            with open(self._path, "a") as file:
                file.write(json.dumps({"event": event, "time": time.time(), "monotonic": monotonic} | details) + "\n")
        except OSError as error:
            if not self._told:
                say(f"{self._path} could not be written: {error.strerror}. The job continues without it.")
            self._told = True


class Standstill:
    """The time in which a job makes no new steps: from a failure or a change of its processes until it has recovered.

    Attributes:
      cause: why the next attempt is made: "restart", "join" or "leave".
      reached: the newest step that was made.
    """

    def __init__(self, memory: pathlib.Path):
        self._memory, self._note = memory, memory / CHANGE_NAME
        self.cause, self.reached = "restart", 0
        self._since: float | None = None

    def ask(self) -> None:
        """Ask the running attempt to end at its next step."""
        with contextlib.suppress(OSError):  # without a directory in memory none can join
            self._note.touch()

    def withdraw(self) -> None:
        """Take the request back: another attempt begins."""
        self._note.unlink(missing_ok=True)

    def note_end(self, num_processes: int) -> None:
        """Note that an attempt ended: the standstill began now, at the last step before a change, or earlier."""
        reports = [board.read(self._memory, number) for number in range(num_processes)]
        reached = max((report.step for report in reports if report), default=0)
        if reached > self.reached or self._since is None:
            self._since = self._stopped_at() or time.monotonic()
        self.reached = max(reached, self.reached)

    def _stopped_at(self) -> float | None:
        with contextlib.suppress(OSError, ValueError):
            return float(self._note.read_text())
        return None

    def environment(self) -> dict[str, str]:
        """Return the environment variables that tell the next attempt."""
        return {} if self._since is None else {LOST_SINCE: repr(self._since), REACHED: str(self.reached)}


def read_events(run_dir: pathlib.Path) -> list[dict[str, Any]]:
    """Return the events of a run directory, oldest first; a line that is incomplete or damaged is omitted."""
    path = run_dir / EVENTS_NAME
    text = path.read_text() if path.exists() else ""
    found = []
    for line in text[: text.rfind("\n") + 1].splitlines():
        with contextlib.suppress(ValueError, RecursionError):  # a line that a full disk has cut
            found.append(json.loads(line))
    return [event for event in found if _is_whole(event)]


def changes(events: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return each restart, join and leave of a run, as `changes` of its run record has them.

    Each has `kind` ("restart", "join" or "leave"), `step` (the newest that was made before), `processes` (how many
    there were from then on) and `seconds_lost`: until the next new step; None if none was made.
    """
    found: list[dict[str, Any]] = []
    for event in events:
        if event["event"] == "start" and "cause" in event:
            processes = len(event["process_ids"])
            found.append(
                {"kind": event["cause"], "step": event["reached"], "processes": processes, "seconds_lost": None}
            )
        elif event["event"] == "recovered" and found:
            found[-1]["seconds_lost"] = event["seconds"]
    return found
