"""Arrays by name as the content of an .npz file that plain NumPy opens."""

import io
import zipfile
from collections.abc import Mapping

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


def is_foreign(array: np.ndarray) -> bool:
    """Return whether plain NumPy would read the array as bytes without a type: bfloat16, float8 and the like."""
    return array.dtype.kind == "V"
