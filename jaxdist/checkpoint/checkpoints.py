"""Checkpoints with Orbax: written while training continues, committed atomically, verified when read.

A committed step is a directory named by its number (`40`, or `40.1` where it was saved a second time). In it, `state/`
holds one array per leaf and `manifest/` their hashes, with the position in the data, the metrics and the identity of
the experiment. Orbax copies the state off the devices, writes it from a background thread and renames the finished
directory into place. Reading verifies every hash: it returns exactly the bits that were saved, or raises an
error that names the leaf.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import itertools
import json
import logging
import math
import os
import pathlib
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import jax
import numpy as np
import orbax.checkpoint as ocp

from jaxdist.checkpoint import manifest as manifests
from jaxdist.checkpoint import step_names
from jaxdist.checkpoint.manifest import CheckpointError, DamagedCheckpointError
from jaxdist.checkpoint.pieces import place
from jaxdist.spmd import jax_private
from jaxdist.spmd.layout import path_name

__all__ = ["CheckpointError", "Checkpointer", "DamagedCheckpointError", "NoRoomError"]

PyTree: TypeAlias = Any

FOLDER_NAME = step_names.FOLDER_NAME
_STATE, _MANIFEST = "state", "manifest"
_REMOVED = "removed-"
_ORBAX_UNFINISHED = ".orbax-checkpoint-tmp"
_NUM_READERS = 8
_BARRIER_TIMEOUT_SECONDS = 1200
_BESIDES, _BESIDES_EACH = 1 << 20, 1 << 14
"""Bytes for the manifest and metadata of a checkpoint, and for those of each leaf."""
_SAVES = itertools.count()
"""Numbers the saves of this process, so that each has a key of its own in the coordinator's store."""


class NoRoomError(CheckpointError):
    """The disk has no room for a checkpoint. Nothing was written, and every process of the job raises this."""


class Checkpointer:
    """Saves and restores training states in one directory, which all processes of the job must share.

    Each process of a multi-process job makes its own and calls the same methods at the same steps.

    >>> with Checkpointer("runs/a/checkpoints", identity="digits_cnn") as checkpointer:  # doctest: +SKIP
    ...     checkpointer.save(step, state, position.to_json(), {"eval/accuracy": 0.98})
    ...     state, data_state = checkpointer.restore(abstract_state)

    Args:
      directory: directory of the steps; created by the first save.
      identity: identity of the experiment that the checkpoints belong to; restoring with another one is refused.
      keep_last: how many of the newest steps are kept.
      keep_every: steps divisible by this are kept forever.
      best_metric: name of the metric whose best step is kept, too; steps saved without it do not count.
      best_mode: whether "max" or "min" is best.
      clock: seconds, for `may_save`.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        identity: str,
        keep_last: int = 2,
        keep_every: int | None = None,
        best_metric: str | None = None,
        best_mode: Literal["max", "min"] = "max",
        clock: Callable[[], float] = time.monotonic,
    ):
        if keep_last < 1 or (keep_every is not None and keep_every < 1) or best_mode not in ("max", "min"):
            raise ValueError(
                'keep_last and keep_every must be at least 1 and best_mode "max" or "min"; got '
                f"keep_last={keep_last}, keep_every={keep_every}, best_mode={best_mode!r}."
            )
        self._directory = pathlib.Path(directory).absolute()
        step_names.check_spelling(self._directory)
        self._identity = identity
        self._keep_last, self._keep_every = keep_last, keep_every
        self._best_metric, self._best_sign = best_metric, 1.0 if best_mode == "max" else -1.0
        self._scores: dict[pathlib.Path, float] = {}
        self._orbax: ocp.AsyncCheckpointer | None = None
        self._saving: tuple[int, concurrent.futures.Future[None]] | None = None
        self._clock = clock
        self._began, self._took = -math.inf, 0.0
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def save(self, step: int, state: PyTree, data_state: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        """Start saving `state` as `step`, and return as soon as it may be donated to the next step.

        Waits for the previous save, then for the state to be computed and copied to the host; hashing, writing and the
        removal of old steps happen in the background. An existing step is replaced.

        `data_state` is the position in the data, anything JSON can hold; `metrics` decide which step is best.

        Raises:
          CheckpointError: the directory cannot be written, or belongs to another experiment; the previous save failed.
        """
        self.save_leaves(step, manifests.leaves_of(state), data_state, metrics)

    def save_leaves(
        self, step: int, leaves: list[manifests.Leaf], data_state: Mapping[str, Any], metrics: Mapping[str, float]
    ) -> None:
        """Do as `save` does for a state that is given by its leaves, in tree order."""
        self.wait()
        self._began = self._clock()
        extra = {
            "format": manifests.FORMAT,
            "identity": self._identity,
            "step": step,
            "data_state": data_state,
            "metrics": {name: float(value) for name, value in metrics.items()},
        }
        json.dumps(extra)  # Raises here, in the caller, if JSON cannot hold a value.
        if self._orbax is None:
            self._refuse_foreign()
            self._orbax = _async_checkpointer()
        self._make_ready()
        self._check_room(step, leaves)
        try:
            self._orbax.save(self._new_path(step), args=_save_args(leaves, extra))
        except OSError as error:
            raise self._write_error(f"of step {step}", error) from error
        self._saving = step, self._thread.submit(self._finish, self._orbax, step)

    def may_save(self, share: float) -> bool:
        """Return whether saves that come as fast as one now would take at most that share of the time."""
        since = self._clock() - self._began
        in_progress = self._saving is not None and not self._saving[1].done()
        return (since if in_progress else self._took) <= share * since

    def wait(self) -> None:
        """Wait until no save is in progress.

        Raises:
          CheckpointError: the save failed; earlier checkpoints are intact.
        """
        if self._saving is not None:
            (step, future), self._saving = self._saving, None
            error = future.exception()
            if error is not None:
                raise self._write_error(f"of step {step}", error) from error

    def close(self) -> None:
        """Wait for the last save and end the background threads; raises what `wait` raises."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            if self._orbax is not None:
                self._orbax.close()
                self._orbax = None

    def steps(self) -> list[int]:
        """Return the committed steps, ascending. Interrupted saves are not included."""
        return sorted(self._committed())

    def latest_step(self) -> int | None:
        """Return the newest committed step, or None."""
        return max(self._committed(), default=None)

    def best_step(self) -> int | None:
        """Return the committed step whose `best_metric` is best (the earliest among equals), or None."""
        if self._best_metric is None:
            return None
        scores = {step: self._score(paths[-1]) for step, paths in sorted(self._committed().items())}
        best = max(scores, key=lambda step: scores[step], default=None)
        return best if best is not None and scores[best] > -math.inf else None

    def verify(self, step: int) -> None:
        """Read all of `step` and compare the hashes; needs no template.

        Raises:
          CheckpointError: there is no such step, it belongs to another experiment, or it is damaged
            (DamagedCheckpointError).
        """
        manifest = self._manifest(self._existing(step)[1])
        for _ in _each_ahead(manifest.read_leaf, manifest.leaves):
            pass

    def restore(self, template: PyTree, step: int | None = None) -> tuple[PyTree, dict[str, Any]]:
        """Return the state and data_state of `step`, the newest by default, bit for bit as they were saved.

        Every leaf is read and verified on the host, a few at a time, then placed with the shardings of the template:
        the mesh, the number of devices and of processes may differ from those at the time of the save.

        Args:
          template: the state's structure; leaves are jax.ShapeDtypeStructs with a sharding (or jax.Arrays).
          step: which step.

        Raises:
          CheckpointError: there is no such step; it belongs to another experiment; its leaves, shapes or dtypes differ
            from the template's; or it is damaged (DamagedCheckpointError). A state is never restored in part.
        """
        self.wait()
        step, path = self._existing(step)
        with_paths, treedef = jax.tree_util.tree_flatten_with_path(template)
        structs = _template_leaves(with_paths)
        try:
            manifest = self._manifest(path)
            manifest.check_fits(structs)
            read = _each_ahead(manifest.read_leaf, structs)
            leaves = [place(values, struct) for values, struct in zip(read, structs.values(), strict=True)]
        except DamagedCheckpointError as error:
            raise DamagedCheckpointError(f"{error} {self._advice(step, path)}") from error
        return jax.tree.unflatten(treedef, leaves), manifest.extra["data_state"]

    def set_aside_after(self, step: int, folder: pathlib.Path) -> None:
        """Move the steps after `step` to a new folder in `folder`; on one process, while no save is in progress."""
        newer = [path for each, paths in self._committed().items() if each > step for path in paths]
        if not newer:
            return
        number = next(number for number in itertools.count(1) if not (folder / str(number)).exists())
        (folder / str(number)).mkdir(parents=True)
        for path in newer:
            path.rename(folder / str(number) / path.name)

    def _committed(self) -> dict[int, list[pathlib.Path]]:
        return step_names.committed(self._directory)

    def _new_path(self, step: int) -> pathlib.Path:
        # A second save gets another name, so that the first stays until the second is committed.
        paths = self._committed().get(step)
        if not paths:
            return self._directory / str(step)
        previous = step_names.parse(paths[-1].name)
        assert previous is not None
        return self._directory / f"{step}.{previous[1] + 1}"

    def _refuse_foreign(self) -> None:
        """Raise if the directory belongs to another experiment, whose steps would be removed as old ones."""
        for paths in self._committed().values():
            with contextlib.suppress(DamagedCheckpointError):
                self._manifest(paths[-1])

    def _make_ready(self) -> None:
        """Create the directory, check that it can be written, and remove remains of interrupted saves."""
        if jax.process_index() != 0:
            return
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self._directory):
                for path in list(self._directory.iterdir()):
                    if path.name.startswith(_REMOVED) or _ORBAX_UNFINISHED in path.name:
                        shutil.rmtree(path)
        except OSError as error:
            raise self._write_error("", error) from error

    def _check_room(self, step: int, leaves: Sequence[manifests.Leaf]) -> None:
        """Raise NoRoomError, on every process, if process 0 sees that the disk has no room for `leaves`.

        Orbax would fail half-way, on one process, and leave the others in a barrier.
        """
        fits, store, key = True, jax_private.coordinator_store(), f"jaxdist/checkpoint/{next(_SAVES)}"
        if jax.process_index() == 0:
            disk = shutil.disk_usage(self._directory)
            needed = needed_bytes([leaf.data.nbytes for leaf in leaves])
            fits = disk.free >= needed or not disk.total  # a file system that does not tell its size
            if store is not None and jax.process_count() > 1:
                store.key_value_set(key, str(fits))
        elif store is not None:
            fits = store.blocking_key_value_get(key, _BARRIER_TIMEOUT_SECONDS * 1000) == str(True)
        if not fits:
            raise NoRoomError(f"The disk of {self._directory} has no room for the checkpoint of step {step}.")

    def _finish(self, orbax: ocp.AsyncCheckpointer, step: int) -> None:
        """Wait for the commit, then remove steps that are not kept; all processes return when this is done."""
        orbax.wait_until_finished()
        if jax.process_index() == 0:
            for path in self._superfluous(step):
                # The rename comes first: an interrupted removal must not leave a step that looks complete.
                removed = path.rename(path.with_name(f"{_REMOVED}{path.name}"))
                shutil.rmtree(removed)
        barrier = ocp.multihost.get_barrier_sync_fn(processes=_all_processes())
        barrier(key=f"jaxdist_checkpoint_{step}", timeout_ms=_BARRIER_TIMEOUT_SECONDS * 1000)
        self._took = self._clock() - self._began

    def _superfluous(self, saved: int) -> list[pathlib.Path]:
        committed = self._committed()
        # Steps after the one just saved belong to a run that returned to an earlier step. They do not count as the
        # newest, or the step just saved would be removed first, and they are not removed here.
        steps = sorted(step for step in committed if step <= saved)
        keep = {*steps[-self._keep_last :], self.best_step()}
        keep.update(step for step in steps if self._keep_every and step % self._keep_every == 0)
        replaced = [path for step in steps for path in committed[step][:-1]]
        return replaced + [committed[step][-1] for step in steps if step not in keep]

    def _score(self, path: pathlib.Path) -> float:
        """Return how good the step in `path` is, higher is better; minus infinity if it has no score."""
        if path not in self._scores:
            try:
                metrics = self._manifest(path).extra["metrics"]
            except DamagedCheckpointError:
                metrics = {}  # It cannot be restored, so it has no score; a save must not fail because of it.
            score = self._best_sign * metrics.get(self._best_metric, math.nan)
            self._scores[path] = -math.inf if math.isnan(score) else score
        return self._scores[path]

    def _write_error(self, what: str, error: BaseException) -> CheckpointError:
        latest = self.latest_step()
        return CheckpointError(
            f"A checkpoint {what + ' ' if what else ''}could not be written to {self._directory}: {error}. "
            f"{f'Step {latest} is intact.' if latest is not None else 'It holds no earlier checkpoint.'} "
            "Free space there, make it writable, or choose another directory; then resume."
        )

    def _existing(self, step: int | None) -> tuple[int, pathlib.Path]:
        """Return `step`, or the newest if None, and its directory."""
        committed = self._committed()
        if not committed or (step is not None and step not in committed):
            raise CheckpointError(
                f"There is no checkpoint{'' if step is None else f' of step {step}'} in {self._directory}; it holds "
                f"{f'steps {sorted(committed)}' if committed else 'none'}. "
                "Name a step that exists, or start without resuming."
            )
        step = max(committed) if step is None else step
        return step, committed[step][-1]

    def _manifest(self, path: pathlib.Path) -> manifests.Manifest:
        manifest = manifests.read(path / _MANIFEST, arrays=path / _STATE)
        found = manifest.extra["identity"]
        if found != self._identity:
            raise CheckpointError(
                f"A directory of checkpoints belongs to the experiment that saved them; {path} belongs to {found!r}, "
                f"this is {self._identity!r}. Choose another directory, or the experiment that saved it."
            )
        return manifest

    def _advice(self, damaged: int, path: pathlib.Path) -> str:
        for step in reversed(self.steps()):
            if step != damaged:
                with contextlib.suppress(CheckpointError):
                    self.verify(step)
                    return f"Step {step} is intact: restore that one, or remove {path}."
        return "No other step there is intact: start again, or restore a copy of the directory."


def is_checkpoint(path: pathlib.Path) -> bool:
    """Return whether `path` is the directory of one checkpoint."""
    return (path / _MANIFEST).is_dir() and (path / _STATE).is_dir()


def open_manifest(path: pathlib.Path) -> manifests.Manifest:
    """Return the manifest of one checkpoint of any run: its leaves can be read by name, without a template.

    Raises:
      DamagedCheckpointError: it is damaged.
    """
    return manifests.read(path / _MANIFEST, arrays=path / _STATE)


def needed_bytes(leaves: Sequence[int]) -> int:
    """Return the room on the disk that a checkpoint needs whose leaves have so many bytes."""
    return sum(leaves) + _BESIDES_EACH * len(leaves) + _BESIDES


def save_plain(path: pathlib.Path, tree: PyTree) -> None:
    """Save a tree of arrays as a plain Orbax checkpoint at `path`, which must not exist."""
    _quiet_orbax()
    step_names.check_spelling(path.absolute())
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path.absolute(), tree)


def read_plain(path: pathlib.Path) -> PyTree:
    """Return the tree of a plain Orbax checkpoint as NumPy arrays, whatever devices it was saved from."""
    _quiet_orbax()
    with ocp.PyTreeCheckpointer() as checkpointer:
        tree = checkpointer.metadata(path.absolute()).item_metadata.tree
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        return checkpointer.restore(path.absolute(), restore_args=as_numpy)


@dataclasses.dataclass
class _ManifestSave(ocp.args.CheckpointArgs):
    leaves: list[manifests.Leaf]
    extra: dict[str, Any]


class _ManifestHandler(ocp.AsyncCheckpointHandler):
    """Hashes the leaves and writes the manifest, as one more item of what Orbax commits together."""

    async def async_save(self, directory: Any, args: _ManifestSave) -> list[Any]:
        pieces = [manifests.host_pieces(leaf) for leaf in args.leaves]
        return [ocp.future.CommitFutureAwaitingContractedSignals(self._write(directory, args, pieces))]

    async def _write(self, directory: Any, args: _ManifestSave, pieces: list[Any]) -> None:
        # Runs in a thread of Orbax, once the directory exists.
        described = {leaf.path: manifests.describe(leaf, owned) for leaf, owned in zip(args.leaves, pieces)}
        manifests.write(pathlib.Path(directory), described, args.extra)

    def save(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("Manifests are written as part of an asynchronous save.")

    def restore(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("Manifests are read by Checkpointer.restore.")


# Orbax identifies a handler by its arguments for saving and restoring; this one is not used for restoring.
ocp.args.register_with_handler(_ManifestHandler, for_save=True, for_restore=True)(_ManifestSave)


def _save_args(leaves: list[manifests.Leaf], extra: dict[str, Any]) -> ocp.args.Composite:
    # Orbax refuses arrays without elements; their shape in the manifest is sufficient.
    arrays = {leaf.file: leaf.data for leaf in leaves if leaf.data.size}
    return ocp.args.Composite(**{_STATE: ocp.args.PyTreeSave(arrays), _MANIFEST: _ManifestSave(leaves, extra)})


def _async_checkpointer() -> ocp.AsyncCheckpointer:
    _quiet_orbax()
    # With the processes named, Orbax synchronizes through the coordinator. Otherwise it runs programs on the devices,
    # some of them from its background thread, between training steps that differ between processes.
    processes = ocp.options.MultiprocessingOptions(active_processes=_all_processes())
    # Each piece is written by one process, so that its hash and its bytes come from the same memory.
    arrays = ocp.type_handlers.ArrayHandler(use_replica_parallel=False, enable_write_sharding_file=False)
    state = ocp.PyTreeCheckpointHandler(
        # One directory per leaf, uncompressed (floats hardly shrink): damage can be located, and writing is fast.
        use_ocdbt=False,
        use_compression=False,
        # Without pinned memory, Orbax and the hashes use the same copy of the state on the host.
        enable_pinned_host_transfer=False,
        type_handler_registry=ocp.type_handlers.create_type_handler_registry((jax.Array, arrays)),
        multiprocessing_options=processes,
    )
    items = ocp.CompositeCheckpointHandler(
        composite_options=ocp.CompositeOptions(multiprocessing_options=processes),
        **{_STATE: state, _MANIFEST: _ManifestHandler()},
    )
    return ocp.AsyncCheckpointer(items, timeout_secs=_BARRIER_TIMEOUT_SECONDS, multiprocessing_options=processes)


def _all_processes() -> set[int]:
    return set(range(jax.process_count()))


def _quiet_orbax() -> None:
    """Keep the messages of Orbax out of the log; its errors are raised."""
    logging.getLogger("absl").addFilter(_is_not_orbax)
    logging.getLogger("asyncio").addFilter(_is_not_of_store)
    _quiet_late_callbacks()


def _is_not_orbax(record: logging.LogRecord) -> bool:
    return f"{os.sep}orbax{os.sep}" not in record.pathname


@functools.cache
def _quiet_late_callbacks() -> None:
    """Drop what a thread of tensorstore reports that finds Orbax's event loop closed: what it waited for is done.

    It reports through Python's hook for errors, which in a job ends the process.
    """
    unraisable, uncaught = sys.unraisablehook, sys.excepthook
    sys.unraisablehook = lambda found: None if _is_late(found.exc_value) else unraisable(found)
    sys.excepthook = lambda kind, error, trace: None if _is_late(error) else uncaught(kind, error, trace)


def _is_late(error: BaseException | None) -> bool:
    return isinstance(error, RuntimeError) and str(error) == "Event loop is closed"


def _is_not_of_store(record: logging.LogRecord) -> bool:
    """Return whether a record is not of a task of Orbax that failed together with one whose error is raised."""
    return record.exc_info is None or "tensorstore_spec" not in str(record.exc_info[1])


def _template_leaves(with_paths: Sequence[tuple[Any, Any]]) -> dict[str, Any]:
    """Return the leaves of a template by name."""
    structs = {path_name(path): leaf for path, leaf in with_paths}
    for path, struct in structs.items():
        if getattr(struct, "sharding", None) is None:
            raise CheckpointError(
                f"Every leaf of the template needs a sharding, which says where to restore it; {path} has none. "
                "Pass jax.ShapeDtypeStruct(shape, dtype, sharding=...), as state.abstract_state makes them."
            )
    return structs


def _each_ahead(fn: Callable[[str], np.ndarray], items: Iterable[str]) -> Iterator[np.ndarray]:
    """Yield `fn` of each item in order, computed a few ahead by threads: the host never holds all leaves at once."""
    with concurrent.futures.ThreadPoolExecutor(_NUM_READERS) as threads:
        pending: collections.deque[concurrent.futures.Future[np.ndarray]] = collections.deque()
        for item in items:
            pending.append(threads.submit(fn, item))
            if len(pending) == _NUM_READERS:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
