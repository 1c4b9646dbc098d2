"""The plan as text: tables that fit 80 columns."""

from collections.abc import Iterable, Sequence

from jaxdist.plan.estimate import Estimate
from jaxdist.plan.search import Candidate

MOST_LINES = 5


def render(made: Estimate, *, price_per_hour: float | None = None) -> str:
    """Return the plan of one way to train."""
    mesh = " x ".join(f"{name} {size}" for name, size in made.mesh.items())
    lines = [
        f"{made.experiment} on {made.topology}: {made.num_devices} devices ({mesh}), {made.strategy}",
        f"{made.num_params:,} params, {made.global_batch_size} examples a step, {made.num_microbatches} microbatch(es)",
        "",
        "Memory of one device",
        *_rows((name, size_text(size)) for name, size in _kinds(made)),
        f"  {'total':<14} {size_text(made.bytes.total):>12}   {_verdict(made)}",
        "",
        "Collectives, sent by each device in a step",
        *_collectives(made),
        "",
        "A step takes at least" + ("" if made.measured_rates else " (model: peak rates of the data sheet)"),
        *_rows((name, seconds_text(seconds)) for name, seconds in made.bound_seconds.items()),
        f"  bound by {made.bound_by}: at most {made.global_batch_size / made.step_seconds:,.0f} examples/s",
        f"  {made.flops_per_step:.3g} FLOPs a step, MFU at most {made.model_flops_utilization:.0%}",
    ]
    if made.compiler_seconds:
        lines.append(f"  the compiler's own estimate: {seconds_text(made.compiler_seconds)}")
    spent = made.cost(price_per_hour)
    if spent:
        price = f", {spent['price']:,.2f} at {price_per_hour:g} an hour" if "price" in spent else ""
        lines.append(f"  {made.steps:,} steps: {spent['hours']:,.2f} h{price}")
    return "\n".join(lines)


def render_search(candidates: Sequence[Candidate]) -> str:
    """Return the candidates of a search as a table, and the best as arguments."""
    lines = [f"{'strategy':<14} {'microbatches':>12} {'bytes/device':>13} {'step':>10}  fits"]
    for each in candidates:
        strategy, count = (assignment.partition("=")[2] for assignment in each.assignments)
        made = each.estimate
        figures = (
            f"{'':>13} {'':>10}  refused: {each.refused.splitlines()[0][:70]}"
            if made is None
            else f"{size_text(made.bytes.total):>13} {seconds_text(made.step_seconds):>10}  {_fits_text(made)}"
        )
        lines.append(f"{strategy:<14} {count:>12} {figures}")
    best = candidates[0]
    verdict = f"Best: --set {' '.join(best.assignments)}" if best.works else "Nothing fits: use more or larger devices."
    return "\n".join([*lines, "", verdict])


def render_sweep(made: Sequence[Estimate]) -> str:
    """Return predicted efficiency over numbers of devices: examples/s per device, beside those of the first row."""
    lines = [f"{'devices':>8} {'step':>10} {'examples/s':>12} {'efficiency':>11} {'bytes/device':>13}  bound by"]
    base = made[0].global_batch_size / made[0].step_seconds / made[0].num_devices
    for each in made:
        rate = each.global_batch_size / each.step_seconds
        efficiency = rate / each.num_devices / base
        lines.append(
            f"{each.num_devices:>8} {seconds_text(each.step_seconds):>10} {rate:>12,.0f} {efficiency:>11.0%} "
            f"{size_text(each.bytes.total):>13}  {each.bound_by}"
        )
    return "\n".join(lines)


def size_text(size: float) -> str:
    """Return a number of bytes with a binary unit."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.2f} {unit}"
        size /= 1024
    return f"{size:.2f} TiB"


def seconds_text(seconds: float) -> str:
    """Return a duration with a fitting unit."""
    for factor, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")):
        if seconds >= factor:
            return f"{seconds / factor:.3g} {unit}"
    return f"{seconds / 1e-9:.3g} ns"


def _kinds(made: Estimate) -> list[tuple[str, int]]:
    kinds = ("params", "opt_state", "model_state", "batch", "gradients", "activations", "program")
    return [(name, getattr(made.bytes, name)) for name in kinds if getattr(made.bytes, name)]


def _rows(rows: Iterable[tuple[str, str]]) -> list[str]:
    return [f"  {name:<14} {text:>12}" for name, text in rows]


def _collectives(made: Estimate) -> list[str]:
    if not made.collectives:
        return ["  none"]
    rows = [f"  {kind:<20} {count:>4} x {size_text(sent):>12}" for kind, (count, sent) in made.collectives.items()]
    lines = [(line, sent) for line, sent in made.collective_lines.items() if line][:MOST_LINES]
    return [*rows, *(f"    {size_text(sent):>12} from {line}" for line, sent in lines)]


def _verdict(made: Estimate) -> str:
    if made.device_memory is None:
        return "(of this machine's memory)"
    spare = made.device_memory - made.bytes.total
    what = f"fits, {size_text(spare)} to spare" if spare >= 0 else f"DOES NOT FIT, {size_text(-spare)} too much"
    return f"of {size_text(made.device_memory)}: {what}"


def _fits_text(made: Estimate) -> str:
    return "-" if made.fits is None else "yes" if made.fits else "no"
