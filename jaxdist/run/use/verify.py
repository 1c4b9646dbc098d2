"""`jaxdist verify`: a few steps of an experiment on several numbers of devices, compared with one device."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax

from jaxdist import errors
from jaxdist.config.experiment import Experiment, LayoutSettings
from jaxdist.run import components, preflight
from jaxdist.rundir import record
from jaxdist.spmd.step import NONFINITE_LEAF

TOLERANCE = 1e-5
"""Largest difference of a parameter, relative to the largest parameter, that reordered float32 additions can cause."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One layout: its number of devices, SHA-256 of the params, largest difference from one device, and the verdict.

    Difference and verdict include params and model_state.
    """

    num_devices: int
    params_sha256: str
    largest_difference: float
    verdict: str


@dataclasses.dataclass(frozen=True)
class Verification:
    """The table of layouts; `kept` is False when a promise was broken."""

    title: str
    rows: list[Row]
    kept: bool
    conclusion: str

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain data."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        lines = [self.title, f"{'devices':>7}  {'params SHA-256':<16}  {'largest difference':>18}  verdict"]
        lines += [
            f"{row.num_devices:>7}  {row.params_sha256[:16]:<16}  {row.largest_difference:>18.3g}  {row.verdict}"
            for row in self.rows
        ]
        return "\n".join([*lines, self.conclusion])


def verify(experiment: Experiment, *, devices: Sequence[jax.Device], num_steps: int = 5) -> Verification:
    """Train `num_steps` steps on 1, 2, 4, 8 of `devices` and compare the params with those of one device.

    Numbers are left out that exceed the available devices or do not fit the experiment's mesh. The reference is the
    one-device step of the strategy data-parallel, for every strategy.

    Canonical reduction promises the same bits, with the experiment's own optimizer. The mean promises one device's
    params up to the order of additions. That is compared under SGD, because an adaptive optimizer turns a tiny
    difference of a gradient near zero into a whole step. It is promised only if nothing in a step is drawn or computed
    per device: with dropout or batch statistics each device has its own, and the table shows how far apart the layouts
    then are.

    Raises:
      UserError: the experiment does not work on these layouts, or its loss is not finite.
    """
    canonical = experiment.reduction == "canonical"
    if not canonical:
        experiment = dataclasses.replace(experiment, optimizer=optax.sgd(0.1))
    with errors.as_user_error():
        preflight.check_settings(experiment)
        alone = dataclasses.replace(experiment, strategy="data-parallel", mesh=None, layout=LayoutSettings())
        specification = components.put_together(alone, devices=devices[:1])
        counts = _device_counts(experiment.mesh, len(devices))
        parts = {n: components.put_together(experiment, devices=devices[:n]) for n in counts}
    exact = not canonical and _is_deterministic(specification)
    reference = _train(specification, num_steps)
    done = {1: reference} if experiment.strategy == "data-parallel" else {}
    trained = {n: done[n] if n in done else _train(part, num_steps) for n, part in parts.items()}
    rows = [_compare(n, trained[n], reference, canonical=canonical, exact=exact) for n in parts]
    kept = all(row.verdict in ("identical", "equal", "apart") for row in rows)
    return Verification(_title(experiment, num_steps), rows, kept, _conclude(rows, canonical=canonical, exact=exact))


def _device_counts(axes: Mapping[str, int] | None, available: int) -> list[int]:
    """Return those of 1, 2, 4, 8, or the size of the whole mesh, that fit the mesh axes and the available devices."""
    sizes = list((axes or {"data": -1}).values())
    known = math.prod(size for size in sizes if size > 0)
    counts = [n for n in (1, 2, 4, 8) if n % known == 0] if -1 in sizes else [known]
    fitting = [n for n in counts if n <= available]
    if not fitting:
        raise ValueError(
            f"The mesh {axes} needs {'a multiple of ' if -1 in sizes else ''}{known} devices, and there are "
            f"{available}. Change --devices or --set mesh."
        )
    return fitting


def _train(parts: components.Parts, num_steps: int) -> Any:
    """Return params and model_state after so many steps."""
    state = parts.create_state()
    batches = parts.batches()
    for _ in range(num_steps):
        batch, _ = next(batches)
        state, metrics = parts.step(state, batch)
    if int(metrics[NONFINITE_LEAF]) >= 0:
        # The params would be those before the first such step, on every layout.
        raise errors.UserError(
            f"The loss or a gradient is not finite within {num_steps} steps on {parts.strategy.mesh.size} devices, so "
            "there is nothing to compare. Lower the learning rate, or train to see which leaf and rows it is."
        )
    return jax.tree.map(np.asarray, jax.device_get((state.params, state.model_state)))


def _is_deterministic(parts: components.Parts) -> bool:
    """Return whether the loss is the same with two keys and the model keeps no statistics."""
    state = parts.create_state()
    if state.model_state is not None:
        return False
    batch, _ = next(parts.batches())
    loss = jax.jit(parts.functions.loss_fn)
    first, second = (loss(state.params, batch, jax.random.key(seed)) for seed in (1, 2))
    return all(bool(np.array_equal(a, b)) for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True))


def _compare(num_devices: int, trained: Any, reference: Any, *, canonical: bool, exact: bool) -> Row:
    pairs = list(zip(jax.tree.leaves(trained), jax.tree.leaves(reference), strict=True))
    difference = max(float(np.max(np.abs(_double(a) - _double(b)), initial=0.0)) for a, b in pairs)
    scale = max(float(np.max(np.abs(b), initial=0.0)) for b in jax.tree.leaves(reference[0]))
    digest = record.params_sha256(trained[0])
    if record.params_sha256(trained) == record.params_sha256(reference):
        verdict = "identical"
    elif canonical:
        verdict = "BROKEN: other bits"
    elif difference <= TOLERANCE * scale:
        verdict = "equal"
    else:
        verdict = "BROKEN: too far apart" if exact or not np.isfinite(difference) else "apart"
    return Row(num_devices, digest, difference, verdict)


def _double(leaf: np.ndarray) -> np.ndarray:
    return leaf.astype(np.complex128 if np.iscomplexobj(leaf) else np.float64)


def _title(experiment: Experiment, num_steps: int) -> str:
    optimizer = "its own optimizer" if experiment.reduction == "canonical" else "SGD"
    return (
        f"{experiment.name}: {num_steps} steps with {optimizer}, strategy {experiment.strategy}, "
        f"reduction {experiment.reduction}"
    )


def _conclude(rows: Sequence[Row], *, canonical: bool, exact: bool) -> str:
    broken = [row.num_devices for row in rows if row.verdict.startswith("BROKEN")]
    if broken:
        return f"Promise broken on {broken} devices."
    if canonical:
        return "Promise kept: the same bits on every layout."
    if exact:
        return f"Promise kept: every layout equals one device to {TOLERANCE:g} of the largest parameter."
    return (
        "Nothing is promised here: dropout or batch statistics differ per device under reduction mean. "
        "Use --reduction canonical for the same bits."
    )
