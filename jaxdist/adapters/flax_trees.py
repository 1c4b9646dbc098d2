"""Trees in Flax's own forms as plain trees of arrays: boxes with the names of dims, files of `flax.serialization`."""

from typing import Any

import jax
from flax import linen as flax_linen
from flax import serialization

from jaxdist import errors
from jaxdist.adapters.functions import PyTree


def unboxed(params: PyTree) -> PyTree:
    """Return the arrays without the boxes that name their dims.

    Flax's own unboxing would lay an array out over the mesh axes of those names, which the layout decides.
    """

    def is_box(node: Any) -> bool:
        return isinstance(node, flax_linen.meta.AxisMetadata)

    return jax.tree.map(lambda node: jax.tree.leaves(node)[0] if is_box(node) else node, params, is_leaf=is_box)


def from_msgpack(content: bytes, name: str) -> PyTree:
    """Return the tree that `flax.serialization.to_bytes` wrote; raise UserError if `content` is not such a tree."""
    try:
        return serialization.msgpack_restore(content)
    except Exception as error:  # of many kinds: its parser meets arbitrary bytes
        raise errors.UserError(
            f"{name} is no whole file of flax.serialization.to_bytes: {errors.describe(error)}. Write or copy it again."
        ) from error
