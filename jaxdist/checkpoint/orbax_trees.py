"""Trees of arrays as plain Orbax checkpoints, which other programs read and write."""

import logging
import os
import pathlib
from typing import Any, TypeAlias

import jax
import numpy as np

from jaxdist.checkpoint import step_names

PyTree: TypeAlias = Any


def save(path: pathlib.Path, tree: PyTree) -> None:
    """Save a tree of arrays at `path`, which must not exist."""
    step_names.check_spelling(path.absolute())
    with _orbax().StandardCheckpointer() as checkpointer:
        checkpointer.save(path.absolute(), tree)


def read(path: pathlib.Path) -> PyTree:
    """Return the tree saved at `path` as NumPy arrays, whatever devices it was saved from."""
    ocp = _orbax()
    with ocp.PyTreeCheckpointer() as checkpointer:
        tree = checkpointer.metadata(path.absolute()).item_metadata.tree
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        return checkpointer.restore(path.absolute(), restore_args=as_numpy)


def _orbax() -> Any:
    """Return Orbax, whose messages are kept out of the log; its errors are raised."""
    import orbax.checkpoint

    logging.getLogger("absl").addFilter(_is_not_orbax)
    return orbax.checkpoint


def _is_not_orbax(record: logging.LogRecord) -> bool:
    return f"{os.sep}orbax{os.sep}" not in record.pathname
