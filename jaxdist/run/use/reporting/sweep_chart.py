"""The parallel coordinates of a sweep: an axis for each setting and one for the metric, a line for each trial.

Positions on the axes are computed here, from 0 at the bottom to 1; the page only draws them.
"""

import html
import math
import pathlib
import shlex
from collections.abc import Sequence
from typing import Any

from jaxdist.run.sweeps import ranking, sweep_record
from jaxdist.run.use.reporting import run_data, sections
from jaxdist.rundir import record
from jaxdist.rundir.writers import format_number

LOG_FROM = 10.0
"""Numbers whose largest is so many times their smallest, all above 0, are on a logarithmic axis."""
_MOST_TICKS = 6
_TICK_DISTANCE = 0.06
"""Ticks that are nearer to each other would be drawn over each other."""


def read(paths: Sequence[pathlib.Path]) -> tuple[pathlib.Path, sweep_record.Sweep] | None:
    """Return the sweep of a report, if it is a report on one sweep alone."""
    return (
        (paths[0], sweep_record.Sweep.read(paths[0])) if len(paths) == 1 and sweep_record.is_sweep(paths[0]) else None
    )


def chart(sweep_dir: pathlib.Path, sweep: sweep_record.Sweep) -> dict[str, Any]:
    """Return the axes and the lines, the best trial last, so that it is drawn over the others."""
    ranked = [each for each in ranking.rank(sweep_dir, sweep) if each.value is not None]
    heads = ranking.columns(sweep)
    columns = [[each.trial.settings.get(path, "") for each in ranked] for path in heads]
    columns.append([format_number(each.value) for each in ranked])
    axes = [axis(name, values) for name, values in zip([*heads.values(), sweep.metric], columns, strict=True)]
    lines = [_line(place, each, len(ranked), axes, heads, sweep.metric) for place, each in enumerate(ranked)]
    return {"axes": [{"name": each["name"], "ticks": each["ticks"]} for each in axes], "lines": lines[::-1]}


def _line(
    place: int, each: ranking.Ranked, count: int, axes: Sequence[Any], heads: dict[str, str], metric: str
) -> dict[str, Any]:
    settings = [f"{name} {each.trial.settings.get(path, '')}" for path, name in heads.items()]
    return {
        "y": [one["places"][place] for one in axes],
        "quality": 1.0 if count == 1 else 1 - place / (count - 1),
        "text": [f"{place + 1}.", *settings, f"{metric} {format_number(each.value)} at step {each.step}"],
    }


def axis(name: str, values: Sequence[str]) -> dict[str, Any]:
    """Return an axis: its name, the place of each value, and its ticks.

    Numbers are on a linear or a logarithmic scale; other values are equally far apart, in the order of their texts.
    """
    try:
        numbers = [float(value) for value in values]
    except ValueError:
        numbers = []
    if not numbers or not all(map(math.isfinite, numbers)):
        return _named(name, values)
    low, high = min(numbers), max(numbers)
    log = low > 0 and high / low >= LOG_FROM
    scale = math.log if log else float

    def place(number: float) -> float:
        return 0.5 if low == high else round((scale(number) - scale(low)) / (scale(high) - scale(low)), 4)

    ticks = sorted(set(numbers))
    if len(ticks) > _MOST_TICKS:
        shares = [step / (_MOST_TICKS - 1) for step in range(_MOST_TICKS)]
        ticks = [low * (high / low) ** share if log else low + (high - low) * share for share in shares]
    return {
        "name": name,
        "places": [place(number) for number in numbers],
        "ticks": _apart([[place(number), f"{number:.3g}"] for number in ticks]),
    }


def _apart(ticks: Sequence[list[Any]]) -> list[list[Any]]:
    """Return the ticks from the bottom up that are far enough apart; the highest always stays."""
    kept: list[list[Any]] = []
    for tick in ticks[:-1]:
        near_last = ticks[-1][0] - tick[0] < _TICK_DISTANCE
        if not near_last and (not kept or tick[0] - kept[-1][0] >= _TICK_DISTANCE):
            kept.append(tick)
    return [*kept, ticks[-1]]


def _named(name: str, values: Sequence[str]) -> dict[str, Any]:
    known = sorted(set(values))
    places = {
        value: 0.5 if len(known) == 1 else round(index / (len(known) - 1), 4) for index, value in enumerate(known)
    }
    return {
        "name": name,
        "places": [places[value] for value in values],
        "ticks": [[places[each], each] for each in known],
    }


def table(sweep_dir: pathlib.Path, sweep: sweep_record.Sweep) -> str:
    """Return the ranking as HTML, with the command of the best trial."""
    ranked = ranking.rank(sweep_dir, sweep)
    heads = ranking.columns(sweep)
    names = ["rank", *heads.values(), sweep.metric, "step", "ended", "seconds", "trial"]
    cells = (_cells(place, each, heads) for place, each in enumerate(ranked, 1))
    return sections.table(map(html.escape, names), cells) + (
        _best(sweep_dir, ranked[0]) if ranked and ranked[0].works else ""
    )


def _cells(place: int, each: ranking.Ranked, heads: dict[str, str]) -> list[str]:
    why = each.trial.refused or each.trial.failed or ""
    ended = f'<span title="{html.escape(why)}">{html.escape(each.ended)}</span>'
    settings = [html.escape(each.trial.settings.get(path, "")) for path in heads]
    value = "&ndash;" if each.value is None else format_number(each.value)
    rank = str(place) if each.works else "&ndash;"
    return [rank, *settings, value, str(each.step), ended, f"{each.seconds:.1f}", html.escape(each.trial.name)]


def _best(sweep_dir: pathlib.Path, best: ranking.Ranked) -> str:
    command = record.RunRecord.read(sweep_dir / best.trial.name).command
    again = html.escape(run_data.repeating(command)) if command else shlex.quote(best.trial.name)
    return (
        f'<p class="quiet">The best again:</p><div class="command"><code>{again}</code>'
        '<button type="button" data-copy>Copy</button></div>'
    )
