"""Arrays by name in an .npz file, as plain NumPy writes and opens it."""

import io
import pathlib
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxdist import errors


def content(arrays: Mapping[str, np.ndarray]) -> bytes:
    """Return the bytes of the file.

    Raises:
      UserError: an array has a dtype that NumPy does not know by itself, such as bfloat16.
    """
    foreign = [name for name, array in arrays.items() if is_foreign(array)]
    if foreign:
        raise errors.UserError(
            f"NumPy has no {arrays[foreign[0]].dtype}, so an .npz file cannot hold {foreign[0]}. Choose another format."
        )
    file = io.BytesIO()
    # numpy.savez has no room for arrays called `file` and `allow_pickle`, its own arguments.
    with zipfile.ZipFile(file, "w") as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)
    return file.getvalue()


def read(path: pathlib.Path, names: Sequence[str] | None = None) -> dict[str, np.ndarray]:
    """Return the arrays of a file by their `names`, by default all; others are not looked at.

    Raises:
      UserError: the file is no whole .npz file, lacks a name, or holds something else than an array by it.
    """
    try:
        with path.open("rb") as file, zipfile.ZipFile(file):
            pass  # NumPy takes what is no archive for a pickle
        with path.open("rb") as file, np.load(file, allow_pickle=False) as content:
            missing = [name for name in names or () if name not in content.files]
            if missing:
                raise errors.UserError(
                    f"{path} has no array {missing[0]!r}; its arrays are {sorted(content.files)}. Add or rename one."
                )
            found: dict[str, Any] = {name: content[name] for name in (content.files if names is None else names)}
    except errors.UserError:
        raise
    except (ValueError, EOFError, KeyError, OSError, zipfile.BadZipFile, zlib.error, RuntimeError) as error:
        why = str(error).rstrip(".")
        raise errors.UserError(
            f"{path} cannot be read as an .npz file of arrays of numbers: {why}. Write it again, with np.savez."
        ) from error
    for name, array in found.items():
        if not isinstance(array, np.ndarray):  # NumPy returns the bytes of a member that is no .npy file
            raise errors.UserError(f"{path} holds {name!r}, which is no array. Write the file again, with np.savez.")
    return found


def is_foreign(array: np.ndarray) -> bool:
    """Return whether plain NumPy would read the array as bytes without a type: bfloat16, float8 and the like."""
    return array.dtype.kind == "V"
