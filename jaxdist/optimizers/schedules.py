"""Schedules: how the learning rate moves over a run, as a factor of its peak.

The one idea: a schedule is a shape. `Schedule` only describes it; `factor` gives the fraction of the peak at a place in
the run. The peak itself is no part of it, and enters the compiled step as an input: another learning rate needs
no new compile.
"""

import math
from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp

from jaxdist.setting_group import setting_group

Name: TypeAlias = Literal[
    "constant", "cosine", "linear", "exponential", "step", "inverse_sqrt", "warmup_stable_decay", "one_cycle"
]

NAMES: tuple[Name, ...] = (
    "constant",
    "cosine",
    "linear",
    "exponential",
    "step",
    "inverse_sqrt",
    "warmup_stable_decay",
    "one_cycle",
)
_ENDLESS = ("constant", "step", "inverse_sqrt")
"""Schedules without an end, for runs of any length."""

ONE_CYCLE_RISE = 0.3
ONE_CYCLE_START = 1 / 25
"""The rise of one-cycle (Smith and Topin, 2018) takes this part of the run, from this fraction of the peak."""


@setting_group
class Schedule:
    """How the learning rate moves: a linear warm-up, then the shape called `name`."""

    name: Name = "constant"
    """constant; cosine and linear: down to the end; exponential: by one factor a step; step: by `decay_factor` at each
    of `boundaries`; inverse_sqrt: with the square root of the steps (Vaswani et al., 2017); warmup_stable_decay:
    constant, then linear over the last `decay_fraction`; one_cycle: up by a cosine and down again (Smith and Topin,
    2018)."""
    warmup: float | None = None
    """Length of the warm-up, in `unit`. None: none, or that of Goyal et al. where the learning rate is scaled up."""
    length: float | None = None
    """Where the decay ends, in `unit`, counted from the first step. None: at the end of the run, max_steps or
    max_epochs of its stop rule; then a run with another end has another schedule from its first step on."""
    final_fraction: float = 0.0
    """The learning rate after the decay, as a fraction of its peak."""
    boundaries: tuple[float, ...] = ()
    """step: where the learning rate falls, in `unit`, counted from the first step."""
    decay_factor: float = 0.1
    """step: what the learning rate is multiplied by at each boundary."""
    decay_fraction: float = 0.1
    """warmup_stable_decay: the last part of what follows the warm-up, in which the learning rate falls."""
    unit: Literal["steps", "epochs"] = "steps"
    """What warmup, length and boundaries count. Epochs follow the examples trained on, also after a change of the batch
    size."""

    def __post_init__(self) -> None:
        check_choice("schedule.name", self.name, NAMES)
        check_choice("schedule.unit", self.unit, ("steps", "epochs"))
        check_range("schedule.warmup", self.warmup, at_least=0)
        check_range("schedule.length", self.length, above=0)
        check_range("schedule.final_fraction", self.final_fraction, at_least=0)
        check_range("schedule.decay_factor", self.decay_factor, above=0)
        check_range("schedule.decay_fraction", self.decay_fraction, above=0, at_most=1)
        for boundary in self.boundaries:
            check_range("schedule.boundaries", boundary, above=0)

    @property
    def ends(self) -> bool:
        """Whether the schedule needs to know where the run ends."""
        return self.name not in _ENDLESS

    def check(self) -> None:
        """Raise ValueError where settings contradict each other or have no effect."""
        if not self.ends and (self.length is not None or self.final_fraction):
            raise ValueError(
                f"A {self.name} schedule has no end: optimizer.schedule.length and final_fraction have no effect. "
                "Leave them out, or set optimizer.schedule.name to one that decays, such as cosine or linear."
            )
        if (self.name == "step") != bool(self.boundaries):
            raise ValueError(
                "optimizer.schedule.boundaries belong to the schedule 'step', which needs them; got "
                f"name={self.name!r} and boundaries={self.boundaries}. Set both, or neither."
            )
        if self.name == "exponential" and not self.final_fraction:
            raise ValueError(
                "An exponential decay never reaches 0: set optimizer.schedule.final_fraction, the fraction of the "
                "peak that is left at its end."
            )
        if self.name == "one_cycle" and self.warmup:
            raise ValueError("one_cycle rises by itself: leave optimizer.schedule.warmup out.")


def factor(schedule: Schedule, count: jax.Array, done: jax.Array, *, warmup: int, steps_per_unit: float) -> jax.Array:
    """Return the fraction of the peak after the warm-up of so many steps.

    `count` are the finished steps, float32; `done` is the part of the decay that is over, in [0, 1], unused by
    schedules without an end; `schedule.unit` has `steps_per_unit`.
    """
    match schedule.name:
        case "constant":
            return jnp.ones_like(done)
        case "step":
            passed = sum((count >= round(each * steps_per_unit)).astype(jnp.float32) for each in schedule.boundaries)
            return jnp.float32(schedule.decay_factor) ** passed
        case "inverse_sqrt":
            return jax.lax.rsqrt(jnp.maximum(count + 1, max(warmup, 1)) / max(warmup, 1))
        case "exponential":
            return jnp.float32(schedule.final_fraction) ** done
        case "linear":
            left = 1 - done
        case "cosine":
            left = 0.5 + 0.5 * jnp.cos(math.pi * done)
        case "warmup_stable_decay":
            left = jnp.clip((1 - done) / schedule.decay_fraction, 0.0, 1.0)
        case "one_cycle":
            return _one_cycle(schedule, done)
    return schedule.final_fraction + (1 - schedule.final_fraction) * left


def _one_cycle(schedule: Schedule, done: jax.Array) -> jax.Array:
    rise = 0.5 - 0.5 * jnp.cos(math.pi * jnp.clip(done / ONE_CYCLE_RISE, 0.0, 1.0))
    fall = 0.5 + 0.5 * jnp.cos(math.pi * jnp.clip((done - ONE_CYCLE_RISE) / (1 - ONE_CYCLE_RISE), 0.0, 1.0))
    rising = ONE_CYCLE_START + (1 - ONE_CYCLE_START) * rise
    falling = schedule.final_fraction + (1 - schedule.final_fraction) * fall
    return jnp.where(done < ONE_CYCLE_RISE, rising, falling)


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}; got {value!r}.")


def check_range(
    name: str,
    value: float | None,
    *,
    at_least: float | None = None,
    above: float | None = None,
    below: float = math.inf,
    at_most: float = math.inf,
) -> None:
    """Raise ValueError unless value is None, or a number in the range. NaN is outside every range."""
    if value is None:
        return
    rule = f"at least {at_least}" if above is None else f"above {above}"
    rule += "" if below == math.inf else f" and below {below}"
    rule += "" if at_most == math.inf else f" and at most {at_most}"
    low_enough = value < below and value <= at_most
    high_enough = value >= at_least if at_least is not None else value > (above or 0)
    if not (low_enough and high_enough):
        raise ValueError(f"{name} must be {rule}; got {value}.")
