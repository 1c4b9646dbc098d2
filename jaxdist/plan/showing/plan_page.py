"""A plan as a page: one HTML file without a script that loads nothing, in the style of `jaxdist report`."""

import dataclasses
import datetime
import html
import importlib.metadata
import importlib.resources
import pathlib
import re
import string
from collections.abc import Sequence

from jaxdist import errors
from jaxdist.plan.device_sweep import SweepRow
from jaxdist.plan.estimate import Estimate
from jaxdist.plan.search import Candidate
from jaxdist.plan.showing import efficiency_chart, plan_text, roofline
from jaxdist.plan.showing.plan_text import seconds_text, size_text
from jaxdist.run.use.reporting import report_page, sections
from jaxdist.rundir import files

_KINDS = {
    "params": 0,
    "opt_state": 6,
    "model_state": 7,
    "batch": 2,
    "gradients": 1,
    "activations": 5,
    "padding": 3,
    "program": 4,
}
"""Kinds of memory and the colors they are drawn in."""


@dataclasses.dataclass(frozen=True)
class Page:
    """What a page shows.

    Attributes:
      title: of the page.
      made: the plan that the page begins with.
      parts: headings and their HTML.
      text: what the command prints.
      price_per_hour: of the whole topology; None where it is not known.
    """

    title: str
    made: Estimate
    parts: Sequence[tuple[str, str]]
    text: str
    price_per_hour: float | None = None


def of_plan(made: Estimate, text: str, *, price_per_hour: float | None = None) -> Page:
    """Return the page of one way to train."""
    return Page(f"{made.experiment} on {made.topology}", made, _parts(made), text, price_per_hour)


def of_search(found: Sequence[Candidate], text: str, *, price_per_hour: float | None = None) -> Page | None:
    """Return the page of a search, about its best candidate; None where not one compiled."""
    best = next((each.estimate for each in found if each.estimate), None)
    if best is None:
        return None
    rows = [[html.escape(" ".join(each.assignments)), *_candidate_cells(each.estimate, each.refused)] for each in found]
    step = "A step, predicted" if best.predicted_seconds else "A step at least"
    table = sections.table(["Settings", "Memory of a device", step, "Bound by", "Fits"], rows)
    return Page(
        f"{best.experiment} on {best.topology}: search",
        best,
        [("All ways that were tried", table), *_parts(best)],
        text,
        price_per_hour,
    )


def of_sweep(rows: Sequence[SweepRow], text: str) -> Page:
    """Return the page of a sweep over numbers of devices, about the largest."""
    cells = [
        [
            f"{row.made.num_devices:,}",
            seconds_text(row.made.step_seconds),
            f"{row.efficiency:.0%}",
            row.made.bound_by,
            f"{row.relief} times the examples" if row.relief > 1 else "&ndash;",
            f"extrapolated: {html.escape(row.extrapolated)}" if row.extrapolated else "compiled",
        ]
        for row in rows
    ]
    table = sections.table(
        ["Devices", "A step at least", "Efficiency", "Bound by", "Network no longer bounds with", "Source"], cells
    )
    last = rows[-1].made
    return Page(
        f"{last.experiment}: {rows[0].made.num_devices} to {last.num_devices} devices",
        last,
        [("Efficiency", f"{efficiency_chart.draw(rows)}{table}"), *_parts(last)],
        text,
    )


def write(page: Page, out: pathlib.Path) -> int:
    """Write the page to the file `out`, replacing an earlier plan; return its number of bytes."""
    check_output(out)
    content = render(page).encode()
    with errors.as_user_error():
        files.write(out, [content])
    return len(content)


def check_output(out: pathlib.Path) -> None:
    """Raise UserError unless `out` is a new file or an earlier plan, in an existing folder."""
    report_page.check_output(out, kind="plan", of="page")


def render(page: Page) -> str:
    """Return the page as HTML."""
    made = page.made
    style = report_page.text_of("page.css")
    dark = re.search(r':root\[data-theme="dark"\] (\{.*?\n\})', style, re.DOTALL)
    assert dark is not None, "page.css has no dark theme"
    badge, verdict = _verdict(made)
    return string.Template((importlib.resources.files(__package__) / "plan_page.html").read_text("utf-8")).substitute(
        title=html.escape(page.title),
        heading=html.escape(f"{made.num_devices} device{'s' if made.num_devices > 1 else ''}, {made.strategy}"),
        style=style,
        dark=f":root {dark[1]}",
        made=f"Planned {datetime.datetime.now():%Y-%m-%d %H:%M:%S}",
        badge=badge,
        verdict=verdict,
        facts="".join(
            f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in _facts(made, page.price_per_hour)
        ),
        rates=html.escape(_rates(made)),
        parts="".join(
            f'<section><h2>{name}</h2><div class="card">{content}</div></section>' for name, content in page.parts
        ),
        text=html.escape(page.text),
        version=html.escape(importlib.metadata.version("jaxdist")),
    )


def _verdict(made: Estimate) -> tuple[str, str]:
    if made.device_memory is None:
        return "live", "this machine's memory"
    spare = size_text(abs(made.device_memory - made.bytes.total))
    return ("good", f"fits, {spare} to spare") if made.fits else ("bad", f"does not fit, {spare} too much")


def _rates(made: Estimate) -> str:
    label = "measured on this machine" if made.measured_rates else f"model, not measured: peak rates of {made.source}"
    predicted = f" The time of a step is predicted by {made.calibration}." if made.calibration else ""
    bounds = f"Bounds are lower bounds; rates: {label}.{predicted}"
    return f"{bounds} Bytes and collectives are the compiled program's. {made.note}"


def _facts(made: Estimate, price: float | None) -> list[tuple[str, str]]:
    spent = made.cost(price)
    delivered, tokens = made.delivered_examples_per_second, made.tokens_per_second
    least, most = ("predicted", "predicted") if made.predicted_seconds else ("at least", "at most")
    facts = [
        ("mesh", " x ".join(f"{name} {size}" for name, size in made.mesh.items())),
        ("params", f"{made.num_params:,}"),
        ("examples a step", f"{made.global_batch_size:,}"),
        ("FLOPs a step", f"{made.flops_per_step:.3g}"),
        (f"a step, {least}", seconds_text(made.step_seconds)),
        (f"examples/s, {most}", f"{made.examples_per_second:,.0f}"),
        *([(f"tokens/s, {most}", f"{tokens:,.0f}")] if tokens else []),
        ("bound by", made.bound_by),
        (f"MFU, {most}", f"{made.model_flops_utilization:.0%}"),
        ("input must deliver", f"{size_text(made.input_bytes_per_second)}/s"),
    ]
    facts += [("input delivers here", f"{delivered:,.0f} examples/s")] if delivered else []
    facts += [(f"{made.steps:,} steps", plan_text.hours_text(spent["hours"]))] if spent else []
    return facts + ([("price", f"{spent['price']:,.2f} at {price:g} an hour")] if "price" in spent else [])


def _parts(made: Estimate) -> list[tuple[str, str]]:
    return [
        ("Memory of one device", _memory(made)),
        ("Largest arrays in memory at the peak", _buffers(made)),
        ("What bounds the step", _bounds(made)),
        ("Roofline", _roofline(made)),
        ("Collectives", _collectives(made)),
    ]


def _memory(made: Estimate) -> str:
    whole = max(made.bytes.total, made.device_memory or 0)
    held = [(name, getattr(made.bytes, name), color) for name, color in _KINDS.items() if getattr(made.bytes, name)]
    bars = "".join(
        f'<i style="width:{100 * size / whole:.2f}%;background:var(--run-{color})" title="{name}"></i>'
        for name, size, color in held
    )
    legend = "".join(
        f'<span><i class="swatch" style="background:var(--run-{color})"></i>{name} {size_text(size)}</span>'
        for name, size, color in held
    )
    of = f" of {size_text(made.device_memory)}" if made.device_memory else ""
    total = f"<p><b>{size_text(made.bytes.total)}</b>{of}</p>"
    return f'{total}<div class="memory">{bars}</div><div class="legend">{legend}</div>'


def _buffers(made: Estimate) -> str:
    rows = [
        [size_text(each.num_bytes), str(each.count), f"<code>{html.escape(each.shape)}</code>",
         f"<code>{html.escape(plan_text.short_line(each.line) if each.line else '-')}</code>", html.escape(each.what)]
        for each in made.buffers
    ]  # fmt: skip
    return sections.table(["Bytes", "Arrays", "Shape", "Line", "Made by"], rows)


def _bounds(made: Estimate) -> str:
    shown = {**made.bound_seconds, **({"predicted": made.predicted_seconds} if made.predicted_seconds else {})}
    longest = max(shown.values())
    bars = "".join(
        f'<div class="bar"><span>{name}</span><div><i style="width:{100 * seconds / longest:.2f}%"></i></div>'
        f"<b>{seconds_text(seconds)}</b></div>"
        for name, seconds in shown.items()
    )
    formula = "<p class=quiet>MFU = FLOPs of a step / (time of a step x devices x peak FLOP/s of one)</p>"
    own = f"<p>The compiler's own estimate: {seconds_text(made.compiler_seconds)}</p>" if made.compiler_seconds else ""
    return f'<div class="bounds">{bars}</div>{own}{formula}'


def _roofline(made: Estimate) -> str:
    at = roofline.place(made)
    reached = "predicted" if made.predicted_seconds else "what the bounds allow"
    return (
        f'<div class="scroll roofline-box">{roofline.draw(made)}</div>'
        f"<p>{at.intensity:,.1f} FLOPs for each byte of memory traffic: the roof is "
        f"{_rate_text(at.roof)}, and {reached} is {_rate_text(at.reached)} of one device.</p>"
    )


def _rate_text(flops_per_second: float) -> str:
    factor, unit = (1e12, "T") if flops_per_second >= 1e12 else (1e9, "G")
    return f"{flops_per_second / factor:,.3g} {unit}FLOP/s"


def _collectives(made: Estimate) -> str:
    if not made.collectives:
        return "<p>None.</p>"
    kinds = sections.table(
        ["Kind", "A step", "Sent by each device"],
        ([kind, str(count), size_text(sent)] for kind, (count, sent) in made.collectives.items()),
    )
    axes = sections.table(
        ["Axis of the mesh", "Sent by each device"],
        ([html.escape(axis) or "&ndash;", size_text(sent)] for axis, sent in made.collective_axes.items()),
    )
    lines = [(line, sent) for line, sent in made.collective_lines.items() if line][: plan_text.MOST_LINES]
    caused = sections.table(
        ["Line", "Sent by each device"],
        ([f"<code>{html.escape(plan_text.short_line(line))}</code>", size_text(sent)] for line, sent in lines),
    )
    return kinds + axes + caused


def _candidate_cells(made: Estimate | None, refused: str) -> list[str]:
    if made is None:
        return ["&ndash;", "&ndash;", "&ndash;", html.escape(f"refused: {refused.splitlines()[0]}")]
    fits = "&ndash;" if made.fits is None else "yes" if made.fits else "no"
    return [size_text(made.bytes.total), seconds_text(made.step_seconds), made.bound_by, fits]
