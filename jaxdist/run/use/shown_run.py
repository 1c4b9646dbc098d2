"""How a trained run shows itself: a line, a table in a terminal, a table in a notebook."""

import html
from collections.abc import Mapping
from typing import Any

from rich.table import Table

from jaxdist.rundir import confusion, record
from jaxdist.rundir.writers import format_number


def rows(run_dir: object, step: int, made: record.RunRecord) -> dict[str, str]:
    """Return what is shown of a run, by name."""
    best: Mapping[str, Any] = made.extra.get("best") or {}
    found = {
        "run directory": str(run_dir),
        "checkpoint": f"step {step}",
        "ended": f"{made.end_reason or 'not yet'} at step {made.step}",
        "trained on": f"{made.examples_seen:,} examples, {made.num_devices} devices, {made.strategy}",
        "seconds": f"{sum(made.time_seconds.values()):.1f}",
    }
    if best:
        found[f"best {best['metric']}"] = f"{format_number(best['value'])} (step {best['step']})"
    values = confusion.without_entries(made.metrics).items()
    return found | {name: format_number(value) for name, value in values if value is not None}


def as_line(run_dir: object, step: int, made: record.RunRecord) -> str:
    """Return a run in a line."""
    shown = [f"{name}={format_number(value)}" for name, value in confusion.evaluated(made.metrics).items()]
    return f"TrainedRun({', '.join([repr(str(run_dir)), f'step={step}', *shown])})"


def as_table(found: Mapping[str, str]) -> Table:
    """Return the rows as a table for a terminal."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, value in found.items():
        table.add_row(name, value, style=None)
    return table


def as_html(found: Mapping[str, str]) -> str:
    """Return the rows as a table of HTML."""
    cells = (f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>" for name, value in found.items())
    return f"<table>{''.join(cells)}</table>"
