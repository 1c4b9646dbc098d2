"""The plan as text: tables that fit 80 columns."""

import pathlib
import shlex
import textwrap
from collections.abc import Iterable, Sequence

from jaxdist.plan import device_sweep
from jaxdist.plan.compiled.live_buffers import Buffer
from jaxdist.plan.device_sweep import SweepRow
from jaxdist.plan.estimate import Estimate
from jaxdist.plan.search import Candidate

MOST_LINES = 5
WIDTH = 80
_INSTALLED = pathlib.Path(__file__).parents[3]


def render(made: Estimate, *, price_per_hour: float | None = None) -> str:
    """Return the plan of one way to train."""
    mesh = " x ".join(f"{name} {size}" for name, size in made.mesh.items())
    devices = f"{made.num_devices} device{'s' if made.num_devices > 1 else ''}"
    lines = [
        f"{made.experiment} on {made.topology}: {devices} ({mesh}), {made.strategy}",
        f"{made.num_params:,} params, {made.global_batch_size} examples a step, {made.num_microbatches} "
        f"microbatch{'es' if made.num_microbatches > 1 else ''}",
        "",
        "Memory of one device",
        *_rows((name, size_text(size)) for name, size in _kinds(made)),
        f"  {'total':<14} {size_text(made.bytes.total):>12}   {_verdict(made)}",
        "",
        "Largest arrays in memory at the peak",
        *map(_buffer, made.buffers),
        "",
        "Collectives, sent by each device in a step",
        *_collectives(made),
        "",
        *_step(made, price_per_hour),
    ]
    if made.note:
        lines += ["", *textwrap.wrap(made.note, WIDTH)]
    return "\n".join(lines)


def _step(made: Estimate, price_per_hour: float | None) -> list[str]:
    """Return the time of a step and what follows from it."""
    most = "" if made.predicted_seconds else "at most "
    tokens = "" if made.tokens_per_second is None else f", {made.tokens_per_second:,.0f} tokens/s"
    lines = [
        "A step takes at least" + ("" if made.measured_rates else " (model: peak rates, nothing was measured)"),
        *_rows((name, seconds_text(seconds)) for name, seconds in made.bound_seconds.items()),
    ]
    if made.predicted_seconds:
        reason = textwrap.wrap(f"predicted by {made.calibration}", WIDTH - 2)
        lines += [*_rows([("predicted", seconds_text(made.predicted_seconds))]), *(f"  {each}" for each in reason)]
    lines += [
        f"  bound by {made.bound_by}: {most}{made.examples_per_second:,.0f} examples/s{tokens}",
        f"  {made.flops_per_step:.3g} FLOPs a step, MFU {most}{made.model_flops_utilization:.0%}",
        "  MFU = FLOPs of a step / (its seconds x devices x peak FLOP/s of one)",
        f"  input: {made.examples_per_second:,.0f} examples/s and {size_text(made.input_bytes_per_second)}/s "
        "keep it busy",
    ]
    if made.delivered_examples_per_second:
        lines.append(f"  input: one process on this machine read {made.delivered_examples_per_second:,.0f} examples/s")
    if made.compiler_seconds:
        lines.append(f"  the compiler's own estimate: {seconds_text(made.compiler_seconds)}")
    spent = made.cost(price_per_hour)
    if spent:
        price = f", {spent['price']:,.2f} at {price_per_hour:g} an hour" if "price" in spent else ""
        lines.append(f"  {made.steps:,} steps: {hours_text(spent['hours'])}{price}")
    return lines


def render_search(candidates: Sequence[Candidate], command: Sequence[str]) -> str:
    """Return the candidates of a search as a table, and the command that trains in the best way.

    `command` trains the experiment that was planned; it ends with the assignments of `--set`, if any.
    """
    lines = [f"{'bytes/device':>13} {'step':>10}  {'fits':<5} settings"]
    for each in candidates:
        lines += _candidate(each)
    best = candidates[0] if candidates else None
    if best is None or not best.works:
        compiled = any(each.estimate for each in candidates)  # not so where a search was interrupted, or all is refused
        end = "Nothing fits: use more or larger devices." if compiled else "Nothing was compiled, so nothing is known."
        return "\n".join([*lines, "", end])
    chosen = best.assignments if "--set" in command else ("--set", *best.assignments)
    return "\n".join([*lines, "", f"Best: {shlex.join([*command, *chosen])}"])


def _candidate(candidate: Candidate) -> list[str]:
    """Return a row of a search, and what does not fit beside its figures in lines below."""
    made, what = candidate.estimate, list(candidate.assignments)
    if made is None:
        figures = f"{'':>13} {'':>10}  {'-':<5} "
        what += [textwrap.shorten(f"refused: {candidate.refused}", 2 * (WIDTH - len(figures)), placeholder=" ...")]
    else:
        fits = "-" if made.fits is None else "yes" if made.fits else "no"
        figures = f"{size_text(made.bytes.total):>13} {seconds_text(made.step_seconds):>10}  {fits:<5} "
    beside = [line for each in what for line in textwrap.wrap(each, WIDTH - len(figures), break_on_hyphens=False)]
    rows = [beside[0]]
    for each in beside[1:]:
        joined = f"{rows[-1]} {each}"
        rows[-1:] = [joined] if len(joined) <= WIDTH - len(figures) else [rows[-1], each]
    return [f"{figures if not number else ' ' * len(figures)}{row}" for number, row in enumerate(rows)]


def render_sweep(rows: Sequence[SweepRow]) -> str:
    """Return predicted efficiency over numbers of devices: examples/s per device, beside those of the first row."""
    lines = [f"{'devices':>8} {'step':>10} {'examples/s':>12} {'efficiency':>11} {'bytes/device':>13}  bound by"]
    for row in rows:
        made = row.made
        rate = made.global_batch_size / made.step_seconds
        bar = "#" * round(10 * min(row.efficiency, 1.0))
        mark = "*" if row.extrapolated else " "
        lines.append(
            f"{made.num_devices:>8}{mark}{seconds_text(made.step_seconds):>10} {rate:>12,.0f} {row.efficiency:>11.0%} "
            f"{size_text(made.bytes.total):>13}  {made.bound_by:<8} {bar}"
        )
    reasons = dict.fromkeys(row.extrapolated for row in rows if row.extrapolated)
    notes = [line for reason in reasons for line in textwrap.wrap(f"* extrapolated: {reason}", WIDTH)]
    return "\n".join([*lines, "", *_network(rows), *notes])


def _network(rows: Sequence[SweepRow]) -> list[str]:
    """Return where the network takes over, and what would help there."""
    first = device_sweep.takes_over(rows)
    if first is None:
        return ["The network bounds no step on the largest number of devices."]
    relief = rows[-1].relief
    return [
        f"The network bounds the step from {first} devices on. On {rows[-1].made.num_devices} it would not with",
        f"{relief} times the examples a device, by a larger batch or by {relief} times the microbatches of a",
        "step: gradients are sent once for all of them.",
    ]


def size_text(size: float) -> str:
    """Return a number of bytes with a binary unit."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.2f} {unit}"
        size /= 1024
    return f"{size:.2f} TiB"


def hours_text(hours: float) -> str:
    """Return the time of a whole run: hours, or minutes and less where it is short."""
    if hours >= 1:
        return f"{hours:,.2f} h"
    return f"{60 * hours:.1f} min" if hours >= 1 / 60 else seconds_text(3600 * hours)


def seconds_text(seconds: float) -> str:
    """Return a duration with a fitting unit."""
    for factor, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")):
        if seconds >= factor:
            return f"{seconds / factor:.3g} {unit}"
    return f"{seconds / 1e-9:.3g} ns"


def _kinds(made: Estimate) -> list[tuple[str, int]]:
    kinds = ("params", "opt_state", "model_state", "batch", "gradients", "activations", "padding", "program")
    return [(name, getattr(made.bytes, name)) for name in kinds if getattr(made.bytes, name)]


def _rows(rows: Iterable[tuple[str, str]]) -> list[str]:
    return [f"  {name:<14} {text:>12}" for name, text in rows]


def _collectives(made: Estimate) -> list[str]:
    if not made.collectives:
        return ["  none"]
    rows = [f"  {kind:<20} {count:>4} x {size_text(sent):>12}" for kind, (count, sent) in made.collectives.items()]
    if len(made.mesh) > 1:
        rows += [f"    {size_text(sent):>12} across {axes or 'no axis'}" for axes, sent in made.collective_axes.items()]
    lines = [(line, sent) for line, sent in made.collective_lines.items() if line][:MOST_LINES]
    return [*rows, *(f"    {size_text(sent):>12} from {short_line(line)}" for line, sent in lines)]


def _buffer(buffer: Buffer) -> str:
    times = f"{buffer.count} x " if buffer.count > 1 else ""
    what = short_line(buffer.line) if buffer.line else buffer.what
    shown = f"  {times + size_text(buffer.num_bytes):>17}  {buffer.shape:<22} "
    return shown + _end(what, max(WIDTH - len(shown), 20))


def _end(text: str, most: int) -> str:
    """Return the end of a text that is longer than `most`, at the beginning of a name where it is a path."""
    if len(text) <= most:
        return text
    kept = text[3 - most :]
    return f"...{kept[kept.find('/') :] if '/' in kept else kept}"


def short_line(line: str) -> str:
    """Return `FILE:LINE` relative to the working directory, or to where this package is installed, if it is in one."""
    path, colon, number = line.rpartition(":")
    for folder in (pathlib.Path.cwd(), _INSTALLED):
        if pathlib.Path(path).is_relative_to(folder):
            return f"{pathlib.Path(path).relative_to(folder)}{colon}{number}"
    return line


def _verdict(made: Estimate) -> str:
    if made.device_memory is None:
        return "(of this machine's memory)"
    spare = made.device_memory - made.bytes.total
    what = f"fits, {size_text(spare)} to spare" if spare >= 0 else f"DOES NOT FIT, {size_text(-spare)} too much"
    return f"of {size_text(made.device_memory)}: {what}"
