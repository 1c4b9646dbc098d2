"""Checkpoints: written while training continues, committed atomically, verified when read.

A committed step is a directory named by its number (`40`, or `40.1` where it was saved a second time). In it, `state/`
holds one array per leaf, in a database that plain Orbax opens, and `manifest/` their hashes, with the position in the
data, the metrics and the identity of the experiment. A save copies the state off the devices, writes it from a
background thread into a draft, which is renamed when all processes have written. Reading verifies every hash: it
returns exactly the bits that were saved, or raises an error that names the leaf.
"""

import collections
import concurrent.futures
import contextlib
import itertools
import json
import math
import os
import pathlib
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import jax
import numpy as np

from jaxdist.checkpoint import arrays, step_names
from jaxdist.checkpoint import manifest as manifests
from jaxdist.checkpoint.manifest import CheckpointError, DamagedCheckpointError
from jaxdist.checkpoint.outcomes import NoRoomError, Outcomes
from jaxdist.checkpoint.pieces import place
from jaxdist.spmd.layout import path_name

__all__ = ["CheckpointError", "Checkpointer", "DamagedCheckpointError", "NoRoomError"]

PyTree: TypeAlias = Any

FOLDER_NAME = step_names.FOLDER_NAME
_STATE, _MANIFEST = "state", "manifest"
_REMOVED = "removed-"
_DRAFT = "draft-"
_NUM_READERS = 8
_BESIDES, _BESIDES_EACH = 1 << 20, 1 << 10
"""Bytes for the manifest and metadata of a checkpoint, and for those of each leaf."""


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
        self._saving: tuple[int, concurrent.futures.Future[None]] | None = None
        self._clock, self._is_ours = clock, False
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
        if not self._is_ours:
            self._refuse_foreign()
            self._is_ours = True
        path, outcomes = self._new_path(step), Outcomes()
        outcomes.of_first(lambda: self._begin(path, step, leaves))
        pieces = manifests.host_pieces(leaves)
        self._saving = step, self._thread.submit(self._finish, path, step, leaves, pieces, extra, outcomes)

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

    def _begin(self, path: pathlib.Path, step: int, leaves: Sequence[manifests.Leaf]) -> None:
        """Create the draft of `path`, and remove what interrupted saves left.

        Raises:
          CheckpointError: the directory cannot be written, or the disk has no room for `leaves` (NoRoomError).
        """
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            for each in list(self._directory.iterdir()):
                if each.name.startswith((_REMOVED, _DRAFT)):
                    shutil.rmtree(each)
            for folder in (_STATE, _MANIFEST):
                (_draft(path) / folder).mkdir(parents=True)
            disk = shutil.disk_usage(self._directory)
        except OSError as error:
            raise self._write_error(f"of step {step}", error) from error
        needed = needed_bytes([leaf.data.nbytes for leaf in leaves])
        if disk.free < needed and disk.total:  # there are file systems that do not tell their size
            raise NoRoomError(f"The disk of {self._directory} has no room for the checkpoint of step {step}.")

    def _finish(
        self,
        path: pathlib.Path,
        step: int,
        leaves: Sequence[manifests.Leaf],
        pieces: Sequence[manifests.HostPieces],
        extra: dict[str, Any],
        outcomes: Outcomes,
    ) -> None:
        """Write, commit, and remove steps that are not kept; all processes return when this is done."""
        draft = _draft(path)
        try:
            outcomes.of_all(
                lambda: _write(draft, leaves, pieces, extra),
                lambda: self._commit(path, step, [leaf.file for leaf in leaves if leaf.data.size]),
            )
        finally:
            if jax.process_index() == 0:
                shutil.rmtree(draft, ignore_errors=True)  # if it was not committed, it takes room
        self._took = self._clock() - self._began

    def _commit(self, path: pathlib.Path, step: int, names: Sequence[str]) -> None:
        draft = _draft(path)
        arrays.join(draft / _STATE, jax.process_count(), names)
        for folder in (draft / _STATE, draft / _MANIFEST, draft):
            _make_durable(folder)
        draft.rename(path)
        _make_durable(self._directory)
        for each in self._superfluous(step):
            # The rename comes first: an interrupted removal must not leave a step that looks complete.
            shutil.rmtree(each.rename(each.with_name(f"{_REMOVED}{each.name}")))

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


def _draft(path: pathlib.Path) -> pathlib.Path:
    return path.with_name(f"{_DRAFT}{path.name}")


def _write(
    draft: pathlib.Path,
    leaves: Sequence[manifests.Leaf],
    pieces: Sequence[manifests.HostPieces],
    extra: dict[str, Any],
) -> None:
    """Write what this process owns, and its part of the manifest: both from the same memory."""
    each = [
        (leaf.file, leaf.data.shape, index, values)
        for leaf, owned in zip(leaves, pieces, strict=True)
        for index, values in owned
        if values.size  # the shape in the manifest is sufficient
    ]
    arrays.write(draft / _STATE, jax.process_index(), jax.process_count(), each)
    described = {leaf.path: manifests.describe(leaf, owned) for leaf, owned in zip(leaves, pieces, strict=True)}
    manifests.write(draft / _MANIFEST, described, extra)


def _make_durable(directory: pathlib.Path) -> None:
    """Wait until the entries of a directory are on the disk."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
