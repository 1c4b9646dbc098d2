"""The picture of a parameter-server run: its leases, steps, staleness, repeated requests and failovers, as one SVG.

The upper part shows the whole run in the equal bins that the processes recorded (at most 240), so it does not grow with
the run. The lower part shows the last leases one by one. The events of the membership are lines through both.
"""

import contextlib
import html
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias, TypedDict

from jaxdist.rundir import json_kinds

FILE_NAME = "timeline.svg"
HISTORIES = "ps/history"
"""The folder of the histories in a run directory; one file a process (see `paramserver.processes.lease_history`)."""
MOST_LEASES = 200

History: TypeAlias = Mapping[str, Any]

WIDTH = 1000.0
_LEFT, _RIGHT, _TOP = 110.0, 16.0, 30.0
_CURVE, _ROWS, _MOST_ROW, _GAP = 46.0, 260.0, 16.0, 10.0
_PHASES = ("pull", "compute", "push")
_COLOURS = {
    "held": "#9dbcf0",
    "compute": "#2f6fde",
    "pull": "#8fd0c4",
    "push": "#e8b04a",
    "lost": "#d9534f",
    "returned": "#b9b9b9",
    "steps": "#2e9e5b",
    "staleness": "#8a63d2",
    "again": "#e07b39",
    "cut": "#b9b9b9",
    "join": "#2e9e5b",
    "leave": "#d9534f",
    "failover": "#e07b39",
    "rollback": "#e07b39",
    "restart": "#777",
    "end": "#777",
}
_LABEL_ROWS, _LABEL_HEIGHT, _LETTER = 5, 11.0, 5.0


def _style() -> str:
    """Return the style of the picture; each rule is for it alone, since it may be part of a page."""
    rules = {
        "": "background:#fff;color:#222;font:11px sans-serif",
        " text": "fill:currentColor",
        " .small": "font-size:9px",
        " .title": "font-weight:600",
        " .axis": "stroke:currentColor;stroke-width:.5;opacity:.4",
    }
    rules |= {f" .{kind}": f"fill:{colour};stroke:{colour};stroke-width:0" for kind, colour in _COLOURS.items()}
    rules[" .event"] = "stroke-width:1"
    return "".join(f"svg.leases{selector}{{{rule}}}" for selector, rule in rules.items())


class _Bins(TypedDict):
    began: float
    width: float
    series: dict[str, list[float]]


class _History(TypedDict):
    """A file, but for its rows."""

    bins: _Bins
    leases: list[list[Any]]
    lost: list[list[Any]]
    events: list[list[Any]]
    omitted: int
    written: float


_LEASE = (int, int, int, float, float)  # worker, step, slice, since, until
_SCHEDULER_ROWS = {
    "leases": (*_LEASE, Literal["done", "returned"]),
    "lost": (*_LEASE, Literal["lost"]),
    "events": (float, Literal["join", "leave", "failover", "rollback", "restart", "end"], str),
}
_WORKER_ROWS = _SCHEDULER_ROWS | {"leases": (*_LEASE, float, float)}  # ..., since, seconds of each phase
_MOST, _MOST_BINS = 1e12, 1e5


def read(run_dir: pathlib.Path) -> dict[str, History]:
    """Return the histories of the processes of a run, by the name of their file; one that is damaged is omitted."""
    found = {path.stem: read_one(path) for path in sorted((run_dir / HISTORIES).glob("*.json"))}
    return {name: history for name, history in found.items() if history is not None}


def read_one(path: pathlib.Path) -> History | None:
    """Return the history of a process; None if it cannot be read, or is damaged."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        found = json.loads(path.read_text())
        if json_kinds.misfit(found, _History, "") is None and _fits(found, path.stem):
            return dict(found)
    return None


def _fits(history: History, name: str) -> bool:
    """Return whether the rows of a history are complete, and its names and times can be drawn."""
    role, _, number = name.partition("-")
    rows = _WORKER_ROWS if role == "worker" else _SCHEDULER_ROWS
    for key, kinds in rows.items():
        for row in history[key]:
            if len(row) != len(kinds) or json_kinds.first_misfit(row, dict(enumerate(kinds))):
                return False
    bins = history["bins"]
    workers = [series.partition("/")[2] for series in bins["series"] if series.startswith("worker/")]
    workers += [number] if role == "worker" else []
    times = [bins["began"], history["written"], *(event[0] for event in history["events"])]
    values = [*times, bins["width"], *(value for series in bins["series"].values() for value in series)]
    values += [value for key in rows for row in history[key] for value in row if not isinstance(value, str)]
    return (
        all(each.isdecimal() for each in workers)
        and bins["width"] > 0
        and all(abs(value) < _MOST for value in values)
        and max(times) - bins["began"] <= _MOST_BINS * bins["width"]
    )


def draw(histories: Mapping[str, History]) -> str:
    """Return the picture of a run; "" without the history of its scheduler."""
    if "scheduler" not in histories:
        return ""
    picture = _Picture(histories)
    parts = [*picture.overview(), *picture.last_leases(), *picture.legend()]
    height = picture.y + 8
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH:.0f} {height:.0f}" role="img" '
        f'class="leases" aria-label="Leases, steps and events of a parameter-server run over time">'
        f"<style>{_style()}</style>{''.join(parts)}</svg>"
    )


def resample(bins: Mapping[str, Any], name: str, began: float, width: float, count: int) -> list[float]:
    """Return the sums of a series in `count` bins of another width, each old bin divided by overlap."""
    found = [0.0] * count
    for number, value in enumerate(bins["series"].get(name, ())):
        first = bins["began"] + number * bins["width"]
        last = first + bins["width"]
        for target in range(max(int((first - began) / width), 0), min(math.ceil((last - began) / width), count)):
            since, until = began + target * width, began + (target + 1) * width
            found[target] += value * max(min(last, until) - max(first, since), 0.0) / bins["width"]
    return found


def shown_leases(histories: Mapping[str, History]) -> list[dict[str, Any]]:
    """Return the newest MOST_LEASES leases in order, with the phases where their worker recorded them."""
    phases = {
        tuple(row[:3]): row[3:]
        for name, history in histories.items()
        if name.startswith("worker")
        for row in history["leases"]
    }
    scheduler = histories["scheduler"]
    rows = sorted([*scheduler["leases"], *scheduler["lost"]], key=lambda row: row[4])[-MOST_LEASES:]
    return [
        {"worker": worker, "step": step, "slice": part, "since": since, "until": until, "how": how}
        | {"phases": phases.get((worker, step, part)) if how == "done" else None}
        for worker, step, part, since, until, how in rows
    ]


class _Picture:
    """Draws from the top to `y`."""

    def __init__(self, histories: Mapping[str, History]) -> None:
        self.histories, self.scheduler = histories, histories["scheduler"]
        bins = self.scheduler["bins"]
        self.began, self.width = bins["began"], bins["width"]
        self.end = max([self.scheduler["written"], *(event[0] for event in self.scheduler["events"])])
        self.end = max(self.end, self.began + self.width)
        self.count = max(math.ceil((self.end - self.began) / self.width), 1)
        held = {int(name[7:]) for name in bins["series"] if name.startswith("worker/")}
        own = {int(name[7:]) for name in histories if name.startswith("worker-")}
        self.workers = sorted(held | own | {row[0] for row in self.scheduler["lost"]})
        self.row = max(2.0, min(_MOST_ROW, _ROWS / max(len(self.workers), 1)))
        self.y = _TOP

    # The whole run.

    def overview(self) -> list[str]:
        parts = [self._heading(f"The whole run: {self.count} bins of {_seconds(self.width)}")]
        parts += self._labels()
        top = self.y - 6
        curves = [
            ("steps / s", "steps", [value / self.width for value in self._summed("steps", "scheduler")]),
            ("mean staleness", "staleness", self._mean_staleness()),
            ("sent again", "again", self._summed("again")),
            ("cut read (s)", "cut", self._summed("cut", "scheduler")),
        ]
        for words, kind, values in curves:
            if kind == "steps" or any(values):
                parts += self._curve(words, kind, values)
        parts += self._worker_rows()
        parts += self._time_axis(self.began, self.end)
        return [*parts, *self._events(top, self.began, self.end)]

    def _summed(self, name: str, only: str = "") -> list[float]:
        rows = [
            resample(history["bins"], name, self.began, self.width, self.count)
            for process, history in self.histories.items()
            if process.startswith(only)
        ]
        return [sum(values) for values in zip(*rows)]

    def _mean_staleness(self) -> list[float]:
        totals, counts = self._summed("staleness", "server"), self._summed("updates", "server")
        return [total / count if count else 0.0 for total, count in zip(totals, counts)]

    def _curve(self, words: str, kind: str, values: Sequence[float]) -> list[str]:
        top, self.y = self.y, self.y + _CURVE + _GAP
        most = max(max(values), 1e-9)
        bottom = top + _CURVE
        points = [(self._x(self.began, self.end, self.began + i * self.width), v) for i, v in enumerate(values)]
        step = (WIDTH - _LEFT - _RIGHT) * self.width / (self.end - self.began)
        steps = " ".join(f"V{bottom - _CURVE * v / most:.1f}H{min(x + step, WIDTH - _RIGHT):.1f}" for x, v in points)
        return [
            f'<path class="{kind}" d="M{_LEFT} {bottom}{steps}V{bottom}Z"/>',
            f'<line class="axis" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{bottom:.1f}" y2="{bottom:.1f}"/>',
            f'<text x="{_LEFT - 6}" y="{top + 9}" text-anchor="end">{most:.3g}</text>',
            f'<text x="{_LEFT - 6}" y="{bottom}" text-anchor="end">{words}</text>',
        ]

    def _worker_rows(self) -> list[str]:
        parts = []
        for worker in self.workers:
            held = self._summed(f"worker/{worker}", "scheduler")
            own = self.histories.get(f"worker-{worker}")
            computing = resample(own["bins"], "computing", self.began, self.width, self.count) if own else []
            title = f"worker {worker}: held a lease {sum(held) / (self.end - self.began):.0%} of the time"
            row = (self._shares(held, "held"), self._shares(computing, "compute"), self._row_name(worker))
            parts.append(f"<g><title>{title}</title>{''.join(row)}</g>")
            self.y += self.row
        self.y += _GAP
        return parts

    def _shares(self, seconds: Sequence[float], kind: str) -> str:
        """Return a row whose bins are filled as far as their time was spent."""
        bottom, path = self.y + self.row - 1, []
        step = (WIDTH - _LEFT - _RIGHT) * self.width / (self.end - self.began)
        for number, value in enumerate(seconds):
            if value > 0:
                x = self._x(self.began, self.end, self.began + number * self.width)
                height = (self.row - 1) * min(value / self.width, 1.0)
                path.append(f"M{x:.1f} {bottom:.1f}v{-height:.1f}h{min(step, WIDTH - _RIGHT - x):.1f}v{height:.1f}z")
        return f'<path class="{kind}" d="{"".join(path)}"/>'

    def _row_name(self, worker: int) -> str:
        if self.row < 9 and worker != self.workers[0] and worker != self.workers[-1]:
            return ""
        return f'<text x="{_LEFT - 6}" y="{self.y + self.row - 4:.1f}" text-anchor="end">worker {worker}</text>'

    # The last leases.

    def last_leases(self) -> list[str]:
        leases = shown_leases(self.histories)
        if not leases:
            return []
        self.y += 22
        since, until = min(each["since"] for each in leases), max(each["until"] for each in leases)
        steps = f"steps {min(each['step'] for each in leases) + 1:,} to {max(each['step'] for each in leases) + 1:,}"
        parts = [self._heading(f"The last {len(leases)} leases, {steps}")]
        top = self.y - 4
        at = {worker: self.y + number * self.row for number, worker in enumerate(self.workers)}
        for worker in self.workers:
            parts.append(self._row_name(worker))
            self.y += self.row
        parts += [self._lease(each, at[each["worker"]], since, until) for each in leases]
        self.y += _GAP
        parts += self._time_axis(since, until)
        return [*parts, *self._events(top, since, until)]

    def _lease(self, lease: Mapping[str, Any], y: float, since: float, until: float) -> str:
        seconds = lease["until"] - lease["since"]
        words = f"worker {lease['worker']}, step {lease['step'] + 1:,}, slice {lease['slice']}, {_seconds(seconds)}"
        kind = "held" if lease["how"] == "done" else lease["how"]
        bars = [self._bar(kind, lease["since"], lease["until"], y, since, until)]
        if lease["phases"]:
            start, *lengths = lease["phases"]
            words += "".join(f", {name} {_seconds(length)}" for name, length in zip(_PHASES, lengths))
            for name, length in zip(_PHASES, lengths):
                bars.append(self._bar(name, start, start + length, y, since, until))
                start += length
        return f"<g><title>{words}, {lease['how']}</title>{''.join(bars)}</g>"

    def _bar(self, kind: str, first: float, last: float, y: float, since: float, until: float) -> str:
        x, end = (self._x(since, until, max(each, since)) for each in (first, last))
        height = self.row - 2 if self.row > 4 else self.row
        return f'<rect class="{kind}" x="{x:.1f}" y="{y:.1f}" width="{max(end - x, 0.3):.1f}" height="{height:.1f}"/>'

    # Both.

    def _x(self, since: float, until: float, at: float) -> float:
        share = (at - since) / max(until - since, 1e-9)
        return _LEFT + (WIDTH - _LEFT - _RIGHT) * min(max(share, 0.0), 1.0)

    def _heading(self, words: str) -> str:
        self.y += 20
        return f'<text class="title" x="{_LEFT}" y="{self.y - 14}">{html.escape(words)}</text>'

    def _time_axis(self, since: float, until: float) -> list[str]:
        self.y += 10
        return [
            f'<text x="{_LEFT}" y="{self.y}">{_seconds(since - self.began)}</text>',
            f'<text x="{WIDTH - _RIGHT}" y="{self.y}" text-anchor="end">{_seconds(until - self.began)}</text>',
        ]

    def _events(self, top: float, since: float, until: float) -> list[str]:
        parts = []
        for at, kind, words in self.scheduler["events"]:
            if since <= at <= until:
                x = self._x(since, until, at)
                title = f"<title>{html.escape(f'{words} at {_seconds(at - self.began)}')}</title>"
                line = f'<line class="{kind} event" x1="{x:.1f}" x2="{x:.1f}" y1="{top:.1f}" y2="{self.y - 12:.1f}"/>'
                parts.append(f"<g>{title}{line}</g>")
        return parts

    def _labels(self) -> list[str]:
        """Return the names of the events, in rows so that none covers another; one without room has no name."""
        parts, rows = [], [-math.inf] * _LABEL_ROWS
        nameless = self.scheduler["omitted"]
        for at, _, words in self.scheduler["events"]:
            x = self._x(self.began, self.end, at)
            length = _LETTER * len(words)
            first = x - length if x + length > WIDTH - _RIGHT else x
            row = next((row for row, end in enumerate(rows) if end < first), None)
            if row is None:
                nameless += 1
                continue
            rows[row] = first + length + 6
            y = self.y - 2 + _LABEL_HEIGHT * row
            anchor = "start" if first == x else "end"
            parts.append(
                f'<text class="small" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(words)}</text>'
            )
        self.y += _LABEL_HEIGHT * sum(end > -math.inf for end in rows) + 2
        if nameless:
            parts[:0] = [f'<text class="small" x="8" y="{self.y - 12}">and {nameless:,} more events</text>']
        return parts

    def legend(self) -> list[str]:
        self.y += 22
        parts, x = [], _LEFT
        names = {"held": "lease held", "pull": "pull", "compute": "compute", "push": "push", "lost": "lease lost"}
        names |= {"returned": "lease returned"}
        for kind, words in names.items():
            parts.append(f'<rect class="{kind}" x="{x}" y="{self.y - 9}" width="10" height="10"/>')
            parts.append(f'<text x="{x + 14}" y="{self.y}">{words}</text>')
            x += 24 + 7 * len(words)
        parts.append(f'<text x="{x}" y="{self.y}">white: the worker waits for a lease</text>')
        return parts


def _seconds(seconds: float) -> str:
    """Return a duration in short form."""
    if seconds < 1:
        return f"{seconds * 1000:.3g} ms"
    if seconds < 120:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
