"""The report as a page: one HTML file that needs no network and contains its data, its script and the chart library."""

import base64
import datetime
import functools
import gzip
import html
import importlib.metadata
import importlib.resources
import json
import os
import pathlib
import string
from collections.abc import Mapping, Sequence
from typing import Any

from jaxdist import errors, extras
from jaxdist.run.sweeps import sweep_record
from jaxdist.run.use import run_list
from jaxdist.run.use.reporting import run_data, sections, sweep_chart
from jaxdist.rundir import files

FILE_NAME = "report.html"
MOST_BYTES = 4_000_000


def write(run_dirs: Sequence[pathlib.Path], out: pathlib.Path) -> int:
    """Write the report on `run_dirs` to the file `out`, replacing an earlier report; return its number of bytes.

    Raises:
      UserError: a directory has no run, `out` is a file of another kind, Plotly is not installed, or the page would be
        too large.
    """
    run_data.check_are_runs(sweep_record.expand(run_dirs))
    check_output(out)
    with errors.as_user_error():
        page = make(run_dirs).encode(errors="surrogateescape")  # names of files in a locale without UTF-8
    if len(page) > MOST_BYTES:
        raise errors.UserError(
            f"A report can have {MOST_BYTES / 1e6:.0f} MB at most; this one would have {len(page) / 1e6:.1f} MB. "
            "Name fewer runs."
        )
    with errors.as_user_error():
        files.write(out, [page])
    return len(page)


def check_output(out: pathlib.Path, *, kind: str = "report", of: str = "report", option: str = "--out") -> None:
    """Raise UserError unless `out` is a new file or an earlier page of this kind, in an existing folder.

    Pages are marked, and may be replaced; any other file is the user's. `of` is what messages call the page, `option`
    the option that names it.
    """
    if not out.parent.is_dir():
        raise errors.UserError(f"The folder of the {of} must exist; there is no {out.parent}. Create it.")
    if not os.access(out.parent, os.W_OK):
        raise errors.UserError(
            f"The folder of the {of} must be writable; {out.parent} is not. Name a file in another one with {option}."
        )
    mark = f'name="generator" content="jaxdist {kind}"'
    with errors.as_user_error():
        foreign = out.exists() and not (out.is_file() and mark in out.read_bytes()[:2000].decode(errors="replace"))
    if foreign:
        raise errors.UserError(
            f"{out} exists and is not a {kind}, so it is not replaced. Name another file with {option}."
        )


def make(run_dirs: Sequence[pathlib.Path], *, live: str = "") -> str:
    """Return the page on `run_dirs`; `live` is the version of the data in a page that has a server."""
    found = content(run_dirs)
    names = [run["name"] for run in found["runs"]]
    title = (
        f"Sweep {run_dirs[0].resolve().name}"
        if found["sweep"]
        else names[0]
        if len(names) == 1
        else f"{len(names)} runs"
    )
    template = string.Template(text_of("page.html"))
    parts = dict(found["parts"])
    page = template.substitute(
        parts,
        sweep_table=parts.pop("sweep"),
        title=html.escape(title),
        made=html.escape(found["made"]),
        style=text_of("page.css"),
        script=text_of("page.js"),
        data=for_script(found["runs"]),
        sweep=for_script(found["sweep"]),
        library=library(),
        version=html.escape(importlib.metadata.version("jaxdist")),
        policy=policy(live=bool(live)),
    )
    return page.replace("<body>", f'<body data-live="{html.escape(live)}">') if live else page


def content(run_dirs: Sequence[pathlib.Path]) -> dict[str, Any]:
    """Return what changes while a run trains: the data of the charts, the HTML of each part, and the present time.

    The directory of a sweep stands for those of its trials.
    """
    swept, run_dirs = sweep_chart.read(run_dirs), sweep_record.expand(run_dirs)
    runs = run_data.read(run_dirs)
    differences: Mapping[str, Any] = run_list.compare(run_dirs)["config"] if len(run_dirs) > 1 else {}
    return {
        "runs": [run.to_json() for run in runs],
        "sweep": sweep_chart.chart(*swept) if swept else None,
        "parts": {
            **sections.sections(runs, differences),
            "sweep": sweep_chart.table(*swept) if swept else "",
        },
        "made": f"Report of {datetime.datetime.now():%Y-%m-%d %H:%M:%S}",
    }


def policy(*, live: bool) -> str:
    """Return the Content-Security-Policy of the page: it loads nothing, and connects to its own server only."""
    connect = "connect-src 'self'; " if live else ""
    return f"default-src 'none'; {connect}script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"


def for_script(value: Any) -> str:
    """Return JSON for a script element, such that no string in it can end the element."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def text_of(name: str) -> str:
    """Return the content of a file of the page: its template, style or script."""
    return (importlib.resources.files(__package__) / name).read_text(encoding="utf-8")


@functools.cache
def library() -> str:
    """Return Plotly's script, compressed and in base64: 2 MB instead of 4.8."""
    with errors.as_user_error():
        plotly = extras.require("plotly.offline", extra="report")
    return base64.b64encode(gzip.compress(plotly.get_plotlyjs().encode(), mtime=0)).decode()
