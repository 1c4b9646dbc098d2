"""Packing a state: the pieces that this process owns, joined on its devices into a few flat arrays.

A state has many small leaves. To copy each, to fetch it and to write it costs far more than the bytes do; so leaves of
one dtype are joined by the program that copies them. Large ones stay by themselves.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from jaxdist.checkpoint import manifest as manifests
from jaxdist.checkpoint.pieces import Piece, owned_pieces
from jaxdist.spmd import keys

PyTree: TypeAlias = Any
_Place: TypeAlias = tuple[int, int]
"""The number of a leaf, and which of its shards on this process."""

_LARGE_BYTES = 1 << 20
"""A piece of this size is an array of its own."""


@dataclasses.dataclass(frozen=True)
class _Group:
    """Pieces that become one array: their places, and the shapes and dtypes which they must have."""

    places: list[_Place]
    kinds: tuple[tuple[tuple[int, ...], str], ...]


@dataclasses.dataclass(frozen=True)
class Packing:
    """How the states of a run are packed.

    Attributes:
      structure: JSON object: `leaves`, each with its path, dtype, stored dtype and shape, and `pieces`, in the order in
        which they are packed, each with its leaf, its index in it and its size.
      treedef: of the states.
      groups: for each device, the pieces of each packed array.
    """

    structure: str
    treedef: Any
    groups: list[list[_Group]]

    @classmethod
    def of(cls, state: PyTree) -> "Packing":
        """Return the packing of `state` and those like it.

        Raises:
          CheckpointError: a leaf is not a jax.Array.
        """
        leaves = manifests.leaves_of(state)
        found: dict[jax.Device, dict[Any, dict[_Place, Piece]]] = {}
        for number, leaf in enumerate(leaves):
            for piece in owned_pieces(leaf.data):
                place, device = (number, piece.shard), next(iter(piece.data.devices()))
                kind = place if piece.data.nbytes >= _LARGE_BYTES else piece.data.dtype
                found.setdefault(device, {}).setdefault(kind, {})[place] = piece
        packed = [list(by_kind.values()) for by_kind in found.values()]
        structure = {
            "leaves": [[leaf.path, leaf.dtype, str(leaf.data.dtype), list(leaf.data.shape)] for leaf in leaves],
            "pieces": [
                {"leaf": leaf, "index": piece.index, "num_bytes": piece.data.nbytes}
                for groups in packed
                for pieces in groups
                for (leaf, _), piece in pieces.items()
            ],
        }
        groups = [[_group(pieces) for pieces in groups] for groups in packed]
        return cls(json.dumps(structure), jax.tree.structure(state), groups)

    def pack(self, state: PyTree) -> list[jax.Array]:
        """Return copies of the pieces, packed; the state may be donated as soon as this returns.

        Raises:
          ValueError: it is not like the one that this packing was made for.
        """
        leaves, treedef = jax.tree.flatten(state)
        if treedef != self.treedef:
            raise ValueError(_OTHER)
        return [
            packed
            for groups in self.groups
            for packed in _program(tuple(group.kinds for group in groups))(
                [[leaves[leaf].addressable_data(shard) for leaf, shard in group.places] for group in groups]
            )
        ]


_OTHER = "A state is packed like the first of its run; this one has other leaves. Make a new packing."


def _group(pieces: Mapping[_Place, Piece]) -> _Group:
    return _Group(list(pieces), tuple((piece.data.shape, str(piece.data.dtype)) for piece in pieces.values()))


@functools.lru_cache(maxsize=64)
def _program(expected: tuple[Any, ...]) -> Callable[[list[list[jax.Array]]], list[jax.Array]]:
    """Return the program that packs pieces of these kinds; it is traced for others, and refuses them then.

    So a state is compared with the expected one at no cost.
    """

    def pack(groups: list[list[jax.Array]]) -> list[jax.Array]:
        flat = [[keys.plain(array) for array in group] for group in groups]
        if tuple(tuple((array.shape, str(array.dtype)) for array in group) for group in flat) != expected:
            raise ValueError(_OTHER)
        # By itself, a program returns an array that it does not change, and no copy.
        return [
            jnp.concatenate([array.reshape(-1) for array in group])
            if len(group) > 1
            else jnp.copy(group[0].reshape(-1))
            for group in flat
        ]

    return jax.jit(pack)
