"""The parts of the report that are text and tables, as HTML: they are readable without a script."""

import html
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from jaxdist.run.stopwatch import ACCOUNTS
from jaxdist.run.use.reporting.run_data import AttemptEvent, ReportedRun
from jaxdist.rundir import confusion, record
from jaxdist.rundir.writers import format_number

_MARKS = {"running": ("●", "live"), "interrupted": ("↻", "again"), "preempted": ("↻", "again"), "hang": ("↻", "again")}
_MARKS |= {
    "nonfinite": ("✕", "bad"),
    "faulty_device": ("✕", "bad"),
    "error": ("✕", "bad"),
    "unfinished": ("?", "again"),
}
_WELL = ("✓", "good")
_NONE = "&ndash;"
_COUNTERS = {
    "updates": "updates of shards",
    "failovers": "backups that took over",
    "rollbacks": "returns to a snapshot",
    "fenced": "workers and pushes that were fenced",
    "duplicates_refused": "duplicate pushes refused",
    "torn_pushes": "torn pushes",
    "refused": "pushes that did not fit",
}


def sections(runs: Sequence[ReportedRun], differences: Mapping[str, Sequence[Any]]) -> dict[str, str]:
    """Return the HTML of each part by its place on the page; a part without content is empty.

    `differences` are the settings that differ, each with its value in every run.
    """
    return {
        "runs": "".join(_card(number, run) for number, run in enumerate(runs)),
        "metrics": _last_metrics(runs),
        "time": _times(runs),
        "restarts": "".join(part for run in runs for part in (_changes(run), _attempts(run))),
        "memory": _memory(runs),
        "servers": _servers(runs),
        "differences": _differences(runs, differences),
        "settings": "".join(map(_settings, runs)),
    }


def seconds_in_words(seconds: float) -> str:
    """Return a duration in readable form: 0 s, 250 ms, 12.3 s, 4 min 5 s, 2 h 3 min."""
    if seconds < 1:
        return f"{seconds * 1000:.3g} ms" if seconds else "0 s"
    if seconds < 59.95:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def bytes_in_words(count: float) -> str:
    """Return a size in readable form, in powers of 1024."""
    units = ["B", "KiB", "MiB", "GiB", "TiB"]
    while abs(count) >= 1024 and len(units) > 1:
        count, units = count / 1024, units[1:]
    return f"{count:.4g} {units[0]}"


def text(value: Any) -> str:
    """Return a value as text for HTML."""
    return _NONE if value is None else html.escape(format_number(value) if isinstance(value, float) else str(value))


def _card(number: int, run: ReportedRun) -> str:
    mark, kind = _MARKS.get(run.ended, _WELL)
    facts = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in _facts(run) if value)
    nonfinite = f'<pre class="why">{html.escape(run.nonfinite)}</pre>' if run.nonfinite else ""
    return (
        f'<article class="card run" data-run="{number}"><header><h2>{_swatch(number)}{html.escape(run.name)}</h2>'
        f'<span class="badge {kind}">{mark} {html.escape(run.ended)}</span></header>'
        f'<dl class="facts">{facts}</dl>{nonfinite}{_command(run)}</article>'
    )


def _facts(run: ReportedRun) -> list[tuple[str, str]]:
    made, extra = run.record, run.record.extra
    best = extra.get("best")
    p50, p95 = (made.step_seconds.get(name) for name in ("p50", "p95"))
    return [
        ("Best", f"{text(best['metric'])} {text(best['value'])} at step {best['step']:,}" if best else ""),
        ("Steps", f"{made.step:,}"),
        ("Examples", f"{made.examples_seen:,}"),
        ("Wall time", seconds_in_words(sum(made.time_seconds.values()))),
        ("Throughput", f"{made.examples_per_second:,.0f} examples/s" if made.examples_per_second else ""),
        ("Each device", _each_device(extra.get("throughput") or {})),
        ("Step", f"{seconds_in_words(p50)}, 95 % below {seconds_in_words(p95)}" if p50 and p95 else ""),
        ("Strategy", html.escape(f"{made.strategy}, {made.reduction}")),
        ("Devices", f"{made.num_devices} in {made.num_processes} process{'es' * (made.num_processes > 1)}"),
        ("Restarts", str(made.restarts) if made.restarts else ""),
        ("Compiled", f"{made.compile_count} times" if made.compile_count > 1 else ""),
        ("Started", text(str(extra["started"])[:16].replace("T", " ")) if extra.get("started") else ""),
        ("Host", text(extra["host"]) if extra.get("host") else ""),
        ("Params", f'<code title="{text(sha)}">{text(sha[:12])}</code>' if (sha := made.params_sha256) else ""),
    ]


def _each_device(found: Mapping[str, float | None]) -> str:
    """Return the throughput of one device, and how much of its arithmetic that is."""
    examples, tokens, used = (
        found.get(name)
        for name in ("examples_per_second_per_device", "tokens_per_second_per_device", "model_flops_utilization")
    )
    parts = [f"{tokens:,.0f} tokens/s" if tokens else f"{examples:,.0f} examples/s" if examples else ""]
    return ", ".join(filter(None, [*parts, f"MFU {used:.1%}" if used is not None else ""]))


def _command(run: ReportedRun) -> str:
    """Return how to repeat the run: the command and the commit of the experiment."""
    if not run.again:
        return '<p class="quiet">Started from Python: no command was recorded.</p>'
    git = run.record.extra.get("git")
    commit = (
        f"<p class=quiet>Commit <code>{text(git['commit'][:12])}</code>"
        f"{', with changes that are not in it' if git['dirty'] else ''}.</p>"
        if git
        else ""
    )
    command = html.escape(run.again)
    return f'<div class="command"><code>{command}</code><button type="button" data-copy>Copy</button></div>{commit}'


def _last_metrics(runs: Sequence[ReportedRun]) -> str:
    names = dict.fromkeys(name for run in runs for name in run.record.metrics)
    rows = [[html.escape(name), *(_last(run, name) for run in runs)] for name in names if not confusion.is_entry(name)]
    return table(["Last value", *map(_head, range(len(runs)), runs)], rows, numbers=True) if rows else ""


def _last(run: ReportedRun, name: str) -> str:
    if name not in run.record.metrics:
        return ""
    return format_number(run.record.metrics[name])


def _times(runs: Sequence[ReportedRun]) -> str:
    longest = max((sum(run.record.time_seconds.values()) for run in runs), default=0.0)
    if not longest:
        return ""
    bars = "".join(_time_bar(number, run, longest) for number, run in enumerate(runs))
    used = [name for name in ACCOUNTS if any(run.record.time_seconds.get(name) for run in runs)]
    rows = [[f'<i class="swatch {name}"></i>{name}', *(_account(run, name) for run in runs)] for name in used]
    totals = ["<b>all</b>", *(seconds_in_words(sum(run.record.time_seconds.values())) for run in runs)]
    head = ["Account", *map(_head, range(len(runs)), runs)]
    return f'<div class="bars">{bars}</div>{table(head, [*rows, totals], numbers=True)}'


def _time_bar(number: int, run: ReportedRun, longest: float) -> str:
    total = sum(run.record.time_seconds.values())
    parts = "".join(
        f'<i class="{name}" style="width:{100 * seconds / longest:.3f}%" '
        f'title="{name}: {seconds_in_words(seconds)}, {100 * seconds / total:.1f} %"></i>'
        for name in ACCOUNTS
        if (seconds := run.record.time_seconds.get(name, 0.0)) > 0
    )
    return f'<div class="bar"><span>{_swatch(number)}{html.escape(run.name)}</span><div>{parts}</div></div>'


def _account(run: ReportedRun, name: str) -> str:
    seconds, total = run.record.time_seconds.get(name, 0.0), sum(run.record.time_seconds.values())
    return f"{seconds_in_words(seconds)} <small>{100 * seconds / total:.1f} %</small>" if total else _NONE


def _changes(run: ReportedRun) -> str:
    """Return how the job changed: the restarts, joins and leaves, and what they cost."""
    changes = run.record.extra.get("changes") or []
    if not changes:
        return ""
    rows = [
        [
            text(each["kind"]),
            f"{each['step']:,}",
            f"{each['processes']}",
            _known(seconds_in_words, each["seconds_lost"]),
        ]
        for each in changes
    ]
    head = ["Change", "From step", "Processes", "Lost"]
    return f"<h3>{html.escape(run.name)}</h3>{table(head, rows)}"


def _attempts(run: ReportedRun) -> str:
    if len(run.attempts) < 2 and not any("killed" in each.ended or "status" in each.ended for each in run.attempts):
        return ""
    rows = [_attempt_row(each) for each in run.attempts]
    head = ["Attempt", "Began after", "Lasted", "Ended", "Newest saved step"]
    return f"<h3>{html.escape(run.name)}</h3>{run.timeline}{table(head, rows)}"


def _attempt_row(event: AttemptEvent) -> list[str]:
    where = f"{event.number} on {event.host}" if event.host else str(event.number)
    lasted, saved = _known(seconds_in_words, event.seconds), _known("{:,}".format, event.saved_step)
    return [html.escape(where), seconds_in_words(event.started), lasted, html.escape(event.ended), saved]


def _memory(runs: Sequence[ReportedRun]) -> str:
    peaks = [run.record.extra.get("peak_memory_bytes") or {} for run in runs]
    devices = sorted({device for each in peaks for device in each}, key=lambda device: (len(device), device))
    if not devices:
        return '<p class="quiet">The devices do not report how much memory they use; CPU devices never do.</p>'
    rows = [
        [f"device {html.escape(device)}", *(_known(bytes_in_words, each.get(device)) for each in peaks)]
        for device in devices
    ]
    return table(["Most memory", *map(_head, range(len(runs)), runs)], rows, numbers=True)


def _servers(runs: Sequence[ReportedRun]) -> str:
    counts = [run.record.extra.get("ps") or {} for run in runs]
    if not any(counts):
        return ""
    rows = [
        [words, *(f"{each[name]:,}" if name in each else _NONE for each in counts)] for name, words in _COUNTERS.items()
    ]
    pictures = [f"<h3>{html.escape(run.name)}</h3>{run.leases}" for run in runs if run.leases]
    return table(["Parameter server", *map(_head, range(len(runs)), runs)], rows, numbers=True) + "".join(pictures)


def _differences(runs: Sequence[ReportedRun], differences: Mapping[str, Sequence[Any]]) -> str:
    if len(runs) < 2:
        return ""
    if not differences:
        return '<p class="quiet">The runs have the same settings.</p>'
    rows = [[f"<code>{html.escape(name)}</code>", *map(text, values)] for name, values in differences.items()]
    return table(["Setting", *map(_head, range(len(runs)), runs)], rows)


def _settings(run: ReportedRun) -> str:
    flat = record.flat("", run.record.config) | record.flat("versions", run.record.versions)
    rows = [[f"<code>{html.escape(name)}</code>", text(value)] for name, value in flat.items()]
    return f"<details><summary>{html.escape(run.name)}</summary>{table(['Setting', 'Value'], rows)}</details>"


def _known(words: Callable[[Any], str], value: Any) -> str:
    return _NONE if value is None else words(value)


def _head(number: int, run: ReportedRun) -> str:
    return f"{_swatch(number)}{html.escape(run.name)}"


def _swatch(number: int) -> str:
    return f'<i class="swatch" style="background:var(--run-{number % 8})"></i>'


def table(head: Iterable[str], rows: Iterable[Iterable[str]], *, numbers: bool = False) -> str:
    """Return a table of cells that are already HTML; wide tables scroll."""
    body = "".join(f"<tr>{_cells('td', row)}</tr>" for row in rows)
    kind = ' class="numbers"' if numbers else ""
    head_row = f"<thead><tr>{_cells('th', head)}</tr></thead>"
    return f"<div class=scroll><table{kind}>{head_row}<tbody>{body}</tbody></table></div>"


def _cells(tag: str, row: Iterable[str]) -> str:
    return "".join(f"<{tag}>{cell}</{tag}>" for cell in row)
