"""The roofline of a chip as a drawing (SVG), with where a step stands under it.

The axes are logarithmic: FLOPs per byte of memory traffic, and FLOP/s of one device. Under the slanted line memory
bounds a program, under the level one arithmetic does (Williams, Waterman and Patterson, 2009).
"""

import dataclasses
import html
import math

from jaxdist.plan.estimate import Estimate

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 720, 340, 78, 18, 16, 46
_DECADES = 4.0
"""How many powers of ten the drawing has in each direction, at least."""


@dataclasses.dataclass(frozen=True)
class Point:
    """A step under the roof.

    Attributes:
      intensity: FLOPs per byte of memory traffic.
      reached: FLOP/s of one device if nothing but the bounds held it up.
      roof: FLOP/s that the roof allows at this intensity.
    """

    intensity: float
    reached: float
    roof: float


def place(made: Estimate) -> Point:
    """Return where the step of a plan stands."""
    flops = made.flops_per_step / made.num_devices
    intensity = flops / (made.bound_seconds["memory"] * made.peak_bytes_per_second)
    roof = min(made.peak_flops_per_second, intensity * made.peak_bytes_per_second)
    return Point(intensity, flops / made.step_seconds, roof)


def draw(made: Estimate) -> str:
    """Return the drawing as an SVG element, in the colors of the page it is in."""
    at = place(made)
    ridge = made.peak_flops_per_second / made.peak_bytes_per_second
    scale = _Scale(
        [math.log10(value) for value in (ridge, at.intensity)],
        [math.log10(value) for value in (made.peak_flops_per_second, at.reached)],
    )
    first, last = 10**scale.x_min, 10**scale.x_max
    roof = [
        (first, first * made.peak_bytes_per_second),
        (ridge, made.peak_flops_per_second),
        (last, made.peak_flops_per_second),
    ]
    line = " ".join(f"{scale.x(x):.1f},{scale.y(max(y, 10**scale.y_min)):.1f}" for x, y in _clipped(roof, scale, made))
    x, y = scale.x(at.intensity), scale.y(at.reached)
    right = x > WIDTH / 2
    label = f"{html.escape(made.experiment)}: bound by {made.bound_by}"
    return (
        f'<svg class="roofline" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="Roofline of {made.topology}">'
        f"{scale.grid()}"
        f'<polyline class="roof" points="{line}"/>'
        f'<line class="drop" x1="{x:.1f}" y1="{y:.1f}" x2="{x:.1f}" y2="{HEIGHT - BOTTOM}"/>'
        f'<line class="gap" x1="{x:.1f}" y1="{y:.1f}" x2="{x:.1f}" y2="{scale.y(at.roof):.1f}"/>'
        f'<circle class="step" cx="{x:.1f}" cy="{y:.1f}" r="6"/>'
        f'<text class="name" x="{x + (-10 if right else 10):.1f}" y="{y + 22:.1f}" '
        f'text-anchor="{"end" if right else "start"}">{label}</text></svg>'
    )


def _clipped(roof: list[tuple[float, float]], scale: "_Scale", made: Estimate) -> list[tuple[float, float]]:
    """Return the roof without the part below the drawing."""
    lowest = 10**scale.y_min
    if roof[0][1] < lowest:
        roof = [(lowest / made.peak_bytes_per_second, lowest), *roof[1:]]
    return roof


class _Scale:
    """Powers of ten to places in the drawing."""

    def __init__(self, xs: list[float], ys: list[float]):
        self.x_min, self.x_max = _range(xs)
        self.y_min, self.y_max = _range(ys)

    def x(self, value: float) -> float:
        share = (math.log10(value) - self.x_min) / (self.x_max - self.x_min)
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        share = (math.log10(value) - self.y_min) / (self.y_max - self.y_min)
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

    def grid(self) -> str:
        parts = []
        for power in range(math.ceil(self.x_min), math.floor(self.x_max) + 1):
            x = self.x(10.0**power)
            parts.append(f'<line class="grid" x1="{x:.1f}" y1="{TOP}" x2="{x:.1f}" y2="{HEIGHT - BOTTOM}"/>')
            parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{_power(power)}</text>')
        for power in range(math.ceil(self.y_min), math.floor(self.y_max) + 1):
            y = self.y(10.0**power)
            parts.append(f'<line class="grid" x1="{LEFT}" y1="{y:.1f}" x2="{WIDTH - RIGHT}" y2="{y:.1f}"/>')
            parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{_power(power)}</text>')
        middle = LEFT + (WIDTH - LEFT - RIGHT) / 2
        parts.append(
            f'<text x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">FLOPs per byte of memory traffic</text>'
        )
        high = TOP + (HEIGHT - TOP - BOTTOM) / 2
        parts.append(
            f'<text transform="translate(14 {high}) rotate(-90)" text-anchor="middle">FLOP/s of one device</text>'
        )
        return "".join(parts)


def _range(values: list[float]) -> tuple[float, float]:
    low, high = math.floor(min(values)) - 0.3, math.ceil(max(values)) + 0.3
    missing = max(_DECADES - (high - low), 0.0)
    return low - missing / 2, high + missing / 2


def _power(power: int) -> str:
    return {0: "1", 1: "10", 2: "100", 3: "1000"}.get(power, f'10<tspan dy="-5" font-size="9">{power}</tspan>')
