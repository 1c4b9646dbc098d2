"""A supervised job under fire: observed through the supervisor's events and the reports on the board."""

import contextlib
import functools
import math
import os
import pathlib
import signal
import time
from collections.abc import Generator, Iterator, Sequence
from typing import Any

from jaxdist.launch.supervising import board, restart_events
from jaxdist.launch.supervising.chaos import striker, strikes

STAGES = ("detect", "restart", "restore", "compile")
"""What passes from a strike to the next new step.

detect: until the next attempt was started, including attempts in between that failed. restart: until all its processes
had joined and built what they train. restore: until all had restored their state. compile: until the step was made,
including compilation (mostly from the cache) and repeated steps.
"""
_NUM_STAGES = len(STAGES) - 1
PAUSE_SECONDS = 2.0
"""How long a job is stopped between some steps while it is held, unless that would look like a hang."""


class SupervisedJob:
    """See `striker.JobUnderFire`; `hang_seconds` is the job's `recovery.hang_seconds`."""

    def __init__(self, run_dir: pathlib.Path, *, hang_seconds: float = math.inf):
        self._run_dir, self._pause_seconds = run_dir, min(PAUSE_SECONDS, hang_seconds / 4)

    def target(self, strike: strikes.Strike) -> striker.Target | None:
        """See `striker.JobUnderFire`."""
        attempt = self._attempt()
        if attempt is None:
            return None
        number = strike.process % len(attempt["process_ids"])
        report = board.read(pathlib.Path(attempt["memory"]), number)
        is_due = report is not None and report.step >= strike.step
        if strike.early_seconds is not None:  # a short job would end before the seconds have passed
            is_due = is_due or time.monotonic() - attempt["monotonic"] >= strike.early_seconds
        if not is_due:
            return None
        follow = functools.partial(self._follow, strike, number, attempt, _highest_step(attempt))
        return striker.Target(attempt["process_ids"][number], follow)

    def has_size(self, num_processes: int) -> bool:
        """See `striker.JobUnderFire`."""
        changes = restart_events.changes(restart_events.read_events(self._run_dir))
        newest = changes[-1] if changes else {}
        return newest.get("processes") == num_processes and newest["seconds_lost"] is not None

    def hold(self, num_processes: int) -> Generator[bool, None, None]:
        """See `striker.JobUnderFire`: until it is asked to end for the change, it makes a step now and then.

        Its processes are stopped in between, so that those of the next attempt have the processors to get ready.
        """
        while not self._is_changing(num_processes):
            attempt = self._attempt()
            step, end = (_highest_step(attempt) if attempt else 0), time.monotonic() + self._pause_seconds
            _send(signal.SIGSTOP, attempt)
            try:
                while time.monotonic() < end and not self._is_changing(num_processes):
                    yield False
            finally:
                _send(signal.SIGCONT, attempt)
            while attempt and _highest_step(attempt) == step and self._attempt() == attempt:
                yield self._is_changing(num_processes)
        while True:
            yield True

    def _is_changing(self, num_processes: int) -> bool:
        """Return whether the running attempt was asked to end for a change, or has this size."""
        attempt = self._attempt()
        if attempt is None:
            return False
        asked = pathlib.Path(attempt["memory"], restart_events.CHANGE_NAME).exists()
        return asked or len(attempt["process_ids"]) == num_processes

    def _follow(
        self, strike: strikes.Strike, number: int, attempt: dict[str, Any], before: int
    ) -> Iterator[strikes.Hit | None]:
        """Yield None until a later attempt makes a step beyond `before`, then what that took."""
        struck = time.monotonic()
        verdict = None
        while verdict is None:
            published = board.published(pathlib.Path(attempt["memory"]))
            if published is not None:
                verdict = (tuple(published["culprits"]), time.monotonic() - struck)
            elif self._attempt() != attempt:
                break
            yield None
        passed: list[float] = []
        while len(passed) <= _NUM_STAGES:
            yield None
            running = self._attempt()
            if running is None or running["attempt"] == attempt["attempt"]:
                continue
            if not passed or passed[0] != running["monotonic"]:
                passed = [running["monotonic"]]
            now, reports = time.monotonic(), _reports(running)
            passed += [now] * (_stage(reports, before) + 1 - len(passed))
        stages = dict(zip(STAGES, map(float.__sub__, passed, [struck, *passed])))
        yield strikes.Hit(strike, sum(stages.values()), stages, verdict, number)

    def _attempt(self) -> dict[str, Any] | None:
        """Return the start event of the attempt that is running, None between two."""
        events = [event for event in restart_events.read_events(self._run_dir) if event["event"] in ("start", "end")]
        return events[-1] if events and events[-1]["event"] == "start" else None


def _send(number: int, attempt: dict[str, Any] | None) -> None:
    """Send a signal to all processes of an attempt."""
    for process_id in attempt["process_ids"] if attempt else ():
        with contextlib.suppress(ProcessLookupError):
            os.kill(process_id, number)


def _reports(attempt: dict[str, Any]) -> list[board.ProcessReport | None]:
    return [board.read(pathlib.Path(attempt["memory"]), number) for number in range(len(attempt["process_ids"]))]


def _highest_step(attempt: dict[str, Any]) -> int:
    return max((report.step for report in _reports(attempt) if report is not None), default=0)


def _stage(reports: Sequence[board.ProcessReport | None], before: int) -> int:
    """Return how many of the stages after the first an attempt has completed; see STAGES."""
    if any(report is None for report in reports):
        return 0
    if any(report.step > before for report in reports if report):
        return 3
    return 1 if any(report.phase == "restart" for report in reports if report) else 2
