"""The coordinate check of muP (Yang et al., 2022, appendix D): activations in a few steps, by layer, at several widths.

Under muP the size of an activation, and of its change by training, stays about the same at every width, or shrinks; in
the standard parametrization some of them grow with the width from the first update on.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdist import errors
from jaxdist.config.experiment import Experiment
from jaxdist.config.overrides import override
from jaxdist.errors import UserError
from jaxdist.run import components, preflight

GROWS = 0.35
"""An activation that grows faster than this power of the width grows with it; the noise of one seed is below."""


@dataclasses.dataclass(frozen=True)
class Coordinates:
    """The mean absolute activation of each layer.

    Attributes:
      widths: in ascending order.
      sizes: layer -> for each number of steps, from 0, its size at each width.
      changes: layer -> the same, of the difference from the activation before the first step.
    """

    widths: Sequence[int]
    sizes: Mapping[str, Sequence[Sequence[float]]]
    changes: Mapping[str, Sequence[Sequence[float]]]

    def slope(self, layer: str) -> float:
        """Return with which power of the width the activation grows after the last step."""
        return power(self.widths, self.sizes[layer][-1])

    def slope_of_change(self, layer: str) -> float:
        """Return with which power of the width the change since the start grows, after the last step."""
        return power(self.widths, self.changes[layer][-1])

    def growing(self) -> list[str]:
        """Return the layers that grow with the width."""
        return [layer for layer in self.sizes if max(self.slope(layer), self.slope_of_change(layer)) > GROWS]

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain data."""
        slopes = {layer: [self.slope(layer), self.slope_of_change(layer)] for layer in self.sizes}
        return dataclasses.asdict(self) | {"slopes": slopes, "growing": self.growing()}


def power(widths: Sequence[int], values: Sequence[float]) -> float:
    """Return the exponent of the power of the width that fits the values best; infinite where one is not finite.

    Values of which one is 0 do not grow.
    """
    if not all(map(math.isfinite, values)):
        return math.inf
    if min(values) <= 0:
        return 0.0
    return float(np.polyfit(np.log(widths), np.log(values), 1)[0])


def check(
    experiment: Experiment, devices: Sequence[jax.Device], *, widths: Sequence[int], num_steps: int
) -> Coordinates:
    """Train a few steps at each width on one batch, and return the sizes of all activations.

    Raises:
      UserError: the model has no width, or no layers that can be looked at, or would be refused.
    """
    if not hasattr(experiment.model, "width") or not hasattr(experiment.model, "apply"):
        raise UserError(
            "A coordinate check changes model.width and looks at the layers of a Linen module; this model is "
            f"{type(experiment.model).__name__}. Give it a field width."
        )
    if len(widths) < 2 or sorted(set(widths)) != list(widths):
        raise UserError(f"--widths takes two widths or more, ascending, such as 64,128,256; got {list(widths)}.")
    found = [_at_width(override(experiment, [f"model.width={width}"]), devices, num_steps) for width in widths]
    layers = [layer for layer in found[0] if all(layer in each for each in found)]
    by_step = range(num_steps + 1)
    sizes = {layer: [[each[layer][step][0] for each in found] for step in by_step] for layer in layers}
    changes = {layer: [[each[layer][step][1] for each in found] for step in by_step] for layer in layers}
    return Coordinates(list(widths), sizes, changes)


def _at_width(
    experiment: Experiment, devices: Sequence[jax.Device], num_steps: int
) -> dict[str, list[tuple[float, float]]]:
    """Return for each layer, after each number of steps, the size of its activation and of its change."""
    with errors.as_user_error():
        preflight.check_settings(experiment)
        parts = components.put_together(experiment, devices=devices)
        state = parts.create_state()
    batch, _ = next(parts.batches())
    look = jax.jit(lambda params: activations(experiment, params, state.model_state, batch))
    first = look(state.params)
    found: dict[str, list[tuple[float, float]]] = {layer: [] for layer in first}
    for step in range(num_steps + 1):
        now = look(state.params)
        for layer, value in now.items():
            found[layer].append((float(jnp.mean(jnp.abs(value))), float(jnp.mean(jnp.abs(value - first[layer])))))
        if step < num_steps:
            state, _ = parts.step(state, batch)
    return found


def activations(
    experiment: Experiment, params: Any, model_state: Any, batch: Mapping[str, Any]
) -> dict[str, jax.Array]:
    """Return the output of every layer of a Linen module, by its path; the model's own is `output`."""
    names = (experiment.inputs,) if isinstance(experiment.inputs, str) else experiment.inputs
    variables = {"params": params, **(model_state or {})}
    _, kept = experiment.model.apply(
        variables, *(batch[name] for name in names), train=False, capture_intermediates=True, mutable=["intermediates"]
    )
    found: dict[str, jax.Array] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(kept["intermediates"]):
        keys = [str(getattr(key, "key", "")) for key in path]
        layer = "/".join(key for key in keys if key and key != "__call__") or "output"
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            found[layer] = leaf.astype(jnp.float32)
    return found


def render(found: Coordinates) -> str:
    """Return a table of 80 columns: after the last step, each layer at each width, and with which power it grows."""
    shown = [found.widths[index] for index in sorted({0, len(found.widths) // 2, len(found.widths) - 1})]
    columns = [found.widths.index(width) for width in shown]
    steps = len(next(iter(found.sizes.values()))) - 1
    lines = [
        f"Mean |activation| after {steps} steps, and the powers of the width with which",
        "it and its change grow",
        "",
    ]
    lines.append(f"{'layer':<28}{''.join(f'{width:>11}' for width in shown)}{'power':>8}{'change':>8}")
    for layer, sizes in found.sizes.items():
        name = layer if len(layer) <= 27 else f"…{layer[-26:]}"
        cells = "".join(f"{sizes[-1][column]:>11.4g}" for column in columns)
        lines.append(f"{name:<28}{cells}{found.slope(layer):>8.2f}{found.slope_of_change(layer):>8.2f}")
    growing = found.growing()
    more = ", ..." if len(growing) > 3 else ""
    verdict = (
        f"{len(growing)} of {len(found.sizes)} layers grow with the width: {', '.join(growing[:3])}{more}."
        if growing
        else "No layer grows with the width."
    )
    return "\n".join([*lines, "", verdict])
