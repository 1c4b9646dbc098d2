"""The manifest of a checkpoint: its leaves, and the SHA-256 of every piece of each.

A piece is the part of a leaf that one device owned when it was saved; a replicated leaf has one piece, all of it. Each
process hashes the pieces it writes, from the same memory they are written from, and lists them in a file of its own.
Reading joins the lists and compares every hash, on any mesh: pieces are positions in the global array.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
import math
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import jax
import numpy as np

from jaxdist.checkpoint import arrays as stored_arrays
from jaxdist.checkpoint import step_names
from jaxdist.checkpoint.pieces import owned_pieces
from jaxdist.spmd import keys
from jaxdist.spmd.layout import path_name

PyTree: TypeAlias = Any
JSON: TypeAlias = dict[str, Any]

FORMAT = 2


class CheckpointError(ValueError):
    """A checkpoint cannot be written, or this experiment cannot be restored from it."""


class DamagedCheckpointError(CheckpointError):
    """The content on disk is not what was saved: a file is missing, truncated or changed."""


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A leaf of a state as it is written.

    Attributes:
      path: where it is in the state, for example `params/dense/kernel`.
      file: the name it is stored under.
      dtype: its dtype in the state.
      data: the array that is stored: the leaf itself, or the uint32 data of a typed key.
    """

    path: str
    file: str
    dtype: str
    data: jax.Array


def leaves_of(state: PyTree) -> list[Leaf]:
    """Return the leaves of `state` in tree order.

    Raises:
      CheckpointError: a leaf is not a jax.Array.
    """
    leaves, treedef = jax.tree.flatten(state)
    return [_make_leaf(path, file, leaf) for (path, file), leaf in zip(_names(treedef), leaves, strict=True)]


@functools.lru_cache(maxsize=64)  # the same for every save of a run
def _names(treedef: Any) -> list[tuple[str, str]]:
    """Return each leaf's path, and the name it is stored under."""
    with_paths = jax.tree_util.tree_leaves_with_path(jax.tree.unflatten(treedef, range(treedef.num_leaves)))
    paths = [path_name(path) for path, _ in with_paths]
    return [(path, stored_name(position, path)) for position, path in enumerate(paths)]


def stored_name(position: int, path: str) -> str:
    """Return the name under which the leaf at `position` in tree order is stored."""
    # The number makes names unique that differ only in characters that are replaced; the rest is for readers.
    return f"{position:05}.{re.sub(r'[^A-Za-z0-9_]+', '.', path).strip('.')[-120:]}"


def _make_leaf(path: str, file: str, leaf: Any) -> Leaf:
    if not isinstance(leaf, jax.Array):
        raise CheckpointError(f"A state holds jax.Arrays only; {path} is a {type(leaf).__name__}. Make it a jax.Array.")
    return Leaf(path, file, str(leaf.dtype), keys.plain(leaf))


HostPieces: TypeAlias = list[tuple[list[list[int]], np.ndarray]]
"""Pieces of a leaf, each with its position: `[start, stop]` for every dim."""


def host_pieces(leaves: Sequence[Leaf]) -> list[HostPieces]:
    """Return the pieces of each leaf that this process owns.

    Waits for the values. On CPU devices they are views of the device's memory: the runtime never reuses a buffer that
    is referenced from outside, not even a donated one; the program that it was donated to gets new memory instead.
    """
    owned = [owned_pieces(leaf.data) for leaf in leaves]
    for piece in itertools.chain.from_iterable(owned):
        piece.data.copy_to_host_async()
    return [[(piece.index, np.asarray(piece.data)) for piece in pieces] for pieces in owned]


def describe(leaf: Leaf, pieces: HostPieces) -> JSON:
    """Return the entry of `leaf` in the manifest, with the hashes of its pieces."""
    return {
        "file": leaf.file,
        "dtype": leaf.dtype,
        "stored_dtype": str(leaf.data.dtype),
        "stored_shape": list(leaf.data.shape),
        "pieces": [{"index": index, "sha256": _sha256(values)} for index, values in pieces],
    }


def write(directory: pathlib.Path, leaves: Mapping[str, JSON], extra: JSON) -> None:
    """Write this process's part of a manifest into `directory`; durable on return."""
    body = {"leaves": dict(leaves), "extra": extra}
    with (directory / _file_name(jax.process_index())).open("w") as file:
        file.write(json.dumps({"body": body, "sha256": _json_sha256(body)}))
        file.flush()
        os.fsync(file.fileno())


def _file_name(process: int) -> str:
    return f"process-{process}.json"


def _sha256(values: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data).hexdigest()


def _json_sha256(body: JSON) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The manifest of one checkpoint.

    Attributes:
      directory: directory of the arrays.
      leaves: path in the state -> entry as of `describe`, with the pieces of all processes.
      extra: further data saved by process 0.
    """

    directory: pathlib.Path
    leaves: dict[str, JSON]
    extra: JSON

    def check_fits(self, structs: Mapping[str, Any]) -> None:
        """Check that the checkpoint has the leaves of `structs` (path -> shape and dtype), and no others.

        Raises:
          CheckpointError: they differ; the message names the first leaves that do.
        """
        saved = {path: (_logical_shape(leaf), leaf["dtype"]) for path, leaf in self.leaves.items()}
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
                f"The state in {self.directory} has other leaves: {'; '.join(problems[:3])}{more}. "
                "Restore with the model and optimizer it was saved with, or train into another directory."
            )

    def read_leaf(self, path: str) -> np.ndarray:
        """Return the values of a leaf after verifying every piece.

        Raises:
          DamagedCheckpointError: the values are not what was saved, or cannot be read.
        """
        leaf = self.leaves[path]
        values = _read_array(self.directory, path, leaf)
        if sum(math.prod(stop - start for start, stop in piece["index"]) for piece in leaf["pieces"]) != values.size:
            raise DamagedCheckpointError(f"The manifest of {self.directory} lacks hashes of leaf {path}.")
        for piece in leaf["pieces"]:
            part = values[tuple(slice(start, stop) for start, stop in piece["index"])]
            if _sha256(part) != piece["sha256"]:
                raise DamagedCheckpointError(
                    f"Leaf {path} is damaged: {self.directory / leaf['file']} does not hold what was saved "
                    "(its SHA-256 differs)."
                )
        return values


def read(directory: pathlib.Path, *, arrays: pathlib.Path) -> Manifest:
    """Return the manifest in `directory`, whose arrays are in `arrays`.

    Raises:
      DamagedCheckpointError: there is none, or it is damaged.
      CheckpointError: another version of jaxdist wrote it.
    """
    step_names.check_spelling(arrays)
    files = sorted(directory.glob(_file_name(0).replace("0", "*")))
    first = directory / _file_name(0)
    if first not in files:
        raise DamagedCheckpointError(f"{first} is missing: the checkpoint is damaged, or jaxdist did not write it.")
    body = _read_file(first)
    if body["extra"]["format"] != FORMAT:
        raise CheckpointError(
            f"{first} has format {body['extra']['format']}; this version of jaxdist reads format {FORMAT}. "
            "Restore it with the version that saved it."
        )
    others = [_read_file(file) for file in files if file != first]
    for other, (path, leaf) in itertools.product(others, body["leaves"].items()):
        leaf["pieces"] += other["leaves"][path]["pieces"]
    return Manifest(arrays, body["leaves"], body["extra"])


def _read_file(file: pathlib.Path) -> JSON:
    try:
        content = json.loads(file.read_bytes())
        body, sha256 = content["body"], content["sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedCheckpointError(f"{file} cannot be read: {type(error).__name__}: {error}.") from error
    if _json_sha256(body) != sha256:
        raise DamagedCheckpointError(f"{file} is damaged: it does not hold what was saved (its SHA-256 differs).")
    return body


def _read_array(directory: pathlib.Path, path: str, leaf: JSON) -> np.ndarray:
    shape, dtype = tuple(leaf["stored_shape"]), np.dtype(leaf["stored_dtype"])
    if math.prod(shape) == 0:
        return np.zeros(shape, dtype)
    store = _result(stored_arrays.open_array(directory, leaf["file"]), directory, path)
    # Before reading, because a damaged shape may need more memory than there is.
    if (store.shape, store.dtype.numpy_dtype) != (shape, dtype):
        raise DamagedCheckpointError(
            f"Leaf {path} is damaged: {directory} holds {_show((store.shape, store.dtype.name))}, saved was "
            f"{_show((shape, str(dtype)))}."
        )
    return _result(store.read(), directory, path)


def _result(future: Any, directory: pathlib.Path, path: str) -> Any:
    error = future.exception()
    if error is not None:
        # TensorStore appends its whole specification and source locations, each in brackets.
        reason = str(error).partition(" [")[0]
        raise DamagedCheckpointError(f"Leaf {path} is damaged: {directory} cannot be read: {reason}.") from error
    return future.result()


def _logical_shape(leaf: JSON) -> tuple[int, ...]:
    shape = tuple(leaf["stored_shape"])
    return shape[:-1] if leaf["dtype"].startswith("key<") else shape


def _show(shape_and_dtype: tuple[tuple[int, ...], str]) -> str:
    return f"{shape_and_dtype[1]}{list(shape_and_dtype[0])}"
