"""Checkpoints on Orbax: written while training goes on, committed whole or not at all, verified when read.

A committed step is a directory named by its number. Inside, `state/` holds one array per leaf, and `manifest/` one file
per process with the SHA-256 of every piece of every leaf that process wrote; process 0 adds the position in the data,
the metrics and the identity of the experiment. Orbax copies the state off the devices, writes it from a background
thread and renames the finished directory into place. Reading checks every hash, so what comes back is the very bits
that were saved, or an error that names the leaf.
"""

import collections
import concurrent.futures
import dataclasses
import hashlib
import itertools
import json
import logging
import math
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal, TypeAlias

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore

PyTree: TypeAlias = Any
Index: TypeAlias = list[list[int]]
"""Where a piece of a leaf lies: `[start, stop]` for each dim."""

FORMAT = 1
_STATE, _MANIFEST = "state", "manifest"
_ORBAX_UNFINISHED = ".orbax-checkpoint-tmp"
_REMOVED, _REPLACED = "removed-", "replaced-"
_READ_AHEAD = 8


class CheckpointError(ValueError):
    """A checkpoint cannot be written, or is not one this experiment can be restored from."""


class DamagedCheckpointError(CheckpointError):
    """What lies on disk is not what was saved: a file is missing, cut short or changed."""


@dataclasses.dataclass(frozen=True)
class _Piece:
    """A part of a leaf that this process owns, on the host; `index` says where in the leaf it lies."""

    index: Index
    values: np.ndarray


@dataclasses.dataclass(frozen=True)
class _Leaf:
    """A leaf of the state as it is written. Typed keys are written as their uint32 data."""

    path: str
    file: str
    dtype: str
    data: jax.Array

    def describe(self, pieces: Iterable[_Piece]) -> dict[str, Any]:
        hashes = [{"index": piece.index, "sha256": _sha256(piece.values)} for piece in pieces]
        shape, stored_dtype = list(self.data.shape), str(self.data.dtype)
        return {
            "file": self.file,
            "dtype": self.dtype,
            "stored_dtype": stored_dtype,
            "stored_shape": shape,
            "pieces": hashes,
        }


class Checkpointer:
    """Saves and restores training states in one directory, which every process of the job must see.

    Each process of a multi-process job makes its own and calls the same methods at the same steps.

    >>> with Checkpointer("runs/a/checkpoints", identity="digits_cnn") as checkpointer:  # doctest: +SKIP
    ...     checkpointer.save(step, state, position.to_json(), {"eval/accuracy": 0.98})
    ...     state, data_state = checkpointer.restore(abstract_state)

    Args:
      directory: where the steps lie; made by the first save.
      identity: says which experiment the checkpoints belong to; restoring under another one is refused.
      keep_last: how many of the newest steps stay.
      keep_every: steps divisible by this stay for ever.
      best_metric: name of the metric whose best step stays too; steps saved without it do not compete.
      best_mode: whether "max" or "min" is best.
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
    ):
        if keep_last < 1 or (keep_every is not None and keep_every < 1) or best_mode not in ("max", "min"):
            raise ValueError(
                'keep_last and keep_every must be at least 1 and best_mode "max" or "min"; got '
                f"keep_last={keep_last}, keep_every={keep_every}, best_mode={best_mode!r}."
            )
        self._directory = pathlib.Path(directory).absolute()
        self._identity = identity
        self._keep_last, self._keep_every = keep_last, keep_every
        self._best_metric, self._best_sign = best_metric, 1.0 if best_mode == "max" else -1.0
        self._metrics: dict[int, dict[str, float]] = {}
        self._orbax: ocp.AsyncCheckpointer | None = None
        self._saving: concurrent.futures.Future[None] | None = None
        self._saving_step = -1
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def save(self, step: int, state: PyTree, data_state: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        """Start saving `state` as `step`, and return as soon as it may be donated to the next step.

        Waits for the previous save, then for the state to be computed and copied to the host; hashing, writing and the
        removal of old steps happen in the background. A step that is already there is replaced.

        Args:
          step: number of finished steps.
          state: pytree of jax.Arrays, typed keys included, laid out over any mesh.
          data_state: where the data stands; anything JSON can hold.
          metrics: the values that decide which step is best.

        Raises:
          CheckpointError: the directory cannot be written, or the previous save failed.
        """
        self.wait()
        extra = {
            "format": FORMAT,
            "identity": self._identity,
            "step": step,
            "data_state": data_state,
            "metrics": {name: float(value) for name, value in metrics.items()},
        }
        json.dumps(extra)  # A TypeError belongs to the caller's thread, before anything is written.
        orbax = self._open()
        leaves = _leaves_of(state)
        if jax.process_index() == 0:
            self._set_aside(step)
        orbax.save(self._path(step), args=_save_args(leaves, extra), force=False)
        self._metrics[step] = extra["metrics"]  # type: ignore[assignment]
        self._saving_step = step
        self._saving = self._thread.submit(self._finish, orbax, step)

    def wait(self) -> None:
        """Return when nothing is being saved any more.

        Raises:
          CheckpointError: the save failed; the checkpoints before it are unharmed.
        """
        saving, self._saving = self._saving, None
        error = saving.exception() if saving is not None else None
        if error is not None:
            raise self._write_error(self._saving_step, error) from error

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
        """Return the committed steps, ascending. A save that was interrupted never shows up."""
        if not self._directory.is_dir():
            return []
        return sorted(int(path.name) for path in self._directory.iterdir() if re.fullmatch(r"0|[1-9]\d*", path.name))

    def latest_step(self) -> int | None:
        """Return the newest committed step, or None."""
        return max(self.steps(), default=None)

    def best_step(self) -> int | None:
        """Return the committed step whose `best_metric` is best (the earliest among equals), or None."""
        scores = {step: self._score(step) for step in self.steps()}
        return max((step for step in scores if scores[step] > -math.inf), key=lambda step: scores[step], default=None)

    def newest_intact(self) -> int | None:
        """Return the newest step whose every hash is right, or None; reads all files of the steps it looks at."""
        self.wait()
        return self._newest_intact(self.steps())

    def verify(self, step: int) -> None:
        """Read all of `step` and compare the hashes; needs no template.

        Raises:
          CheckpointError: the step belongs to another experiment, or is damaged (DamagedCheckpointError).
        """
        manifest = self._manifest(step)
        for _ in _ahead(lambda entry: self._read(step, *entry), manifest.leaves.items()):
            pass

    def restore(self, template: PyTree, step: int | None = None) -> tuple[PyTree, dict[str, Any]]:
        """Return the state and data_state of `step`, the newest by default, bit for bit as they were saved.

        Every leaf is read and verified on the host, one after the other, then laid out as the template says: the mesh,
        the number of devices and of processes may differ from those it was saved under.

        Args:
          template: the state's structure; leaves are jax.ShapeDtypeStructs with a sharding (or jax.Arrays).
          step: which step.

        Raises:
          CheckpointError: there is no such step; it belongs to another experiment; its leaves, shapes or dtypes differ
            from the template's; or it is damaged (DamagedCheckpointError). Nothing is ever restored in part.
        """
        self.wait()
        step = self._existing(step)
        try:
            manifest = self._manifest(step)
            structs, treedef = _template_leaves(template)
            self._check_structure(step, manifest, structs)
            read = _ahead(lambda path: (path, self._read(step, path, manifest.leaves[path])), structs)
            state = jax.tree.unflatten(treedef, [_place(values, structs[path]) for path, values in read])
        except DamagedCheckpointError as error:
            raise DamagedCheckpointError(f"{error} {self._advice(step)}") from error
        return state, manifest.extra["data_state"]

    # Writing

    def _path(self, step: int) -> pathlib.Path:
        return self._directory / str(step)

    def _open(self) -> ocp.AsyncCheckpointer:
        """Return the Orbax checkpointer; the first save finds out whether the directory can be written, and tidies."""
        if self._orbax is None:
            if jax.process_index() == 0:
                try:
                    self._directory.mkdir(parents=True, exist_ok=True)
                    with tempfile.TemporaryFile(dir=self._directory):
                        self._tidy()
                except OSError as error:
                    raise self._write_error(None, error) from error
            self._orbax = _async_checkpointer()
        return self._orbax

    def _tidy(self) -> None:
        """Remove what interrupted saves and removals left behind; put back what was set aside and not yet replaced."""
        for path in list(self._directory.iterdir()):
            if path.name.startswith(_REPLACED) and not (original := self._path_set_aside(path)).exists():
                path.rename(original)
            elif path.name.startswith((_REMOVED, _REPLACED)) or _ORBAX_UNFINISHED in path.name:
                shutil.rmtree(path)

    def _path_set_aside(self, path: pathlib.Path) -> pathlib.Path:
        return self._directory / path.name.removeprefix(_REPLACED)

    def _set_aside(self, step: int) -> None:
        """Make room for a second save of `step`; the first stays on disk until the second is committed."""
        if self._path(step).exists():
            self._path(step).rename(self._directory / f"{_REPLACED}{step}")

    def _finish(self, orbax: ocp.AsyncCheckpointer, step: int) -> None:
        orbax.wait_until_finished()
        if jax.process_index() == 0:
            for old in self._superfluous(step):
                self._remove(self._path(old))
            if (replaced := self._directory / f"{_REPLACED}{step}").exists():
                shutil.rmtree(replaced)

    def _superfluous(self, saved: int) -> list[int]:
        # Steps beyond the one just saved come from a run that went back to an earlier step; they neither count as
        # the newest, or the step just saved would be the first to go, nor are they ours to remove.
        steps = [step for step in self.steps() if step <= saved]
        keep = {*steps[-self._keep_last :], self.best_step()}
        keep.update(step for step in steps if self._keep_every and step % self._keep_every == 0)
        return [step for step in steps if step not in keep]

    def _remove(self, path: pathlib.Path) -> None:
        # The rename comes first: a removal that is killed half-way must not leave a step that looks complete.
        removed = path.with_name(f"{_REMOVED}{path.name}")
        path.rename(removed)
        shutil.rmtree(removed)

    def _score(self, step: int) -> float:
        if self._best_metric is None:
            return -math.inf
        if step not in self._metrics:
            self._metrics[step] = self._manifest(step).extra["metrics"]
        score = self._best_sign * self._metrics[step].get(self._best_metric, math.nan)
        return score if score == score else -math.inf

    def _write_error(self, step: int | None, error: BaseException) -> CheckpointError:
        latest = self.latest_step()
        unharmed = f"Step {latest} is unharmed." if latest is not None else "No earlier checkpoint exists."
        what = "be written to" if step is None else f"take the checkpoint of step {step}"
        return CheckpointError(
            f"The directory {self._directory} could not {what}: {error} {unharmed} "
            "Free space in it, make it writable, or choose another directory, and resume."
        )

    # Reading

    def _existing(self, step: int | None) -> int:
        steps = self.steps()
        if not steps or (step is not None and step not in steps):
            wanted = "checkpoint" if step is None else f"checkpoint of step {step}"
            raise CheckpointError(
                f"There is no {wanted} in {self._directory}; it holds {f'steps {steps}' if steps else 'none'}. "
                "Name a step that exists, or start without resuming."
            )
        return steps[-1] if step is None else step

    def _manifest(self, step: int) -> "_Manifest":
        manifest = _read_manifest(self._path(step))
        found = manifest.extra["identity"]
        if found != self._identity:
            raise CheckpointError(
                f"A checkpoint can only be restored by the experiment that saved it; {self._path(step)} belongs to "
                f"{found!r}, this is {self._identity!r}. Choose another directory, or the experiment that saved it."
            )
        return manifest

    def _check_structure(self, step: int, manifest: "_Manifest", structs: Mapping[str, Any]) -> None:
        saved = {path: (_logical_shape(leaf), leaf["dtype"]) for path, leaf in manifest.leaves.items()}
        wanted = {path: (tuple(struct.shape), str(struct.dtype)) for path, struct in structs.items()}
        problems = [f"{path} is not in the checkpoint" for path in wanted if path not in saved]
        problems += [f"{path} is in the checkpoint only" for path in saved if path not in wanted]
        problems += [
            f"{path} is {_show(saved[path])} in the checkpoint and {_show(wanted[path])} here"
            for path in wanted
            if path in saved and wanted[path] != saved[path]
        ]
        if problems:
            more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
            raise CheckpointError(
                f"The state of {self._path(step)} does not fit: {'; '.join(problems[:3])}{more}. "
                "Restore with the model and optimizer it was saved with, or train into another directory."
            )

    def _read(self, step: int, path: str, leaf: Mapping[str, Any]) -> np.ndarray:
        """Return a leaf's verified values."""
        values = _read_array(self._path(step) / _STATE / leaf["file"], path, leaf)
        if sum(math.prod(stop - start for start, stop in piece["index"]) for piece in leaf["pieces"]) != values.size:
            raise DamagedCheckpointError(f"{self._path(step) / _MANIFEST} lacks hashes of leaf {path}.")
        for piece in leaf["pieces"]:
            part = values[tuple(slice(start, stop) for start, stop in piece["index"])]
            if _sha256(part) != piece["sha256"]:
                raise DamagedCheckpointError(
                    f"Leaf {path} of {self._path(step)} is damaged: the contents of {leaf['file']} are not what was "
                    "saved (its SHA-256 differs)."
                )
        return values

    def _newest_intact(self, steps: Iterable[int]) -> int | None:
        for step in sorted(steps, reverse=True):
            try:
                self.verify(step)
            except CheckpointError:
                continue
            return step
        return None

    def _advice(self, step: int) -> str:
        intact = self._newest_intact(earlier for earlier in self.steps() if earlier != step)
        if intact is None:
            return "No other step in this directory is intact: start again, or restore a copy of the directory."
        return f"Step {intact} is intact: restore that one, or remove {self._path(step)}."


# What is written


def _path_name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path).removeprefix(".")


def _leaves_of(state: PyTree) -> list[_Leaf]:
    return [
        _make_leaf(position, _path_name(path), leaf)
        for position, (path, leaf) in enumerate(jax.tree_util.tree_leaves_with_path(state))
    ]


def _make_leaf(position: int, path: str, leaf: Any) -> _Leaf:
    if not isinstance(leaf, jax.Array):
        raise CheckpointError(f"A state holds jax.Arrays only; {path} is a {type(leaf).__name__}. Make it a jax.Array.")
    is_key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    # The number keeps names apart that differ only in characters a file name cannot hold; the rest is for people.
    file = f"{position:05}.{re.sub(r'[^A-Za-z0-9_]+', '.', path).strip('.')[-120:]}"
    return _Leaf(path, file, str(leaf.dtype), jax.random.key_data(leaf) if is_key else leaf)


def _owned_pieces(array: jax.Array) -> list[_Piece]:
    # On CPU devices these are views of the device's memory. The runtime never reuses a buffer that is looked at from
    # outside, not even when it is donated: the next step then gets fresh memory instead.
    return [
        _Piece(_as_index(shard.index, array.shape), np.asarray(shard.data))
        for shard in array.addressable_shards
        if shard.replica_id == 0
    ]


def _as_index(slices: tuple[slice, ...], shape: tuple[int, ...]) -> Index:
    return [list(part.indices(size)[:2]) for part, size in zip(slices, shape)]


def _sha256(values: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data).hexdigest()


@dataclasses.dataclass
class _ManifestSave(ocp.args.CheckpointArgs):
    leaves: list[_Leaf]
    extra: dict[str, Any]


class _ManifestHandler(ocp.AsyncCheckpointHandler):
    """Hashes the leaves and writes the manifest, as a part of what Orbax commits at once."""

    async def async_save(self, directory: Any, args: _ManifestSave) -> list[Any]:
        owned = [(leaf, _owned_pieces(leaf.data)) for leaf in args.leaves]
        return [ocp.future.CommitFutureAwaitingContractedSignals(self._write(directory, owned, args.extra))]

    async def _write(self, directory: Any, owned: list[tuple[_Leaf, list[_Piece]]], extra: dict[str, Any]) -> None:
        body = {"leaves": {leaf.path: leaf.describe(pieces) for leaf, pieces in owned}, "extra": extra}
        path = pathlib.Path(directory) / f"process-{jax.process_index()}.json"
        path.write_text(json.dumps({"body": body, "sha256": _json_sha256(body)}))

    def save(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("Manifests are written as part of an asynchronous save.")

    def restore(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("Manifests are read by Checkpointer.restore.")


# Orbax knows a handler by its arguments for saving and for restoring; nothing is restored through this one.
ocp.args.register_with_handler(_ManifestHandler, for_save=True, for_restore=True)(_ManifestSave)


def _json_sha256(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _save_args(leaves: list[_Leaf], extra: dict[str, Any]) -> ocp.args.Composite:
    # Orbax refuses arrays without elements; their shape in the manifest says all there is to say.
    arrays = {leaf.file: leaf.data for leaf in leaves if leaf.data.size}
    return ocp.args.Composite(**{_STATE: ocp.args.PyTreeSave(arrays), _MANIFEST: _ManifestSave(leaves, extra)})


def _async_checkpointer() -> ocp.AsyncCheckpointer:
    _quiet_orbax()
    # One plain directory per leaf, uncompressed (floats hardly shrink): damage has an address, and writing is cheap.
    # Each piece is written by one process, so that its hash and its bytes come from the same memory.
    arrays = ocp.type_handlers.ArrayHandler(use_replica_parallel=False, enable_write_sharding_file=False)
    registry = ocp.type_handlers.create_type_handler_registry((jax.Array, arrays))
    # Without pinned memory, Orbax and the hashes look at one copy of the state on the host.
    state = ocp.PyTreeCheckpointHandler(
        use_ocdbt=False, use_compression=False, type_handler_registry=registry, enable_pinned_host_transfer=False
    )
    return ocp.AsyncCheckpointer(
        ocp.CompositeCheckpointHandler(**{_STATE: state, _MANIFEST: _ManifestHandler()}),
        # Naming the processes makes Orbax meet at the coordinator instead of running a program on the devices.
        multiprocessing_options=ocp.options.MultiprocessingOptions(active_processes=set(range(jax.process_count()))),
    )


def _quiet_orbax() -> None:
    """Keep Orbax's running commentary out of the log; what it has to complain about is raised."""
    logger = logging.getLogger("absl")
    if _is_not_orbax not in logger.filters:
        logger.addFilter(_is_not_orbax)


def _is_not_orbax(record: logging.LogRecord) -> bool:
    return f"{os.sep}orbax{os.sep}" not in record.pathname


# What is read


@dataclasses.dataclass(frozen=True)
class _Manifest:
    leaves: dict[str, dict[str, Any]]
    extra: dict[str, Any]


def _read_manifest(directory: pathlib.Path) -> _Manifest:
    """Return the manifest of a step, the pieces of all processes joined."""
    files = sorted((directory / _MANIFEST).glob("process-*.json"))
    if directory / _MANIFEST / "process-0.json" not in files:
        raise DamagedCheckpointError(f"{directory} has no {_MANIFEST}/process-0.json: it is damaged, or not jaxdist's.")
    bodies = [_read_manifest_file(file) for file in files]
    if bodies[0]["extra"]["format"] != FORMAT:
        raise CheckpointError(
            f"{directory} has format {bodies[0]['extra']['format']}, this version of jaxdist reads format {FORMAT}. "
            "Restore it with the version that saved it."
        )
    leaves = bodies[0]["leaves"]
    for body, (path, leaf) in itertools.product(bodies[1:], leaves.items()):
        leaf["pieces"] += body["leaves"].get(path, {"pieces": []})["pieces"]
    return _Manifest(leaves, bodies[0]["extra"])


def _read_manifest_file(file: pathlib.Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_bytes())
        body, sha256 = content["body"], content["sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedCheckpointError(f"{file} cannot be read: {error!r}.") from error
    if _json_sha256(body) != sha256:
        raise DamagedCheckpointError(f"{file} is damaged: its contents are not what was saved (its SHA-256 differs).")
    return body


def _read_array(directory: pathlib.Path, path: str, leaf: Mapping[str, Any]) -> np.ndarray:
    shape, dtype = tuple(leaf["stored_shape"]), np.dtype(leaf["stored_dtype"])
    if math.prod(shape) == 0:
        return np.zeros(shape, dtype)
    spec = {"driver": "zarr", "kvstore": {"driver": "file", "path": f"{directory}{os.sep}"}}
    store = _result(tensorstore.open(spec, read=True, open=True), directory, path)
    # Before reading: a damaged shape may ask for more memory than there is.
    if (store.shape, store.dtype.numpy_dtype) != (shape, dtype):
        raise DamagedCheckpointError(
            f"Leaf {path} is damaged: {directory} holds {store.dtype.name}{list(store.shape)}, saved was "
            f"{dtype}{list(shape)}."
        )
    return _result(store.read(), directory, path)


def _result(future: Any, directory: pathlib.Path, path: str) -> Any:
    error = future.exception()
    if error is not None:
        raise DamagedCheckpointError(f"Leaf {path} is damaged: {directory} cannot be read: {error}.") from error
    return future.result()


def _template_leaves(template: PyTree) -> tuple[dict[str, Any], Any]:
    with_paths, treedef = jax.tree_util.tree_flatten_with_path(template)
    structs = {_path_name(path): leaf for path, leaf in with_paths}
    for path, struct in structs.items():
        if getattr(struct, "sharding", None) is None:
            raise CheckpointError(
                f"Every leaf of the template needs a sharding, which says where to restore it; {path} has none. "
                "Pass jax.ShapeDtypeStruct(shape, dtype, sharding=...), as state.abstract_state makes them."
            )
    return structs, treedef


def _logical_shape(leaf: Mapping[str, Any]) -> tuple[int, ...]:
    shape = tuple(leaf["stored_shape"])
    return shape[:-1] if leaf["dtype"].startswith("key<") else shape


def _show(shape_and_dtype: tuple[tuple[int, ...], str]) -> str:
    return f"{shape_and_dtype[1]}{list(shape_and_dtype[0])}"


def _place(values: np.ndarray, struct: Any) -> jax.Array:
    """Return the values laid out as `struct` says; this process provides the pieces of its own devices."""
    if not jax.dtypes.issubdtype(struct.dtype, jax.dtypes.prng_key):
        return jax.make_array_from_callback(values.shape, struct.sharding, lambda index: values[index])
    data = jax.make_array_from_callback(values.shape, struct.sharding, lambda index: values[index])
    wrap = jax.jit(lambda data: jax.random.wrap_key_data(data, impl=_key_impl(struct)), out_shardings=struct.sharding)
    return wrap(data)


def _key_impl(struct: Any) -> Any:
    impls = []
    jax.eval_shape(lambda key: impls.append(jax.random.key_impl(key)), jax.ShapeDtypeStruct((), struct.dtype))
    return impls[0]


def _ahead(fn: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
    """Yield `fn` of each item in order, a few of them computed ahead by threads: the host never holds all leaves."""
    with concurrent.futures.ThreadPoolExecutor(_READ_AHEAD) as threads:
        pending: collections.deque[concurrent.futures.Future[Any]] = collections.deque()
        for item in items:
            pending.append(threads.submit(fn, item))
            if len(pending) == _READ_AHEAD:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
