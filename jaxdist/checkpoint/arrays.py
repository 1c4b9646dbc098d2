"""The arrays of a checkpoint: of each process an OCDBT database of TensorStore, joined into one when all are written.

A database holds all leaves in a few files, where a directory for each leaf costs many times what its bytes do. The
layout is Orbax's, whose readers open it.
"""

import json
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
import tensorstore

Index: TypeAlias = list[list[int]]
"""`[start, stop]` for every dim."""
Piece: TypeAlias = tuple[str, tuple[int, ...], Index, np.ndarray]
"""Part of an array: the name and shape of that, where the part is, and its values."""

_DATABASE, _TREE = "manifest.ocdbt", "_METADATA"
_BATCH_BYTES = 1 << 26
"""Pieces of about this size are committed to the database together; they are in memory a second time until then."""


def write(directory: pathlib.Path, process: int, num_processes: int, pieces: Sequence[Piece]) -> None:
    """Write the pieces of a process, durable on return."""
    own = directory if num_processes == 1 else directory / _part(process)
    context = tensorstore.Context()
    for batch in _batches(pieces):
        transaction = tensorstore.Transaction()
        # Each array is opened once: if two opened it together, both would try to create it.
        opened = {
            name: tensorstore.open(_new(own, piece), transaction=transaction, context=context)
            for name, piece in {piece[0]: piece for piece in batch}.items()
        }
        stores = {name: future.result() for name, future in opened.items()}
        writes = [
            stores[name][tuple(slice(*bounds) for bounds in index)].write(
                values, can_reference_source_data_indefinitely=True
            )
            for name, _, index, values in batch
        ]
        transaction.commit_sync()
        for each in writes:
            each.result()


def join(directory: pathlib.Path, num_processes: int, names: Sequence[str]) -> None:
    """Make one checkpoint of what all processes have written: arrays of these names."""
    parts = [directory / _part(process) for process in range(num_processes)] if num_processes > 1 else []
    written = [part for part in parts if (part / _DATABASE).exists()]  # a process may own no piece
    if written:
        # One context: a database takes over what another holds, without copying it, if they share their base.
        context, transaction = tensorstore.Context(), tensorstore.Transaction(atomic=True)
        whole = _opened(directory, context).with_transaction(transaction)
        for part in written:
            _opened(part, context).experimental_copy_range_to(whole).result()
        transaction.commit_sync()
    with (directory / _TREE).open("w") as file:
        json.dump(_tree(names), file)
        file.flush()
        os.fsync(file.fileno())


def open_array(directory: pathlib.Path, name: str) -> Any:
    """Return a future of the array `name`, also of a checkpoint with a directory for each."""
    if (directory / _DATABASE).exists():
        kvstore = _database(directory) | {"path": f"{name}/"}
    else:
        kvstore = {"driver": "file", "path": _folder(directory / name)}
    return tensorstore.open({"driver": "zarr", "kvstore": kvstore}, read=True, open=True)


def _part(process: int) -> str:
    return f"ocdbt.process_{process}"


def _opened(directory: pathlib.Path, context: Any) -> Any:
    return tensorstore.KvStore.open(_database(directory), context=context).result()


def _folder(directory: pathlib.Path) -> str:
    return f"{directory.resolve()}{os.sep}"  # TensorStore refuses a path with `..`


def _database(directory: pathlib.Path) -> dict[str, Any]:
    base = {"driver": "file", "path": _folder(directory)}
    return {"driver": "ocdbt", "base": base, "config": {"compression": None}}


def _new(directory: pathlib.Path, piece: Piece) -> dict[str, Any]:
    """Return the specification of the array of a piece, to be created if another piece has not."""
    name, shape, _, values = piece
    return {
        "driver": "zarr",
        "kvstore": _database(directory) | {"path": f"{name}/"},
        "dtype": values.dtype.name,
        # Uncompressed, since floats hardly shrink; a piece is a chunk, so each process writes whole ones.
        "metadata": {"shape": shape, "chunks": [max(1, size) for size in values.shape], "compressor": None},
        "store_data_equal_to_fill_value": True,
        "create": True,
        "open": True,
    }


def _batches(pieces: Sequence[Piece]) -> Iterator[list[Piece]]:
    batch: list[Piece] = []
    for piece in pieces:
        batch.append(piece)
        if sum(values.nbytes for *_, values in batch) >= _BATCH_BYTES:
            yield batch
            batch = []
    if batch:
        yield batch


def _tree(names: Sequence[str]) -> dict[str, Any]:
    """Return what Orbax needs to open the arrays as a tree, here a dict."""
    value = {"value_type": "jax.Array", "skip_deserialize": False}
    leaves = {str((name,)): {"key_metadata": [{"key": name, "key_type": 2}], "value_metadata": value} for name in names}
    return {
        "tree_metadata": leaves,
        "use_ocdbt": True,
        "use_zarr3": False,
        "store_array_data_equal_to_fill_value": True,
    }
