"""Which server holds which part of the params: leaves are divided into contiguous blocks, assigned largest first.

A block is a range of one leaf, flattened in C order. Blocks have at most `block_bytes`, so that one block is one piece
of a message. Each block goes to the server that holds the fewest bytes so far (the longest-processing-time rule of
Graham), so the sizes of two servers differ by at most the largest block.
"""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

BLOCK_BYTES = 2 << 20
"""A block of this size fits into one frame, so the receiver need not copy it together."""
PACKED_BYTES = 256 << 10
"""Leaves up to this size enter and leave compiled programs as parts of one array."""


@dataclass(frozen=True, slots=True)
class LeafBlock:
    """Elements [start, stop) of leaf number `leaf`; `row` elements make one row (1 for vectors and scalars)."""

    leaf: int
    start: int
    stop: int
    row: int


@dataclass(frozen=True)
class Sharding:
    """The blocks of each server and the leaves that they belong to; the same in every process of a run."""

    shards: tuple[tuple[LeafBlock, ...], ...]
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[np.dtype, ...]
    whole_leaves: bool = False

    def shape(self, block: LeafBlock) -> tuple[int, ...]:
        """Return the shape of a block for the optimizer: a whole leaf's shape, or one with the rank of its leaf.

        Masks for weight decay look at the rank.
        """
        shape = self.shapes[block.leaf]
        return shape if self.whole_leaves or not shape else (block.stop - block.start,) + (1,) * (len(shape) - 1)

    @property
    def num_bytes(self) -> tuple[int, ...]:
        """The number of bytes that each server holds."""
        return tuple(sum(_bytes(block, self.dtypes) for block in shard) for shard in self.shards)

    def split(self, leaves: Sequence[np.ndarray]) -> tuple[tuple[np.ndarray, ...], ...]:
        """Return the blocks of `leaves` for each server as 1-d arrays; they are views if the leaf is contiguous."""
        self._check(leaves)
        flat = [np.ascontiguousarray(leaf).reshape(-1) for leaf in leaves]
        return tuple(tuple(flat[b.leaf][b.start : b.stop] for b in shard) for shard in self.shards)

    def join(self, shards: Sequence[Sequence[np.ndarray]]) -> list[np.ndarray]:
        """Return the leaves whose blocks are `shards`, in new arrays; the inverse of `split`."""
        leaves = [np.empty(shape, dtype) for shape, dtype in zip(self.shapes, self.dtypes, strict=True)]
        flat = [leaf.reshape(-1) for leaf in leaves]
        for blocks, pieces in zip(self.shards, shards, strict=True):
            for block, piece in zip(blocks, pieces, strict=True):
                flat[block.leaf][block.start : block.stop] = piece
        return leaves

    def _check(self, leaves: Sequence[np.ndarray]) -> None:
        got = [(tuple(leaf.shape), np.dtype(leaf.dtype)) for leaf in leaves]
        want = list(zip(self.shapes, self.dtypes, strict=True))
        if got != want:
            wrong = next((i for i, pair in enumerate(zip(got, want)) if pair[0] != pair[1]), min(len(got), len(want)))
            raise ValueError(
                f"The leaves must be those that the sharding was made for: leaf {wrong} of {len(got)} is "
                f"{got[wrong] if wrong < len(got) else 'missing'}, expected "
                f"{want[wrong] if wrong < len(want) else 'none'}. Pass a tree with the structure of the params."
            )


@dataclass(frozen=True)
class LeafPacking:
    """All leaves in few arrays: each that enters or leaves a compiled program costs as much as a small operation.

    A large leaf is an array of its own, since packing it would cost a copy.

    Attributes:
      sharding: the leaves and their blocks.
      places: the array of each leaf, and the first of its elements there.
      arrays: size and dtype of each array, all with one dim.
    """

    sharding: Sharding
    places: tuple[tuple[int, int], ...]
    arrays: tuple[tuple[int, np.dtype], ...]

    @classmethod
    def of(cls, sharding: Sharding) -> "LeafPacking":
        """Return how these leaves are packed."""
        places: list[tuple[int, int]] = []
        arrays: list[tuple[int, np.dtype]] = []
        shared: dict[np.dtype, int] = {}
        for shape, dtype in zip(sharding.shapes, sharding.dtypes, strict=True):
            size, is_small = math.prod(shape), math.prod(shape) * dtype.itemsize <= PACKED_BYTES
            number = shared.setdefault(dtype, len(arrays)) if is_small else len(arrays)
            if number == len(arrays):
                arrays.append((0, dtype))
            before = arrays[number][0]
            places.append((number, before))
            arrays[number] = before + size, dtype
        return cls(sharding, tuple(places), tuple(arrays))

    def join(self, shards: Sequence[Sequence[np.ndarray]]) -> list[np.ndarray]:
        """Return the arrays, with the leaves whose blocks are `shards`."""
        arrays = [np.empty(size, dtype) for size, dtype in self.arrays]
        for blocks, pieces in zip(self.sharding.shards, shards, strict=True):
            for block, piece in zip(blocks, pieces, strict=True):
                self._part(arrays, block)[:] = piece
        return arrays

    def split(self, arrays: Sequence[np.ndarray]) -> tuple[tuple[np.ndarray, ...], ...]:
        """Return the blocks for each server: views of the arrays."""
        return tuple(tuple(self._part(arrays, block) for block in shard) for shard in self.sharding.shards)

    def _part(self, arrays: Sequence[np.ndarray], block: LeafBlock) -> np.ndarray:
        number, first = self.places[block.leaf]
        return arrays[number][first + block.start : first + block.stop]

    def unpack(self, arrays: Sequence[jax.Array]) -> list[jax.Array]:
        """Return the leaves, in a compiled program, which computes with them as if they had come one by one."""
        pairs = zip(self.places, self.sharding.shapes, strict=True)
        leaves = [arrays[number][at : at + math.prod(shape)].reshape(shape) for (number, at), shape in pairs]
        return jax.lax.optimization_barrier(leaves)

    def pack(self, leaves: Sequence[jax.Array]) -> list[jax.Array]:
        """Return the arrays, in a compiled program; the inverse of `unpack`."""
        parts: list[list[jax.Array]] = [[] for _ in self.arrays]
        kept = jax.lax.optimization_barrier(list(leaves))
        for leaf, (number, _), dtype in zip(kept, self.places, self.sharding.dtypes, strict=True):
            parts[number].append(leaf.astype(dtype).reshape(-1))
        return [each[0] if len(each) == 1 else jnp.concatenate(each) for each in parts]


def _bytes(block: LeafBlock, dtypes: Sequence[np.dtype]) -> int:
    return (block.stop - block.start) * dtypes[block.leaf].itemsize


def _divide(leaf: int, shape: tuple[int, ...], itemsize: int, block_bytes: int) -> list[LeafBlock]:
    """Divide one leaf; between rows if a row fits into a block, so that a row-sparse push stays row-sparse."""
    size = int(np.prod(shape, dtype=np.int64))
    row = int(np.prod(shape[1:], dtype=np.int64)) if len(shape) > 1 else 1
    capacity = max(1, block_bytes // itemsize)
    row = row if 0 < row <= capacity else 1
    length = capacity // row * row
    return [LeafBlock(leaf, start, min(start + length, size), row) for start in range(0, size, length)]


def make_sharding(
    params: Any, *, num_servers: int, block_bytes: int = BLOCK_BYTES, whole_leaves: bool = False
) -> Sharding:
    """Return how the leaves of `params` (arrays or ShapeDtypeStructs, in tree order) are distributed over the servers.

    With `whole_leaves` no leaf is divided, for optimizers that need the whole leaf.

    Raises:
      ValueError: there is no server, the block size is below one byte, or there are fewer blocks than servers.
    """
    if num_servers < 1 or block_bytes < 1:
        raise ValueError(
            f"A sharding needs at least 1 server and 1 byte per block; got {num_servers} and {block_bytes}."
        )
    leaves = jax.tree.leaves(params)
    shapes = tuple(tuple(leaf.shape) for leaf in leaves)
    dtypes = tuple(np.dtype(leaf.dtype) for leaf in leaves)
    blocks = []
    for leaf, shape in enumerate(shapes):
        size = int(np.prod(shape, dtype=np.int64)) * dtypes[leaf].itemsize
        blocks += _divide(leaf, shape, dtypes[leaf].itemsize, max(size, 1) if whole_leaves else block_bytes)
    if len(blocks) < num_servers:
        raise ValueError(
            f"{num_servers} servers share {len(blocks)} {'leaves' if whole_leaves else 'blocks'}, so some would hold "
            f"nothing. Set ps.servers to at most {len(blocks)}."
        )
    shards: list[list[LeafBlock]] = [[] for _ in range(num_servers)]
    load = [(0, server) for server in range(num_servers)]
    for block in sorted(blocks, key=lambda b: -_bytes(b, dtypes)):
        held, server = heapq.heappop(load)
        shards[server].append(block)
        heapq.heappush(load, (held + _bytes(block, dtypes), server))
    ordered = tuple(tuple(sorted(shard, key=lambda b: (b.leaf, b.start))) for shard in shards)
    return Sharding(ordered, shapes, dtypes, whole_leaves)
