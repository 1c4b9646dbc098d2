"""`jaxdist replay`: one step of a run is computed again, on any number of devices, and compared with the chain."""

import contextlib
import dataclasses
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jaxdist import errors, stop
from jaxdist.config.experiment import Experiment
from jaxdist.data import Position
from jaxdist.guards import step_hashes
from jaxdist.run import components, directory
from jaxdist.run.replay import comparison, step_chain
from jaxdist.run.use import trained
from jaxdist.rundir import record
from jaxdist.spmd.state import TrainState
from jaxdist.spmd.step import STEP_HASHES


@dataclasses.dataclass(frozen=True)
class Replay:
    """A step that was computed again.

    Attributes:
      step: its number.
      identical: whether it has the recorded hashes.
      start: the step whose state it was computed from; 0 for the state before the first.
      num_devices: on which it was computed.
      differences: the steps from `start` on whose hashes are not those recorded. What `start` itself lists are leaves
        of the checkpoint.
      message: all this in sentences.
    """

    step: int
    identical: bool
    start: int
    num_devices: int
    differences: list[step_chain.Difference]
    message: str

    def to_json(self) -> dict[str, Any]:
        """Return the result as plain data."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        return self.message


def replay(
    run_dir: pathlib.Path,
    step: int,
    *,
    devices: Sequence[jax.Device],
    experiment: str | os.PathLike[str] | Experiment | None = None,
) -> Replay:
    """Compute a step of a run again: from the newest checkpoint before it, with the run's own order of examples.

    Raises:
      UserError: the run is not canonical or has no chain, the step is not recorded, or experiment and data are not
        those that were trained.
    """
    made, chain = comparison.chain_of(run_dir)
    _check_recorded(chain, made, run_dir, step)
    with errors.as_user_error():
        parts = _put_together(made, run_dir, devices, experiment)
        start = _begin(parts, run_dir, before=step)
    differences = _differences_at_start(chain, start)
    differences += _roll(parts.continued(start.progress), chain, start, last=step)
    return _result(made, step, start, devices, differences)


@dataclasses.dataclass(frozen=True)
class _Start:
    """What is computed from: a state, the position of its data, the progress of the run."""

    state: TrainState
    position: Position | None
    progress: stop.Progress


def _check_recorded(chain: step_chain.StepChain, made: record.RunRecord, run_dir: pathlib.Path, step: int) -> None:
    if chain.entry(step) is not None:
        return
    recorded = chain.entries["step"][chain.entries["step"] > 0]
    held = f"steps {recorded[0]} to {recorded[-1]}" if len(recorded) else "no step"
    raise errors.UserError(
        f"A step is compared with its hashes; the chain of {run_dir} holds {held}, of {made.step} steps of the run. "
        f"Choose one of these with --step; got {step}{', whose entry is damaged' if step in chain.damaged else ''}."
    )


def _put_together(
    made: record.RunRecord,
    run_dir: pathlib.Path,
    devices: Sequence[jax.Device],
    given: str | os.PathLike[str] | Experiment | None,
) -> components.Parts:
    found = trained.experiment_of(made, run_dir, given)
    changed = comparison.shown(comparison.changed_since(made, found))
    if changed:
        raise errors.UserError(
            f"A step is computed again with the settings it was trained with; these have changed since {run_dir} was "
            f"trained: {changed}. Name the file as it was: experiment= (in a command, --experiment)."
        )
    guards = dataclasses.replace(found.guards, step_hashes=True)
    parts = components.put_together(dataclasses.replace(found, guards=guards), devices=devices)
    if parts.identity.to_json() != made.extra.get("identity"):
        raise errors.UserError(
            f"A step is computed again on the examples it was trained on; the training data of {run_dir} have changed "
            "since. Restore them."
        )
    return parts


def _begin(parts: components.Parts, run_dir: pathlib.Path, *, before: int) -> _Start:
    """Return the newest saved state before the step `before`, or the one before the first step."""
    saved = directory.open_checkpoints(parts.experiment, run_dir, parts.identity)
    with contextlib.closing(saved) as checkpointer:
        steps = [each for each in checkpointer.steps() if each < before]
        if not steps:
            return _Start(parts.create_state(), None, stop.Progress())
        state, data_state = checkpointer.restore(parts.abstract_state, steps[-1])
    position = Position.from_json(data_state["position"])
    position.check_resumable(parts.loader.beginning)
    return _Start(state, position, stop.Progress.from_json(data_state["progress"]))


def _differences_at_start(chain: step_chain.StepChain, start: _Start) -> list[step_chain.Difference]:
    """Return how the state that is computed from differs from the one that the chain has recorded."""
    recorded = chain.entry(start.progress.step)
    if recorded is None:
        return []
    names = step_hashes.state_names(start.state)
    hashes = np.asarray(jax.jit(step_hashes.of_state)(start.state))
    places = np.flatnonzero(step_chain.short(hashes) != recorded["leaves"][len(recorded["leaves"]) - len(names) :])
    leaves = tuple(names[place] for place in places)
    return [step_chain.Difference(start.progress.step, (), leaves)] if leaves else []


def _roll(
    parts: components.Parts, chain: step_chain.StepChain, start: _Start, *, last: int
) -> list[step_chain.Difference]:
    """Make the steps until `last`; return those whose hashes are not the recorded ones."""
    state, batches = start.state, parts.batches(start.position)
    found = []
    for step in range(start.progress.step + 1, last + 1):
        batch, _ = next(batches)
        with errors.as_user_error():
            state, metrics = parts.step(state, batch)
        hashes = np.asarray(metrics[STEP_HASHES].addressable_data(0))
        recorded = chain.entry(step)
        if recorded is not None:
            computed = step_chain.entries(chain.form, step, hashes[None])[0]
            found.append(step_chain.difference(chain.form, recorded, computed))
    return [each for each in found if each is not None]


def _result(
    made: record.RunRecord,
    step: int,
    start: _Start,
    devices: Sequence[jax.Device],
    differences: list[step_chain.Difference],
) -> Replay:
    own = [found for found in differences if found.step == step]
    origin = (
        f"the checkpoint of step {start.progress.step}" if start.progress.step else "the state before the first step"
    )
    where = f"computed again from {origin} on {len(devices)} device{'s' if len(devices) > 1 else ''}"
    if not differences:
        message = f"Step {step} is identical: {where}, every logical shard and every leaf has the recorded hash."
    else:
        message = f"{_told(step, own, differences, start)} It was {where}.{_versions(made)}"
    return Replay(step, not own, start.progress.step, len(devices), differences, message)


def _told(step: int, own: list[step_chain.Difference], differences: list[step_chain.Difference], start: _Start) -> str:
    first = differences[0]
    if first.step == start.progress.step:
        return (
            f"Step {step} {'differs' if own else 'is identical'}, but the checkpoint that it was computed from is not "
            f"what the chain recorded, in {first}. Keep more checkpoints (checkpoints.keep_every), and replay from "
            "another."
        )
    if first.step < step:
        return f"Step {step} {'differs' if own else 'is identical'}. The first on the way that differs is {first}."
    reading = comparison.reading(first)
    return f"Step {step} differs, in {first}. {reading} The run computed it wrongly, or this machine did."


def _versions(made: record.RunRecord) -> str:
    changed = comparison.changed_versions(made)
    return f" The versions differ ({'; '.join(changed)}), so other bits are expected." if changed else ""
