"""Predicted efficiency over the number of devices as a drawing (SVG)."""

import math
from collections.abc import Sequence

from jaxdist.plan.device_sweep import SweepRow

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 720, 260, 60, 18, 14, 44


def draw(rows: Sequence[SweepRow]) -> str:
    """Return the drawing: points bound by the network are in another color."""
    counts = [math.log2(row.made.num_devices) for row in rows]
    span = max(counts[-1] - counts[0], 1.0)
    places = [
        (LEFT + (count - counts[0]) / span * (WIDTH - LEFT - RIGHT), _height(row.efficiency))
        for count, row in zip(counts, rows, strict=True)
    ]
    grid = "".join(
        f'<line class="grid" x1="{LEFT}" y1="{_height(share):.1f}" x2="{WIDTH - RIGHT}" y2="{_height(share):.1f}"/>'
        f'<text x="{LEFT - 8}" y="{_height(share) + 4:.1f}" text-anchor="end">{share:.0%}</text>'
        for share in (0, 0.25, 0.5, 0.75, 1)
    )
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    points = "".join(_point(row, x, y) for row, (x, y) in zip(rows, places, strict=True))
    return (
        f'<svg class="roofline" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="Efficiency over devices">{grid}'
        f'<polyline class="roof" points="{line}"/>{points}'
        f'<text x="{WIDTH / 2}" y="{HEIGHT - 4}" text-anchor="middle">devices</text></svg>'
    )


def _height(efficiency: float) -> float:
    return HEIGHT - BOTTOM - min(efficiency, 1.1) * (HEIGHT - TOP - BOTTOM) / 1.1


def _point(row: SweepRow, x: float, y: float) -> str:
    color = "var(--run-1)" if row.made.bound_by == "network" else "var(--accent)"
    return (
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{color}"><title>bound by {row.made.bound_by}</title></circle>'
        f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{row.made.num_devices}</text>'
    )
