"""What a run resumes from: the newest checkpoint or a newer saved cut, divided among the present servers.

Both contain the whole state and which batches are trained. So the number of servers, the number of workers, and the
strategy that saved the checkpoint may differ from the present ones.
"""

import dataclasses
import pathlib
import shutil
import time
import zlib
from typing import Any

import jax
import numpy as np

from jaxdist import stop
from jaxdist.checkpoint import checkpoints
from jaxdist.errors import ConfigError
from jaxdist.paramserver.processes.process_world import write_file
from jaxdist.paramserver.protocol import journal, messages
from jaxdist.paramserver.protocol.settings import Settings, saved_cut_file, shard_file
from jaxdist.paramserver.run import judge, shared_plan
from jaxdist.paramserver.wire import encoding
from jaxdist.run import directory as run_directory
from jaxdist.run.warm_start import beginning
from jaxdist.spmd import mesh
from jaxdist.spmd import state as states

BEYOND = "beyond"
"""Key in the data_state of a checkpoint: batches trained although an earlier one is not (bounded and async)."""


@dataclasses.dataclass(frozen=True)
class Start:
    """What a run starts from.

    Attributes:
      progress: the progress of the run so far.
      saved_cut: name of the saved cut that every server loads first; empty for a new run with random params.
      state: the training state; None for a new run with random params.
      began_with: the weights that a new run begins with; None without.
    """

    progress: stop.Progress
    saved_cut: str = ""
    state: states.TrainState | None = None
    began_with: beginning.WarmStart | None = None


@dataclasses.dataclass(frozen=True)
class _Found:
    trained: messages.Trained
    leaves: list[np.ndarray]
    opt_leaves: list[np.ndarray]
    progress: stop.Progress

    @property
    def step(self) -> int:
        return self.trained.step + len(self.trained.beyond)


def begin(
    plan: shared_plan.Plan,
    checkpointer: checkpoints.Checkpointer,
    directory: pathlib.Path,
    *,
    trained_with: int | None = None,
) -> Start:
    """Return what the run in `directory` starts from, and leave only the saved cut that the servers load there.

    Args:
      plan: the Plan of this attempt.
      checkpointer: reads the checkpoints of the run directory.
      directory: folder of the processes.
      trained_with: batch size of the attempt before; None without one.

    Raises:
      CheckpointError: the newest checkpoint is damaged or belongs to another experiment.
      ConfigError: the checkpoint is not at a boundary between two batches of the present size.
    """
    remove_remnants(directory)
    found = _from_checkpoint(plan, checkpointer)
    newer = _from_saved_cuts(plan, directory, found)
    size = plan.settings.global_batch_size
    if newer and trained_with not in (None, size):
        raise ConfigError(
            "The parameter server counts whole batches, so a saved cut needs the global_batch_size of its run. The "
            f"newest one has {newer.step} steps of {trained_with} examples, got global_batch_size={size}. Resume with "
            f"global_batch_size={trained_with}."
        )
    found = newer or found
    if found is None:
        remove_saved_cuts(directory, keep=0)
        return Start(stop.Progress())
    name = _write(plan, found, directory)
    for path in saved_cuts(directory):
        if path.name != name:
            shutil.rmtree(path)
    return Start(found.progress, name, judge.train_state(plan, found.step, found.leaves, found.opt_leaves))


def clear(directory: pathlib.Path) -> None:
    """Prepare the folder of the processes of a new run; ConfigError if it holds saved cuts of steps of another one.

    A start that was killed before there was a run record leaves a saved cut of step 0.
    """
    cuts = saved_cuts(directory)
    if any(int(path.name[:10]) for path in cuts):
        raise ConfigError(
            f"A new run needs a directory without saved state; {directory} holds saved cuts, and no run record says "
            "which run they belong to. Choose another --run-dir, or move them away."
        )
    remove_saved_cuts(directory, keep=0)


def begin_with(plan: shared_plan.Plan, leaves: list[np.ndarray], directory: pathlib.Path) -> Start:
    """Return the start of a new run with these params and model_state, which the servers load as a saved cut."""
    params, _ = jax.tree.unflatten(plan.structure, leaves)
    opt_leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(jax.jit(plan.optimizer.init)(params))]
    found = _Found(messages.Trained(0, ()), leaves, opt_leaves, stop.Progress())
    return Start(found.progress, _write(plan, found, directory), judge.train_state(plan, 0, leaves, opt_leaves))


def saved_cuts(directory: pathlib.Path) -> list[pathlib.Path]:
    """Return the complete saved cuts in `directory`, oldest first."""
    return sorted(path.parent for path in directory.glob(saved_cut_file("*")))


def remove_remnants(directory: pathlib.Path) -> None:
    """Remove incomplete files that processes left when they died; no process may be running."""
    for draft in [*directory.rglob("*.tmp"), *directory.rglob("*.part")]:
        draft.unlink(missing_ok=True)
    whole = set(saved_cuts(directory))
    for path in directory.glob(run_directory.SAVED_CUTS):
        if path not in whole:
            shutil.rmtree(path)


def _remove_overtaken(directory: pathlib.Path, newest: pathlib.Path) -> None:
    """Remove incomplete saved cuts of earlier steps than `newest`."""
    for path in directory.glob(run_directory.SAVED_CUTS):
        if path.name[:10] < newest.name[:10] and not (path / "manifest").exists():
            shutil.rmtree(path, ignore_errors=True)


def remove_saved_cuts(directory: pathlib.Path, *, keep: int) -> None:
    """Remove all saved cuts except the newest `keep` complete ones and any that may still be completed."""
    found = saved_cuts(directory)
    if found:
        _remove_overtaken(directory, found[-1])
    for path in found[: len(found) - keep]:
        (path / "manifest").unlink()  # first: a partly removed cut must not look complete
        shutil.rmtree(path)


def _from_checkpoint(plan: shared_plan.Plan, checkpointer: checkpoints.Checkpointer) -> _Found | None:
    if checkpointer.latest_step() is None:
        return None
    one_device = mesh.make_mesh(devices=jax.local_devices()[:1])
    template = states.abstract_state(plan.functions.init_fn, plan.optimizer, mesh=one_device)
    restored, data_state = checkpointer.restore(template)
    progress = stop.Progress.from_json(data_state["progress"])
    beyond = tuple(data_state.get(BEYOND, ()))
    low = progress.step - len(beyond)
    expected, stored = shared_plan.position(plan, low).to_json(), data_state["position"]
    if expected != stored:
        raise ConfigError(
            f"The parameter server resumes only between whole batches. After {low} batches of "
            f"{plan.settings.global_batch_size} examples the data position is {expected}; in the checkpoint of step "
            f"{progress.step} it is {stored}. Resume with the global_batch_size, data and order of that run."
        )
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves((restored.params, restored.model_state))]
    opt_leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(restored.opt_state)]
    return _Found(messages.Trained(low, beyond), leaves, opt_leaves, progress)


def _from_saved_cuts(plan: shared_plan.Plan, directory: pathlib.Path, saved: _Found | None) -> _Found | None:
    """Return the newest intact saved cut that is newer than the checkpoint; None if there is none."""
    for path in reversed(saved_cuts(directory)):
        content = _read(path)
        if content is None:
            continue
        saved_cut, shards = content
        if saved is not None and saved_cut.step <= saved.step:
            return None
        old = plan.resharded(len(shards))
        leaves = old.sharding.join([shard.params for shard in shards])
        opt_leaves = old.optimizer_sharding().join([shard.opt_state for shard in shards])
        progress = _progress(plan, saved_cut, saved.progress if saved else stop.Progress())
        return _Found(saved_cut.trained, leaves, opt_leaves, progress)
    return None


def _progress(plan: shared_plan.Plan, saved_cut: journal.SavedCut, before: stop.Progress) -> stop.Progress:
    """Return the progress at a saved cut: steps and examples are exact, evaluations are those of the checkpoint."""
    progress = dataclasses.replace(before)
    progress.advance(saved_cut.step, examples_seen(plan, saved_cut.trained), plan.settings.num_examples)
    return progress


def examples_seen(plan: shared_plan.Plan, trained: messages.Trained) -> int:
    """Return the number of examples in the trained batches."""
    place = shared_plan.position(plan, trained.step)
    ahead = sum(_batch_size(plan.settings, step) for step in trained.beyond)
    return place.epoch * plan.settings.num_examples + place.position + ahead


def _batch_size(settings: Settings, step: int) -> int:
    first = step % settings.steps_per_epoch * settings.global_batch_size
    return min(settings.global_batch_size, settings.num_examples - first)


def _read(path: pathlib.Path) -> tuple[journal.SavedCut, list[messages.ShardState]] | None:
    """Return the content of a saved cut; None if a file of it is damaged."""
    try:
        saved_cut: Any = encoding.decode((path / "manifest").read_bytes())
        data = [(path.parent / shard.name).read_bytes() for shard in saved_cut.shards]
        if any(zlib.crc32(each) != shard.checksum for each, shard in zip(data, saved_cut.shards)):
            return None
        return saved_cut, [encoding.decode(each) for each in data]
    except (OSError, encoding.EncodingError):
        return None


def _write(plan: shared_plan.Plan, found: _Found, directory: pathlib.Path) -> str:
    """Write the saved cut that the run starts from, divided among the present servers; return its name."""
    # The name is unique: the saved cut that was read may be an earlier start from the same step.
    name = f"{found.step:010d}-start-{time.time_ns()}"
    rows = []
    pairs = zip(plan.sharding.split(found.leaves), plan.optimizer_sharding().split(found.opt_leaves), strict=True)
    for number, (params, opt_state) in enumerate(pairs):
        shard = messages.ShardState(found.step, 0, 0, params, opt_state, (), (), 0, (), (), (), None)
        checksum = write_file(directory / shard_file(name, number), encoding.encode(shard))
        rows.append(journal.SavedShard(number, shard_file(name, number), checksum))
    saved_cut = journal.SavedCut(name, found.step, 0, found.trained, tuple(rows))
    write_file(directory / saved_cut_file(name), encoding.encode(saved_cut))
    return name
