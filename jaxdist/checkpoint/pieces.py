"""The pieces of arrays: what a process owns of an array on a mesh, and how a whole array is placed on a mesh.

A piece is the part of a leaf that one device owned when it was saved. A replicated leaf has one piece, all of it; each
piece of a sharded leaf belongs to exactly one process.
"""

import dataclasses
from typing import Any

import jax
import numpy as np

from jaxdist.spmd import keys


@dataclasses.dataclass(frozen=True)
class Piece:
    """A part of an array that this process owns.

    Attributes:
      index: `[start, stop]` of every dim.
      data: the values, on one device.
      shard: which of the array's shards on this process it is, as `addressable_data` counts them.
    """

    index: list[list[int]]
    data: jax.Array
    shard: int


def owned_pieces(array: jax.Array) -> list[Piece]:
    """Return the pieces of `array` that this process owns; all processes together own each element once."""
    return [
        Piece([list(part.indices(size)[:2]) for part, size in zip(shard.index, array.shape)], shard.data, number)
        for number, shard in enumerate(array.addressable_shards)
        if shard.replica_id == 0
    ]


def place(values: np.ndarray, struct: Any) -> jax.Array:
    """Return the values with the sharding of `struct`, as a typed key if it is one.

    This process provides the pieces of its own devices.
    """
    placed = jax.make_array_from_callback(values.shape, struct.sharding, lambda index: values[index])
    return keys.typed(placed, struct)
