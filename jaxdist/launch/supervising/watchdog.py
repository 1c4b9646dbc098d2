"""The watchdog: detects that a job hangs, names the process that causes it, and ends the job for a restart.

In SPMD training one stuck process silently stops all the others in the next collective. Each process therefore
reports its step and phase on a board and reads the others' reports, from a thread of its own. The verdict is a pure
function of what is on the board and for how long. The first process to reach it publishes it, and all processes show
that one.
"""

import contextlib
import dataclasses
import faulthandler
import math
import os
import pathlib
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TextIO

from jaxdist.errors import ExitStatus
from jaxdist.launch.supervising import board

DONE = "done"
_LEAST_SECONDS = 0.005
"""Between two reports of the thread that trains."""
_OWN_WORK = (("input", "eval"), ("other",))
"""Phases in which a process does not wait for others, the most certain first; in all others it may wait."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """How long a process may report the same step and phase.

    Attributes:
      hang_seconds: in any phase but the slow ones.
      slow_seconds: while it compiles, evaluates, saves or restores, which may take long without a report.
      slow_phases: the phases that `slow_seconds` applies to.
    """

    hang_seconds: float = 300.0
    slow_seconds: float = 3600.0
    slow_phases: tuple[str, ...] = ("compile", "eval", "checkpoint", "restart")

    def of(self, phase: str) -> float:
        """Return the seconds that `phase` may take."""
        return max(self.hang_seconds, self.slow_seconds) if phase in self.slow_phases else self.hang_seconds


@dataclasses.dataclass(frozen=True)
class View:
    """What one process knows of another, or of itself.

    Attributes:
      step: the last step it reported.
      phase: the last phase.
      same_seconds: how long it has reported these.
      silent_seconds: how long ago its last report came.
      heard: whether any report has arrived; a process that still imports has sent none.
    """

    step: int
    phase: str
    same_seconds: float
    silent_seconds: float
    heard: bool = True


@dataclasses.dataclass(frozen=True)
class HangVerdict:
    """The verdict on a job that hangs: the processes that cause it, the one that records it, and the text to show."""

    culprits: tuple[int, ...]
    reporter: int
    text: str


def judge(views: Mapping[int, View], limits: Limits, *, silence_seconds: float) -> HangVerdict | None:
    """Return the verdict on a job, None as long as any process may still be at work.

    The job hangs when every process that is not done has exceeded the limit of its phase. So a process that waits in
    a step for another that compiles does not hang, however short the limit of a step. The job also hangs when a process
    has not reported for `limits.hang_seconds`, whatever its phase: one that works reports, however slow the work.

    Args:
      views: by process number.
      limits: see Limits.
      silence_seconds: a process that has not reported for this long does not respond; it or its machine is stopped.
    """
    active = {number: view for number, view in views.items() if view.phase != DONE}
    stopped = any(view.heard and view.silent_seconds >= limits.hang_seconds for view in active.values())
    if not stopped and any(view.same_seconds < limits.of(view.phase) for view in active.values()):
        return None
    if not active:
        return None
    silent = [number for number, view in active.items() if view.silent_seconds >= silence_seconds]
    culprits = tuple(sorted(silent or _furthest_behind(active)))
    answering = sorted(set(active) - set(silent)) or sorted(active)
    return HangVerdict(culprits, answering[0], _describe(views, culprits, silence_seconds))


def _furthest_behind(active: Mapping[int, View]) -> list[int]:
    """Return the processes that the others wait for: not waiting themselves, or else at the lowest step.

    Empty if those are in a step and the others in the next one: each process may be ahead of its report, and programs
    that communicate can wait for each other, so the cause is unknown.
    """
    lowest = min(view.step for view in active.values())
    behind = [number for number, view in active.items() if view.step == lowest]
    for phases in _OWN_WORK:
        at_work = [number for number in behind if active[number].phase in phases]
        if at_work:
            return at_work
    close = max(view.step for view in active.values()) - lowest == 1
    return [] if close and all(active[number].phase == "compute" for number in behind) else behind


def _describe(views: Mapping[int, View], culprits: Sequence[int], silence_seconds: float) -> str:
    lines = []
    for number, view in sorted(views.items()):
        silent = f", no report for {view.silent_seconds:.0f} s" if view.silent_seconds >= silence_seconds else ""
        lines.append(f"  process {number}: step {view.step}, {view.phase} for {view.same_seconds:.0f} s{silent}")
    return "\n".join([f"The job hangs: {_headline(views, culprits)}", *lines])


def _headline(views: Mapping[int, View], culprits: Sequence[int]) -> str:
    others = [view for number, view in views.items() if number not in culprits and view.phase != DONE]
    if not culprits:
        return (
            "every process is in a step, and all respond, so it is unclear which one the others wait for. The log of "
            "each process ends with its stacks."
        )
    first = views[culprits[0]]
    who = " and ".join(f"process {number}" for number in culprits)
    holds = f"{who} {'is' if len(culprits) == 1 else 'are'} in {first.phase} for {first.same_seconds:.0f} s"
    # The step that the others wait in is the one after the last they finished.
    wait = f"the others wait in step {max(view.step for view in others) + 1}" if others else "no other process waits"
    return f"{holds}; {wait}."


class OwnTime:
    """A clock that stands while this process does: of the time since its last reading, at most `most_seconds` count.

    So a job that was stopped with Ctrl-Z and continues, or that another program kept from the cores, does not hang.
    """

    def __init__(self, most_seconds: float, *, clock: Callable[[], float] = time.monotonic):
        self._most_seconds, self._clock = most_seconds, clock
        self._read_at, self._seconds = clock(), 0.0

    def __call__(self) -> float:
        """Return the seconds that count."""
        now = self._clock()
        self._seconds += min(now - self._read_at, self._most_seconds)
        self._read_at = now
        return self._seconds


class ReportClock:
    """Keeps how long ago each process last reported, and last reported something new, by this process's own clock."""

    def __init__(self, num_processes: int, *, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        now = clock()
        self._reports: dict[int, board.ProcessReport] = {
            n: board.ProcessReport(0, "restart", 0) for n in range(num_processes)
        }
        self._new_since = dict.fromkeys(range(num_processes), now)
        self._heard_at = dict.fromkeys(range(num_processes), now)

    def note(self, process: int, report: board.ProcessReport | None) -> None:
        """Note the report of a process."""
        last = self._reports[process]
        if report is None or report == last:
            return
        now = self._clock()
        self._heard_at[process] = now
        if (report.step, report.phase) != (last.step, last.phase):
            self._new_since[process] = now
        self._reports[process] = report

    def views(self) -> dict[int, View]:
        """Return what is known of each process now."""
        now = self._clock()
        return {
            process: View(
                report.step,
                report.phase,
                now - self._new_since[process],
                now - self._heard_at[process],
                heard=report.beat > 0,
            )
            for process, report in self._reports.items()
        }


class Watchdog:
    """The thread that reports for this process, reads what the others report, and acts on the verdict.

    `where` returns this process's step and phase; the thread calls it. `on_hang` is called with the verdict, for the
    run record, on the process that it names as the reporter.
    """

    def __init__(
        self,
        directory: pathlib.Path,
        *,
        process: int,
        num_processes: int,
        where: Callable[[], tuple[int, str]],
        limits: Limits,
        on_hang: Callable[[HangVerdict], object] = lambda verdict: None,
        every_seconds: float | None = None,
    ):
        self._directory, self._where = directory, where
        self._writer = board.ReportWriter(directory, process)
        self._earlier = board.mark(directory)
        self._process, self._num_processes = process, num_processes
        self._limits, self._on_hang = limits, on_hang
        self._every_seconds = min(0.5, limits.hang_seconds / 10) if every_seconds is None else every_seconds
        self._reported_at = -math.inf
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="jaxdist-watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()
        self._writer.write(self._where()[0], DONE)
        self._writer.close()

    def report(self) -> None:
        """Report from the thread that trains, unless that was a moment ago: a small step takes less than its report."""
        now = time.monotonic()
        if now - self._reported_at >= _LEAST_SECONDS:
            self._reported_at = now
            self._writer.write(*self._where())

    def _run(self) -> None:
        observer = ReportClock(self._num_processes, clock=OwnTime(10 * self._every_seconds))
        # On a busy machine a thread may report seconds late; a stopped process never reports.
        silence_seconds = max(10 * self._every_seconds, self._limits.hang_seconds / 2)
        while not self._stopped.is_set():
            own = self._writer.write(*self._where())
            for number in range(self._num_processes):
                # The own report is known even if the memory of the board is full.
                observer.note(number, own if number == self._process else board.read(self._directory, number))
            verdict = judge(observer.views(), self._limits, silence_seconds=silence_seconds)
            if verdict:
                with contextlib.suppress(OSError):  # a verdict that cannot be published is shown by this process alone
                    board.publish(self._directory, dataclasses.asdict(verdict), earlier=self._earlier)
            published = board.published(self._directory, earlier=self._earlier)
            if published:
                verdict = HangVerdict(tuple(published["culprits"]), published["reporter"], published["text"])
            if verdict:
                self._end(verdict)
            self._stopped.wait(self._every_seconds)

    def _end(self, verdict: HangVerdict) -> None:
        """Show the verdict and the stacks, record the hang, and leave: the main thread is in a collective.

        Where a supervisor shows the verdict to the user, the original standard error is this process's log.
        """
        with contextlib.suppress(OSError, ValueError):  # the viewer is gone; the process must leave all the same
            show(verdict, sys.__stderr__ or sys.stderr)
        try:
            if verdict.reporter == self._process:
                self._on_hang(verdict)
        finally:
            os._exit(ExitStatus.RETRY)


def show(verdict: HangVerdict, output: TextIO) -> None:
    """Print the table and the stacks of all threads of this process."""
    print(f"{verdict.text}\nThis process's stacks:", file=output, flush=True)
    faulthandler.dump_traceback(file=output, all_threads=True)
    output.flush()
