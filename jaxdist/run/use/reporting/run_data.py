"""The data of a report on a run: its record, curves, attempts and parameter server."""

import dataclasses
import pathlib
import shlex
import signal
from collections.abc import Mapping, Sequence
from typing import Any

from jaxdist import errors
from jaxdist.launch.supervising import restart_events
from jaxdist.run import directory
from jaxdist.run.use import run_list
from jaxdist.run.use.reporting import curves, server_timeline, timeline
from jaxdist.rundir import confusion, record

MOST_POINTS = 40_000
"""Most points of all curves of a page together; each takes about 30 bytes."""
MOST_OF_A_CURVE, LEAST_OF_A_CURVE = 2000, 20
_MOST_CHARACTERS = 4000
_ONCE = ("--resume", "--overwrite", "--restartable")
"""Options that are left out of a command that repeats a run from its start."""


@dataclasses.dataclass(frozen=True)
class AttemptEvent:
    """An attempt of a job under a supervisor.

    Attributes:
      host: the folder of its host; "" for the first host.
      number: number of the attempt, from 0.
      started: its start, in seconds since the first attempt began.
      seconds: its duration; None while it runs.
      ended: how it ended, in words.
      saved_step: the newest step that was saved.
    """

    host: str
    number: int
    started: float
    seconds: float | None
    ended: str
    saved_step: int | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReportedRun:
    """A run of a report.

    Attributes:
      name: of its directory; with the folders above it where two runs share a name.
      path: its directory.
      ended: the end reason; running, interrupted or unfinished.
      record: its record.
      curves: by metric.
      confusion: confusion matrices by the data they are of.
      classes: names of the classes; empty where they are unknown.
      attempts: of its job, where it was supervised.
      timeline: the picture of its processes over time, where it was supervised on this host; "" otherwise.
      leases: the picture of its leases over time, where a parameter server trained it; "" otherwise.
      nonfinite: the report on a value that was not finite, or "".
      again: a command that repeats the run in a new directory, or "".
    """

    name: str
    path: pathlib.Path
    ended: str
    record: record.RunRecord
    curves: Mapping[str, curves.Curve]
    confusion: Mapping[str, list[list[float]]]
    classes: Sequence[str]
    attempts: Sequence[AttemptEvent]
    timeline: str
    leases: str
    nonfinite: str
    again: str

    def to_json(self) -> dict[str, Any]:
        """Return what the page draws."""
        return {
            "name": self.name,
            "curves": {name: dataclasses.asdict(curve) for name, curve in self.curves.items()},
            "confusion": self.confusion,
            "classes": list(self.classes),
            "staleness": self.record.extra.get("ps", {}).get("staleness"),
        }


def check_are_runs(run_dirs: Sequence[pathlib.Path]) -> None:
    """Raise UserError where a directory holds no run."""
    for run_dir in run_dirs:
        if not (run_dir / record.FILE_NAME).is_file():
            raise errors.UserError(
                f"A report needs run directories; {run_dir} has no {record.FILE_NAME}. `jaxdist runs` lists the runs "
                "of a folder."
            )


def read(run_dirs: Sequence[pathlib.Path]) -> list[ReportedRun]:
    """Return the runs, in the order given.

    Raises:
      UserError: a directory has no run, or one that cannot be read.
    """
    with errors.as_user_error():
        check_are_runs(run_dirs)
        rows = [curves.read_rows(run_dir) for run_dir in run_dirs]
        num_curves = sum(len({name for row in each for name in row}) for each in rows)
        most = max(LEAST_OF_A_CURVE, min(MOST_OF_A_CURVE, MOST_POINTS // max(num_curves, 1)))
        names = run_list.distinct_names(run_dirs)
        return [
            _run(name, run_dir, curves.curves(each, most_points=most))
            for name, run_dir, each in zip(names, run_dirs, rows, strict=True)
        ]


def _run(name: str, run_dir: pathlib.Path, found: Mapping[str, curves.Curve]) -> ReportedRun:
    made = record.RunRecord.read(run_dir)
    why = run_dir / directory.NONFINITE_NAME
    return ReportedRun(
        name=name,
        path=run_dir,
        ended=run_list.how_ended(run_dir, made),
        record=made,
        curves=found,
        confusion=confusion.matrices(made.metrics),
        classes=_classes(made.config),
        attempts=attempts(run_dir),
        timeline=timeline.draw(restart_events.read_events(run_dir)),
        leases=server_timeline.draw(server_timeline.read(run_dir)),
        nonfinite=why.read_text(errors="replace")[:_MOST_CHARACTERS] if why.exists() else "",
        again=repeating(made.command),
    )


def attempts(run_dir: pathlib.Path) -> list[AttemptEvent]:
    """Return the attempts of a supervised job, of all its hosts."""
    hosts = ["", *sorted(path.name for path in run_dir.glob("host-*") if path.is_dir())]
    found = [each for host in hosts for each in _attempts_on(host, restart_events.read_events(run_dir / host))]
    first = min((each.started for each in found), default=0.0)
    return [dataclasses.replace(each, started=each.started - first) for each in found]


def _attempts_on(host: str, events: Sequence[Mapping[str, Any]]) -> list[AttemptEvent]:
    """Return the attempts on one host, each `started` in seconds since 1970.

    The clock of a machine may be set while a job runs; so it is read where the job begins, and the monotonic clock,
    which is valid as long as one supervisor lives, says the rest.
    """
    found: list[AttemptEvent] = []
    job: Mapping[str, Any] = {}
    begun: Mapping[str, Any] = {}
    for event in events:
        if event["event"] == "start":
            if not begun or event["attempt"] <= begun["attempt"]:
                job = event  # another supervisor, which counts its attempts anew
            begun = event
            started = job["time"] + event["monotonic"] - job["monotonic"]
            found.append(AttemptEvent(host, event["attempt"], started, None, "no end recorded", None))
        elif event["event"] == "end" and begun and event["attempt"] == begun["attempt"]:
            found[-1] = _ended(found[-1], event, event["monotonic"] - begun["monotonic"])
    return found


def _ended(attempt: AttemptEvent, end: Mapping[str, Any], seconds: float) -> AttemptEvent:
    failed, status = end.get("failed"), end.get("status")
    ended = _status_in_words(status) if failed is None else f"process {failed} {_status_in_words(status)}"
    return dataclasses.replace(attempt, seconds=seconds, ended=ended, saved_step=end.get("saved"))


def _status_in_words(status: int | None) -> str:
    """Return in words how a process ended, from its exit status; above 128 it was a signal."""
    if not status:
        return "ended well" if status == 0 else "ended"
    try:
        return f"killed by {signal.Signals(status - 128).name}" if status > 128 else f"ended with status {status}"
    except ValueError:
        return f"ended with status {status}"


def repeating(command: str) -> str:
    """Return a command line that repeats a run from its first step: in a new directory, without resuming."""
    kept: list[str] = []
    words = iter(shlex.split(command))
    for word in words:
        if word in ("--run-dir", "--checkpoint"):
            next(words, None)
        elif word not in _ONCE and not word.startswith(("--run-dir=", "--checkpoint=")):
            kept.append(word)
    return shlex.join(kept)


def _classes(config: Any) -> list[str]:
    """Return the names of the classes, if the held-out data have a vocabulary of labels."""
    try:
        names = config["data"]["eval"]["vocabulary"]["label"]
    except (KeyError, TypeError):
        return []
    return [str(name) for name in names] if isinstance(names, list) else []
