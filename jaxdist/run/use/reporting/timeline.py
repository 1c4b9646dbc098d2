"""The processes of a supervised job over time, its steps, and what each change cost, as one SVG picture."""

import html
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

Point: TypeAlias = tuple[float, float]

WIDTH, HEIGHT = 860.0, 310.0
_LEFT, _RIGHT, _TOP, _MIDDLE, _BOTTOM = 70.0, 12.0, 26.0, 200.0, 30.0
_MOST_LABELS = 24


def draw(events: Sequence[Mapping[str, Any]]) -> str:
    """Return the picture of the events of restarts.jsonl, of the job that began last; "" without a start."""
    events = _of_last_job(events)
    if not events:
        return ""
    began = events[0]["monotonic"]
    length = max(events[-1]["monotonic"] - began, 1e-3)
    starts = [event for event in events if event["event"] == "start"]
    most = max(len(event["process_ids"]) for event in starts)
    last_step = max([event.get("step") or event.get("saved") or event.get("reached") or 0 for event in events] + [1])

    def x(seconds: float) -> float:
        return _LEFT + (WIDTH - _LEFT - _RIGHT) * (seconds - began) / length

    processes = [(x(time), _level(count, most, _TOP, _MIDDLE)) for time, count in _processes(events)]
    steps = [(x(time), _level(step, last_step, _MIDDLE + 24, HEIGHT - _BOTTOM)) for time, step in _steps(events)]
    parts = [
        *(_standstill(x(since), x(until)) for since, until, _ in _standstills(events)),
        *_axis("processes", most, _TOP, _MIDDLE),
        *_axis("steps", last_step, _MIDDLE + 24, HEIGHT - _BOTTOM),
        _line(processes, "processes"),
        _line(steps, "steps"),
        *(_label(x(until), text) for _, until, text in _standstills(events)[:_MOST_LABELS]),
        f'<text x="{_LEFT}" y="{HEIGHT - 8}">0 s</text>',
        f'<text x="{WIDTH - _RIGHT}" y="{HEIGHT - 8}" text-anchor="end">{length:.0f} s</text>',
    ]
    style = (
        "text{font:11px sans-serif;fill:currentColor}path{fill:none;stroke-width:2}.axis{stroke:currentColor;"
        "stroke-width:.5;opacity:.5}.processes{stroke:#2f6fde}.steps{stroke:#2e9e5b}.lost{fill:#d9534f;opacity:.25}"
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH:.0f} {HEIGHT:.0f}" role="img" '
        f'aria-label="Processes and steps over time">'
        f"<style>{style}</style>{''.join(parts)}</svg>"
    )


def _of_last_job(events: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    """Return the events from the last start of a supervisor on: its clock is that of all."""
    begins = [number for number, event in enumerate(events) if event["event"] == "start" and event["attempt"] == 0]
    return events[begins[-1] :] if begins else []


def _processes(events: Sequence[Mapping[str, Any]]) -> list[Point]:
    """Return the corners of the line of how many processes ran."""
    found: list[Point] = []
    count = 0
    for event in events:
        if event["event"] == "recovered":
            continue
        found.append((event["monotonic"], count))
        count = len(event["process_ids"]) if event["event"] == "start" else 0
        found.append((event["monotonic"], count))
    return [*found, (events[-1]["monotonic"], count)]


def _steps(events: Sequence[Mapping[str, Any]]) -> list[Point]:
    """Return the steps that were made by a time, as far as the events say."""
    found: list[Point] = [(events[0]["monotonic"], events[0].get("reached", 0))]
    for event in events:
        if event["event"] == "recovered":
            found += [(event["monotonic"] - event["seconds"], event["step"] - 1), (event["monotonic"], event["step"])]
    if events[-1].get("saved"):
        found.append((events[-1]["monotonic"], events[-1]["saved"]))
    return found


def _standstills(events: Sequence[Mapping[str, Any]]) -> list[tuple[float, float, str]]:
    """Return from when to when no new step was made, and what the picture says of it."""
    found, cause = [], ""
    for event in events:
        cause = event.get("cause", cause) if event["event"] == "start" else cause
        if event["event"] == "recovered":
            text = f"{cause} at step {event['step'] - 1:,}: {event['seconds']:.1f} s"
            found.append((event["monotonic"] - event["seconds"], event["monotonic"], text))
    return found


def _level(value: float, most: float, top: float, bottom: float) -> float:
    return bottom - (bottom - top) * value / most


def _axis(name: str, most: int, top: float, bottom: float) -> list[str]:
    return [
        f'<line class="axis" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{bottom}" y2="{bottom}"/>',
        f'<text x="{_LEFT - 6}" y="{top + 8}" text-anchor="end">{most:,}</text>',
        f'<text x="{_LEFT - 6}" y="{bottom}" text-anchor="end">{name}</text>',
    ]


def _line(points: Sequence[Point], name: str) -> str:
    return f'<path class="{name}" d="M{" L".join(f"{x:.1f} {y:.1f}" for x, y in points)}"/>'


def _standstill(since: float, until: float) -> str:
    width = max(until - since, 1.0)
    height = HEIGHT - _BOTTOM - _TOP
    return f'<rect class="lost" x="{since:.1f}" y="{_TOP}" width="{width:.1f}" height="{height}"/>'


def _label(x: float, text: str) -> str:
    return f'<text transform="translate({x + 9:.1f} {_MIDDLE - 4}) rotate(-90)">{html.escape(text)}</text>'
