"""The first screen of a run: what will be trained, on which devices, and where the results are written."""

import math
import pathlib
from typing import Any

import jax

from jaxdist.config import data_fields
from jaxdist.config.experiment import Experiment
from jaxdist.run.progress_display import format_summary
from jaxdist.rundir.remote import working_copy


def render(
    experiment: Experiment,
    *,
    params: Any,
    devices: str,
    share: str,
    steps_per_epoch: int,
    run_dir: pathlib.Path,
    step: int = 0,
    began_with: object = None,
) -> str:
    """Return the header, a fact a line.

    `params` may be shapes alone; `share` says how the examples of a step are divided. A resumed run continues from
    `step`; a new one begins with random params unless `began_with` names its weights.
    """
    data, stop = experiment.data, experiment.stop
    sets = data_fields.named_sources(data.eval)
    counts = ", ".join(f"{len(source):,} held out{f' ({name})' if name else ''}" for name, source in sets.items())
    held_out = counts or "no held-out examples"
    facts = {
        experiment.name: f"{_model_name(experiment.model)}, {count_params(params):,} params",
        "devices": f"{devices}, {experiment.strategy}, reduction {experiment.reduction}",
        "batch": f"{experiment.global_batch_size} examples a step, {share}",
        "data": f"{len(data.train):,} examples, {steps_per_epoch:,} steps an epoch; {held_out}",
        **({"stream": promise} if (promise := getattr(data.train, "promise", "")) else {}),
        "ends at": _ends(stop),
        "run directory": working_copy.shown(run_dir),
    }
    facts |= {} if began_with is None else {"begins with": str(began_with)}
    return format_summary(facts | ({"continues": f"after step {step:,}"} if step else {}))


def count(number: int, noun: str) -> str:
    """Return "1 worker" or "2 workers"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def count_params(params: Any) -> int:
    """Return the number of values in `params`."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def _model_name(model: Any) -> str:
    name = getattr(model, "__name__", type(model).__name__)
    return "NNX model" if name == "<lambda>" else str(name)


def describe_devices(mesh: jax.sharding.Mesh) -> str:
    """Return the devices of a mesh in words."""
    first = mesh.devices.flat[0]
    axes = " x ".join(f"{size} {axis}" for axis, size in mesh.shape.items())
    processes = jax.process_count()
    where = "" if processes == 1 else f" in {processes} processes"
    return f"{mesh.size} x {first.device_kind}{where} ({axes})"


def _ends(stop: Any) -> str:
    """Return the stop rules in words, that of a metric first."""
    sign = "at least" if stop.mode == "max" else "at most"
    found = [] if stop.target is None else [f"{stop.target_metric} {sign} {stop.target:g}"]
    if stop.patience is not None:
        better = "better one" if found else f"better {stop.target_metric}"
        found.append(f"{stop.patience} evaluations without a {better}")
    limits = {"steps": stop.max_steps, "epochs": stop.max_epochs, "seconds": stop.max_seconds}
    found += [f"{limit:,} {unit}" for unit, limit in limits.items() if limit is not None]
    return ", ".join(found)
