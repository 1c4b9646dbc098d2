"""The learning-rate range test (Smith, 2017): the rate rises exponentially from step to step while the loss is watched.

The suggestion is the rate at which the smoothed loss falls steepest over the logarithm of the rate, before its least
value; and a tenth of the rate of that least value, another rule. Both are those of fastai's `lr_find`, and so are the
smoothing by a corrected moving average and the end once the smoothed loss is four times its least.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdist import errors
from jaxdist.config.experiment import Experiment
from jaxdist.errors import UserError
from jaxdist.optimizers import Optimizer, Schedule
from jaxdist.run import components, preflight

SMOOTHING = 0.9
DIVERGED = 4.0
"""The test ends once the smoothed loss is so many times its least value."""
_LEAST_POINTS = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class RateRange:
    """What a range test found.

    Attributes:
      rates: of the steps made.
      losses: of each step's batch, before its update.
      smoothed: the losses after smoothing.
      diverged: whether it ended before the last rate.
      steepest: the suggestion, None if the loss never fell.
      careful: a tenth of the rate of the least loss.
      scale: what `optimizer.learning_rate` is multiplied by in the experiment, for its batch size.
    """

    rates: Sequence[float]
    losses: Sequence[float]
    smoothed: Sequence[float]
    diverged: bool
    steepest: float | None
    careful: float
    scale: float = 1.0

    @property
    def setting(self) -> float | None:
        """The suggestion as the experiment's `optimizer.learning_rate`."""
        return None if self.steepest is None else float(f"{self.steepest / self.scale:.2g}")

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain data."""
        return dataclasses.asdict(self) | {"setting": self.setting}


def parse(text: str) -> tuple[float, float]:
    """Return the two rates of LOW:HIGH.

    Raises:
      UserError: these are none.
    """
    try:
        low, high = map(float, text.split(":"))
    except ValueError:
        low = high = math.nan
    if not 0 < low < high < math.inf:
        raise UserError(f"--range takes the first and the last learning rate, such as 1e-6:1; got {text!r}.")
    return low, high


def rate_at(low: float, high: float, num_steps: int, count: Any) -> Any:
    """Return the learning rate after `count` steps: from `low` to `high` in equal factors."""
    return low * (high / low) ** (jnp.minimum(count, num_steps - 1) / (num_steps - 1))


def with_rising_rate(experiment: Experiment, low: float, high: float, num_steps: int) -> Experiment:
    """Return the experiment with a learning rate that rises from `low` to `high` in `num_steps` steps.

    Raises:
      UserError: the rate of its optimizer is not ours to set.
    """
    described = experiment.optimizer
    if not isinstance(described, Optimizer):
        raise UserError(
            "A range test sets the learning rate of each step, and that of an optax optimizer is inside it. Describe "
            "the optimizer as jaxdist.Optimizer(name=..., learning_rate=...)."
        )
    if experiment.strategy == "parameter-server":
        raise UserError(
            "A range test is made by one process; a parameter server has several. Choose another --strategy."
        )
    rising = dataclasses.replace(
        described,
        learning_rate=lambda count: rate_at(low, high, num_steps, count),
        schedule=Schedule(),
        base_batch_size=None,
    )
    return dataclasses.replace(experiment, optimizer=rising)


def run(experiment: Experiment, devices: Sequence[jax.Device], *, low: float, high: float, num_steps: int) -> RateRange:
    """Train up to `num_steps` steps with a rising rate, from new params, and return what the loss did.

    Nothing is written. It ends where the loss diverges or is not finite.

    Raises:
      UserError: anything that would refuse the run.
    """
    rising = with_rising_rate(experiment, low, high, num_steps)
    with errors.as_user_error():
        preflight.check_settings(rising)
        parts = components.put_together(rising, devices=devices)
        state = parts.create_state()
    rates = [float(rate_at(low, high, num_steps, count)) for count in range(num_steps)]
    losses: list[float] = []
    for (batch, _), _ in zip(parts.batches(), rates):
        state, metrics = parts.step(state, batch)
        loss = float(metrics["loss"])
        if not math.isfinite(loss):
            break
        losses.append(loss)
        if has_diverged(losses):
            break
    described = experiment.optimizer
    base = described.base_batch_size if isinstance(described, Optimizer) else None
    return judge(rates, losses, scale=experiment.global_batch_size / (base or experiment.global_batch_size))


def smooth(losses: Sequence[float]) -> list[float]:
    """Return the exponential moving average of the losses, corrected for its start at 0."""
    found, average = [], 0.0
    for number, loss in enumerate(losses, 1):
        average = SMOOTHING * average + (1 - SMOOTHING) * loss
        found.append(average / (1 - SMOOTHING**number))
    return found


def has_diverged(losses: Sequence[float]) -> bool:
    """Return whether the last smoothed loss is far above the least one."""
    smoothed = smooth(losses)
    least = min(smoothed)
    return len(smoothed) > 1 and smoothed[-1] > DIVERGED * abs(least)


def judge(rates: Sequence[float], losses: Sequence[float], *, scale: float = 1.0) -> RateRange:
    """Return what the losses at some rates say; there may be more rates than losses, where the test ended early.

    Raises:
      UserError: the loss was not finite almost from the start.
    """
    if len(losses) < _LEAST_POINTS:
        raise UserError(
            f"A range test needs {_LEAST_POINTS} finite losses; got {len(losses)} before the loss was not finite, at "
            f"the learning rate {rates[len(losses) - 1]:.3g}. Begin lower: --range."
        )
    made, smoothed = list(rates[: len(losses)]), smooth(losses)
    least = int(np.argmin(smoothed))
    slopes = np.gradient(np.asarray(smoothed), np.log10(made))[: least + 1]
    steepest = int(np.argmin(slopes))
    return RateRange(
        rates=made,
        losses=list(losses),
        smoothed=smoothed,
        diverged=len(losses) < len(rates),
        steepest=made[steepest] if slopes[steepest] < 0 else None,
        careful=made[least] / 10,
        scale=scale,
    )


def render(found: RateRange, *, num_rows: int = 12) -> str:
    """Return the curve in some rows, and the suggestion."""
    places = sorted({round(place) for place in np.linspace(0, len(found.rates) - 1, num_rows)})
    least, most = min(found.smoothed), max(found.smoothed[place] for place in places)
    lines = [f"{'learning rate':>13} {'loss':>10} {'smoothed':>10}"]
    for place in places:
        bar = "#" * round(30 * (found.smoothed[place] - least) / ((most - least) or 1))
        values = (found.losses[place], found.smoothed[place])
        lines.append(f"{found.rates[place]:>13.3g} {values[0]:>10.4g} {values[1]:>10.4g}  {bar}".rstrip())
    lines += [""] + (["The loss diverged there."] if found.diverged else [])
    if found.setting is None:
        return "\n".join([*lines, "The loss never fell, so no rate is suggested. Begin lower, or take more --steps."])
    lines.append(f"Steepest fall at {found.steepest:.2g}; a tenth of the rate of the least loss: {found.careful:.2g}.")
    lines.append(f"Suggestion:  --set optimizer.learning_rate={found.setting:.2g}")
    return "\n".join(lines)
