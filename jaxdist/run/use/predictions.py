"""Inputs read from a file, and predictions written to one: npz, CSV or Parquet."""

import csv
import io
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jaxdist import errors, extras
from jaxdist.data import fingerprints, prepare
from jaxdist.data.sources.folders import ImageFolder, UnlabelledFiles, unlabelled_images
from jaxdist.data.sources.images import IMAGE_SUFFIXES
from jaxdist.data.sources.memmap import open_npy
from jaxdist.data.sources.sounds import SOUND_SUFFIXES, SoundFolder
from jaxdist.data.sources.source import Source
from jaxdist.run.use import npz
from jaxdist.rundir import files
from jaxdist.spmd.layout import path_name

FORMATS = (".npz", ".csv", ".parquet")

_VALUE = "A file is read as the training data were: write a number there, or leave out its row."
_OF_A_FILE = {
    "A source is a ": "A source is a .npz, .npy, ",
    "Say what stands for a missing value, as in missing=math.nan, or leave the column out of `columns`.": _VALUE,
    "Leave the column out of `columns`, or name it in `categories`.": _VALUE,
}
"""Words of messages to those who write a source, in those to who names a file of examples for a trained model."""


def read_inputs(path: pathlib.Path | str, *, like: Source | None = None, columns: Sequence[str] | None = None) -> Any:
    """Return the examples of a file or folder: arrays of .npz and .npy, or anything that `jaxdist data prepare` reads.

    See `prepare.open_source` for `like` and `columns`.

    Raises:
      UserError: there is no such file, or its kind is none of these.
    """
    path = _place(path)
    with errors.reworded(_OF_A_FILE), errors.as_user_error():
        if isinstance(path, pathlib.Path) and path.suffix.lower() == ".npy":
            return open_npy(path)
        if isinstance(path, pathlib.Path) and path.suffix.lower() == ".npz":
            return npz.read(path, columns)
        return prepare.open_source(str(path), like=like, columns=columns)


def read_unlabelled(
    path: pathlib.Path | str, *, like: Source | None = None, columns: Sequence[str] | None = None
) -> Any:
    """Return the examples of a file or folder, of which no label is needed: see `read_inputs`.

    Of images and sounds it may be a single file, or a folder with all below it, whatever their names.

    Raises:
      UserError: see `read_inputs`.
    """
    place = _place(path)
    if isinstance(place, pathlib.Path):
        with errors.as_user_error():
            found = _unlabelled(place, like)
        if found is not None:
            return found
    return read_inputs(path, like=like, columns=columns)


def _unlabelled(path: pathlib.Path, like: Source | None) -> UnlabelledFiles | None:
    """Return the images or sounds of a file or folder, read as those of training; None where these are other data.

    Sounds have the rate of the training data, so they are read by a folder of sounds only.
    """
    suffix = path.suffix.lower()
    for leaf in fingerprints.leaves(like):
        if isinstance(leaf, ImageFolder) and (path.is_dir() or suffix in IMAGE_SUFFIXES):
            return leaf.unlabelled(path)
        if isinstance(leaf, SoundFolder) and (path.is_dir() or suffix in SOUND_SUFFIXES):
            return leaf.unlabelled(path)
    if prepare.kind_of_data(str(path)) == "images" if path.is_dir() else suffix in IMAGE_SUFFIXES:
        return unlabelled_images(path, None)
    return None


def _place(path: pathlib.Path | str) -> pathlib.Path | str:
    """Return the path of an existing file or folder, or `tfds:NAME:SPLIT`; UserError where there is none."""
    if str(path).startswith("tfds:"):
        return path
    if not os.path.exists(path):
        raise errors.UserError(f"INPUT is a file or folder of examples, and there is no {path}. Check the path.")
    return pathlib.Path(path)


def files_of(source: Any) -> list[str] | None:
    """Return the file of each example; None for data that are no files of images or sounds."""
    if not isinstance(source, UnlabelledFiles | ImageFolder | SoundFolder):
        return None
    return [os.fsencode(path).decode(errors="replace") for path in source.files]


def check_output(path: pathlib.Path) -> None:
    """Raise UserError where predictions cannot be written to `path`."""
    if path.suffix not in FORMATS:
        raise errors.UserError(f"Predictions are written to a file that ends in {', '.join(FORMATS)}; got {path}.")
    files.check_new(path, "A file of predictions")


def write(path: pathlib.Path, outputs: Any, files_read: Sequence[str] | None = None) -> None:
    """Write outputs, a row per example, to `path`; in a table each number of a row has a column of its own.

    With `files_read`, a field or column `file` says what each row is of.
    """
    check_output(path)
    with errors.as_user_error():
        path.parent.mkdir(parents=True, exist_ok=True)
        content = io.BytesIO()
        arrays = ({} if files_read is None else {"file": np.asarray(files_read)}) | _named(outputs)
        if path.suffix == ".npz":
            content.write(npz.content(arrays))
        elif path.suffix == ".parquet":
            table = extras.require("pyarrow").table(_columns(arrays))
            extras.require("pyarrow.parquet").write_table(table, content)
        else:
            columns = _columns(arrays)
            text = io.StringIO()
            rows = csv.writer(text, lineterminator="\n")
            rows.writerow(columns)
            rows.writerows(zip(*(column.tolist() for column in columns.values()), strict=True))
            content.write(text.getvalue().encode())
        files.write(path, [content.getvalue()])


def _named(outputs: Any) -> dict[str, np.ndarray]:
    """Return the arrays of a pytree by their paths; a single array is called `output`."""
    leaves = jax.tree_util.tree_leaves_with_path(outputs)
    names = (path_name(path, ".") or "output" for path, _ in leaves)
    return {name: _known(np.asarray(leaf)) for name, (_, leaf) in zip(names, leaves, strict=True)}


def _known(array: np.ndarray) -> np.ndarray:
    """Return numbers of bfloat16 and the like, which NumPy and Parquet do not have, exactly as float32."""
    return array.astype(np.float32) if npz.is_foreign(array) else array


def _columns(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    columns: dict[str, np.ndarray] = {}
    for name, array in arrays.items():
        flat = array.reshape(len(array), -1)
        names = [name] if array.ndim == 1 else [f"{name}_{number}" for number in range(flat.shape[1])]
        columns |= dict(zip(names, flat.T, strict=True))
    return columns
