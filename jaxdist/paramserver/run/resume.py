"""Where a run goes on: the newest checkpoint, or what its servers wrote down after it, dealt to the servers there now.

Both hold the whole state and how many batches are trained, so neither the number of servers nor that of workers, nor
the strategy that saved the checkpoint, has to be the present one.
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
from jaxdist.paramserver.processes.driver import write_file
from jaxdist.paramserver.protocol import journal, messages
from jaxdist.paramserver.protocol.settings import Settings, saved_cut_file, shard_file
from jaxdist.paramserver.run import judge, shared_plan
from jaxdist.paramserver.wire import encoding
from jaxdist.spmd import mesh
from jaxdist.spmd import state as states

BEYOND = "beyond"
"""Key of a checkpoint's data_state: batches that are trained though one before them is not (bounded and async)."""

_SNAPSHOT_NAMES = "[0-9]" * 10 + "-*"


@dataclasses.dataclass(frozen=True)
class Start:
    """Where a run begins.

    Attributes:
      progress: the run so far.
      snapshot: the name of what every server loads first; empty for the first step.
      state: the training state there; None for the first step.
    """

    progress: stop.Progress
    snapshot: str = ""
    state: states.TrainState | None = None


@dataclasses.dataclass(frozen=True)
class _Found:
    trained: journal.Trained
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
    """Return where the run in `directory` continues, and leave there the one snapshot the new servers load.

    Args:
      plan: of the attempt that begins.
      checkpointer: of the run directory.
      directory: the processes' own.
      trained_with: the batch size of the attempt before; None without one.

    Raises:
      CheckpointError: the newest checkpoint is damaged or of another experiment.
      ConfigError: it does not stand between two batches of this size.
    """
    remove_remnants(directory)
    found = _from_checkpoint(plan, checkpointer)
    newer = _from_snapshots(plan, directory, found)
    size = plan.settings.global_batch_size
    if newer and trained_with not in (None, size):
        raise ConfigError(
            f"The servers wrote down {newer.step} steps of {trained_with} examples after the last checkpoint, and the "
            f"parameter server counts whole batches; global_batch_size is now {size}. Resume with "
            f"global_batch_size={trained_with}."
        )
    found = newer or found
    if found is None:
        remove_snapshots(directory, keep=0)
        return Start(stop.Progress())
    name = _write(plan, found, directory)
    for path in snapshots(directory):
        if path.name != name:
            shutil.rmtree(path)
    return Start(found.progress, name, judge.train_state(plan, found.step, found.leaves, found.opt_leaves))


def snapshots(directory: pathlib.Path) -> list[pathlib.Path]:
    """Return the complete snapshots in `directory`, oldest first."""
    return sorted(path.parent for path in directory.glob(saved_cut_file("*")))


def remove_remnants(directory: pathlib.Path) -> None:
    """Remove what a process that died left half written; none may be running."""
    for draft in [*directory.rglob("*.tmp"), *directory.rglob("*.part")]:
        draft.unlink(missing_ok=True)
    whole = set(snapshots(directory))
    for path in directory.glob(_SNAPSHOT_NAMES):
        if path not in whole:
            shutil.rmtree(path)


def _remove_overtaken(directory: pathlib.Path, newest: pathlib.Path) -> None:
    """Remove snapshots of earlier steps than `newest` that were never completed."""
    for path in directory.glob(_SNAPSHOT_NAMES):
        if path.name[:10] < newest.name[:10] and not (path / "manifest").exists():
            shutil.rmtree(path, ignore_errors=True)


def remove_snapshots(directory: pathlib.Path, *, keep: int) -> None:
    """Remove all snapshots but the newest `keep` that are complete and what may still become one."""
    found = snapshots(directory)
    if found:
        _remove_overtaken(directory, found[-1])
    for path in found[: len(found) - keep]:
        (path / "manifest").unlink()  # first: what is removed half-way must not look complete
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
            f"The parameter server counts whole batches: after {low} of {plan.settings.global_batch_size} examples the "
            f"data stand at {expected}, the checkpoint of step {progress.step} stands at {stored}. Resume with the "
            "global_batch_size, data and order it was trained with."
        )
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves((restored.params, restored.model_state))]
    opt_leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(restored.opt_state)]
    return _Found(journal.Trained(low, beyond), leaves, opt_leaves, progress)


def _from_snapshots(plan: shared_plan.Plan, directory: pathlib.Path, saved: _Found | None) -> _Found | None:
    """Return the newest intact snapshot that is newer than the checkpoint, None if there is none."""
    for path in reversed(snapshots(directory)):
        content = _read(path)
        if content is None:
            continue
        manifest, shards = content
        if saved is not None and manifest.step <= saved.step:
            return None
        old = plan.resharded(len(shards))
        leaves = old.sharding.join([shard.params for shard in shards])
        opt_leaves = old.cut().join([shard.opt_state for shard in shards])
        progress = _progress(plan, manifest, saved.progress if saved else stop.Progress())
        return _Found(manifest.trained, leaves, opt_leaves, progress)
    return None


def _progress(plan: shared_plan.Plan, manifest: journal.SavedCut, before: stop.Progress) -> stop.Progress:
    """Return the progress at a snapshot: evaluations are known as of the checkpoint, steps and examples exactly."""
    progress = dataclasses.replace(before)
    progress.advance(manifest.step, examples_seen(plan, manifest.trained), plan.settings.num_examples)
    return progress


def examples_seen(plan: shared_plan.Plan, trained: journal.Trained) -> int:
    """Return how many examples the trained batches hold."""
    place = shared_plan.position(plan, trained.step)
    ahead = sum(_batch_size(plan.settings, step) for step in trained.beyond)
    return place.epoch * plan.settings.num_examples + place.position + ahead


def _batch_size(settings: Settings, step: int) -> int:
    first = step % settings.steps_per_epoch * settings.global_batch_size
    return min(settings.global_batch_size, settings.num_examples - first)


def _read(path: pathlib.Path) -> tuple[journal.SavedCut, list[messages.ShardState]] | None:
    """Return a snapshot's content; None where a file of it is damaged."""
    try:
        manifest: Any = encoding.decode((path / "manifest").read_bytes())
        data = [(path.parent / shard.name).read_bytes() for shard in manifest.shards]
        if any(zlib.crc32(each) != shard.checksum for each, shard in zip(data, manifest.shards)):
            return None
        return manifest, [encoding.decode(each) for each in data]
    except (OSError, encoding.EncodingError):
        return None


def _write(plan: shared_plan.Plan, found: _Found, directory: pathlib.Path) -> str:
    """Write the snapshot that the run starts from, dealt to the servers it has; return its name."""
    # A name of its own: the snapshot that is being read may be an earlier start from this very step.
    name = f"{found.step:010d}-start-{time.time_ns()}"
    rows = []
    pairs = zip(plan.sharding.split(found.leaves), plan.cut().split(found.opt_leaves), strict=True)
    for number, (params, opt_state) in enumerate(pairs):
        shard = messages.ShardState(found.step, 0, 0, params, opt_state, (), (), 0, (), (), (), None)
        checksum = write_file(directory / shard_file(name, number), encoding.encode(shard))
        rows.append(journal.SavedShard(number, shard_file(name, number), checksum))
    manifest = journal.SavedCut(name, found.step, 0, found.trained, tuple(rows))
    write_file(directory / saved_cut_file(name), encoding.encode(manifest))
    return name
