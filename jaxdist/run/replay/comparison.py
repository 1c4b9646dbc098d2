"""`jaxdist diff`: the first step, leaf and logical shard in which two canonical runs differ, read from their chains."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax

from jaxdist import errors
from jaxdist.config.experiment import Experiment
from jaxdist.run.replay import step_chain
from jaxdist.rundir import record
from jaxdist.spmd.canonical import thread_pool

_DECIDING = (
    "model",
    "loss",
    "inputs",
    "data",
    "optimizer",
    "global_batch_size",
    "stop",
    "reduction",
    "logical_shards",
    "num_microbatches",
    "precision",
    "seed",
    "init_from",
)
"""The settings that may decide the bits of a step. The stop rule is one, because schedules may end with it."""
_COMPILERS = ("jax", "jaxlib")
_THREADS = "cpu_threads"
_SETTINGS = "jax_settings"
_PREDICTS = "model.predict_fn "
_MOST_NAMED = 5


def same_bits_expected(experiment: Experiment, earlier: record.RunRecord) -> bool:
    """Return whether `experiment`, in this process, must make the steps of a recorded run with the same bits."""
    return not changed_versions(earlier) and not changed_since(earlier, experiment)


def changed_since(earlier: record.RunRecord, experiment: Experiment) -> list[str]:
    """Return which settings of a recorded run that decide the bits are others in `experiment`."""
    return _changed(earlier.config, json.loads(json.dumps(record.plain(experiment))), _DECIDING)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """How two runs compare.

    Attributes:
      equal: whether all steps that both made have the same hashes.
      steps: the last step that both have made.
      compared: how many steps are recorded in both.
      first_difference: the first step that differs, and in what; None if there is none.
      settings: how the settings that decide the bits differ, first -> second.
      versions: how the versions of JAX, its settings, or the number of its threads on CPU devices, differ.
      message: all this in sentences.
    """

    equal: bool
    steps: int
    compared: int
    first_difference: step_chain.Difference | None
    settings: list[str]
    versions: list[str]
    message: str

    def to_json(self) -> dict[str, Any]:
        """Return the comparison as plain data."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        return self.message


def compare(first_dir: pathlib.Path, second_dir: pathlib.Path) -> Comparison:
    """Return how the steps of two runs compare.

    Raises:
      UserError: a directory holds no run, the run is not canonical or has no chain, or the chains are of other models.
    """
    first, second = record.of_run(first_dir), record.of_run(second_dir)
    chains = _chain(first_dir, first), _chain(second_dir, second)
    settings = _changed(first.config, second.config, _DECIDING)
    versions = _changed_compilers(_compilers(first), _compilers(second))
    _check_same_form(chains[0].form, chains[1].form, settings)
    steps = min(first.step, second.step, len(chains[0].entries), len(chains[1].entries))
    compared = _num_in_both(*chains, steps)
    if not compared:
        damage = "".join(_damage(chain, run_dir) for chain, run_dir in zip(chains, (first_dir, second_dir)))
        raise errors.UserError(
            f"The chains of {first_dir} and {second_dir} have no step in common, so there is nothing to compare. Train "
            f"both with guards.step_hashes=true from the first step on.{damage}"
        )
    found = step_chain.first_difference(*chains, range(1, steps + 1))
    message = _message(found, steps, compared, (first_dir, second_dir), (first.step, second.step), settings + versions)
    for run_dir, made, chain in zip((first_dir, second_dir), (first, second), chains):
        if found is None and len(chain.entries) < made.step:
            message += f" The chain of {run_dir} ends at step {len(chain.entries)} of {made.step}: the rest is unknown."
        message += _damage(chain, run_dir)
    return Comparison(found is None, steps, compared, found, settings, versions, message)


def _damage(chain: step_chain.StepChain, run_dir: pathlib.Path) -> str:
    """Return which steps of a chain were not compared because their entries are damaged; "" if none."""
    if not chain.damaged:
        return ""
    named = ", ".join(map(str, chain.damaged[:_MOST_NAMED])) + (" and more" if chain.damaged[_MOST_NAMED:] else "")
    return f" {run_dir / step_chain.FILE_NAME} is damaged at step {named}: this was not compared."


def _chain(run_dir: pathlib.Path, made: record.RunRecord) -> step_chain.StepChain:
    """Return the chain of a run; UserError says why it has none."""
    if made.reduction != "canonical":
        raise errors.UserError(
            f"Steps are compared by their bits, which only reduction=canonical promises; {run_dir} was trained with "
            f"reduction={made.reduction}. Compare its metrics with `jaxdist runs compare`, or train with "
            "--reduction canonical."
        )
    found = step_chain.read(run_dir)
    if found is None or not len(found.entries):
        raise errors.UserError(
            f"{run_dir} has no chain of step hashes ({step_chain.FILE_NAME}): it was trained with "
            "guards.step_hashes=false, or by a parameter server, or made no step. Train with guards.step_hashes=true."
        )
    return found


def chain_of(run_dir: pathlib.Path) -> tuple[record.RunRecord, step_chain.StepChain]:
    """Return the record and the chain of a run; UserError says why it has none."""
    made = record.of_run(run_dir)
    return made, _chain(run_dir, made)


def _changed(first: Mapping[str, Any], second: Mapping[str, Any], names: tuple[str, ...]) -> list[str]:
    changes = [change for name in names for change in record.differences(name, first.get(name), second.get(name))]
    return [change for change in changes if not change.startswith(_PREDICTS)]  # which decides predictions alone


def _check_same_form(first: step_chain.Form, second: step_chain.Form, settings: list[str]) -> None:
    if first == second:
        return
    if first.logical_shards != second.logical_shards:
        why = f"one has {first.logical_shards} logical shards, the other {second.logical_shards}"
    else:
        why = f"they hold other leaves ({len(first.names)} and {len(second.names)} hashes)"
    more = f" Their settings differ: {shown(settings)}." if settings else ""
    raise errors.UserError(f"Two runs of one model are compared step by step; of these, {why}.{more} Name two others.")


def _num_in_both(first: step_chain.StepChain, second: step_chain.StepChain, steps: int) -> int:
    ours, theirs = first.entries["step"][:steps], second.entries["step"][:steps]
    return int(((ours > 0) & (ours == theirs)).sum())


def changed_versions(made: record.RunRecord) -> list[str]:
    """Return which versions, threads and settings of JAX that decide the bits are others now, recorded -> now."""
    now = {**record.versions(), _THREADS: cpu_threads(), _SETTINGS: record.jax_settings()}
    return _changed_compilers(_compilers(made), now)


def changed_jax_settings(made: record.RunRecord) -> list[str]:
    """Return which settings of JAX that change numbers are others now, recorded -> now."""
    recorded = made.extra.get(_SETTINGS)
    return [] if recorded is None else _differing_settings(recorded, record.jax_settings())


def _differing_settings(first: Mapping[str, str], second: Mapping[str, str]) -> list[str]:
    """Return the settings that differ; one that only one of two versions of the package recorded is left out."""
    common = [name for name in first if name in second]
    return [f"{name} {first[name]} -> {second[name]}" for name in common if first[name] != second[name]]


def _compilers(made: record.RunRecord) -> dict[str, Any]:
    return {**made.versions, _THREADS: made.extra.get(_THREADS), _SETTINGS: made.extra.get(_SETTINGS)}


def _changed_compilers(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    """Return the differences; accelerators have no threads to compare, and older records no settings of JAX."""
    known = None not in (first[_THREADS], second[_THREADS])
    settings = _differing_settings(first[_SETTINGS] or {}, second[_SETTINGS] or {})
    return _changed(first, second, (*_COMPILERS, _THREADS) if known else _COMPILERS) + settings


def cpu_threads() -> int | None:
    """Return the number of XLA's threads in this process, which decide the bits; None on accelerators."""
    return thread_pool.size(jax.local_device_count()) if jax.local_devices()[0].platform == "cpu" else None


def _message(
    found: step_chain.Difference | None,
    steps: int,
    compared: int,
    names: tuple[pathlib.Path, pathlib.Path],
    made: tuple[int, int],
    changes: list[str],
) -> str:
    missing = f" ({steps - compared} steps are recorded in one of them only)" if compared < steps else ""
    changed = f"What decides the bits differs: {shown(changes)}." if changes else ""
    if found is None:
        longer = f" {names[0]} made {made[0]} steps, {names[1]} {made[1]}." if made[0] != made[1] else ""
        return f"Equal: the same bits in steps 1 to {steps}{missing}.{longer} {changed}".strip()
    expected = (
        f"{changed} Other bits are expected."
        if changes
        else "Their settings are the same, so one was computed wrongly, or on another kind of machine: "
        f"`jaxdist replay RUN_DIR --step {found.step}` tells which."
    )
    return f"The first difference is in {found}{missing}.\n{reading(found)}\n{expected}"


def reading(found: step_chain.Difference) -> str:
    """Return what it means that these hashes differ, and not others."""
    kinds = {leaf.split("/")[0] for leaf in found.leaves}
    if found.shards:
        return "These logical shards were computed otherwise: a device's params, the batch, or an operator."
    if kinds & {"grads", "loss and metrics"}:
        return "All logical shards are equal, and their sum is not: the addition, or the exchange between devices."
    if kinds:
        return "The gradients are equal, and what was made of them is not: the optimizer, or its state."
    return "Only the long hash of all leaves shows it."


def shown(changes: list[str]) -> str:
    """Return some changes as text, and how many more there are."""
    more = [f"{len(changes) - _MOST_NAMED} more"] if len(changes) > _MOST_NAMED else []
    return "; ".join([*changes[:_MOST_NAMED], *more])
