"""Converts between the whole state of an optimizer, as in checkpoints, and the states on the shards of servers.

The state of a shard belongs to its blocks, the whole state to the leaves. Here both are built with a marked tuple in
place of the params, which shows where an optimizer keeps one array for each param; everything else, for example a
count of steps, is the same on every shard.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import optax

from jaxdist.paramserver.run.optimizer_kind import GHOST_SHAPE, Marked, with_ghost
from jaxdist.paramserver.run.sharding import LeafBlock, Sharding


@dataclass(frozen=True)
class OptimizerSharding:
    """How the state of an optimizer is divided among the shards.

    Attributes:
      optimizer: the optax optimizer.
      sharding: sharding of the params, followed by the model state.
      names: the path of each leaf that is a param.
      ghost: whether each shard has one additional element (see `shard_optimizer`).

    Raises:
      ValueError: the optimizer keeps an array for each param that does not have the shape of the param.
    """

    optimizer: optax.GradientTransformation
    sharding: Sharding
    names: tuple[str, ...]
    ghost: bool

    def __post_init__(self) -> None:
        params = self._params()
        for part in _parts(self._state(params))[0]:
            for kept, param in zip(part.items, params.items) if isinstance(part, Marked) else ():
                if _is_array(kept) and kept.shape != param.shape and not self.sharding.whole_leaves:
                    raise ValueError(
                        "The parameter server divides the optimizer state in the same way as the params. This "
                        f"optimizer keeps an array of shape {kept.shape} for a param of shape {param.shape}. Use one "
                        "whose state has the shapes of the params, or another strategy."
                    )

    def join(self, states: Sequence[Sequence[np.ndarray]]) -> list[np.ndarray]:
        """Return the leaves of the whole state, given the leaves of the state of each shard."""
        parts, structure = _parts(self._state(self._params()))
        shards = [
            _parts(jax.tree.unflatten(jax.tree.structure(self._state(self._blocks(shard))), leaves))[0]
            for shard, leaves in enumerate(states)
        ]
        joined = [self._join_part(part, [shard[number] for shard in shards]) for number, part in enumerate(parts)]
        return jax.tree.leaves(jax.tree.unflatten(structure, joined))

    def _join_part(self, part: Any, pieces: Sequence[Any]) -> Any:
        if not isinstance(part, Marked):
            return np.asarray(pieces[0])
        divided = not self.sharding.whole_leaves
        whole = [np.empty(kept.shape, kept.dtype) if divided and _is_array(kept) else kept for kept in part.items]
        for shard, piece in enumerate(pieces):
            for block, values in zip(self._param_blocks(shard), piece.items):
                if not divided:
                    whole[block.leaf] = values
                elif _is_array(values):
                    whole[block.leaf].reshape(-1)[block.start : block.stop] = np.reshape(values, -1)
        return Marked(whole, part.names)

    def split(self, leaves: Sequence[np.ndarray]) -> list[tuple[np.ndarray, ...]]:
        """Return the leaves of the state of each shard, given the leaves of the whole state."""
        structure = jax.tree.structure(self._state(self._params()))
        parts, _ = _parts(jax.tree.unflatten(structure, leaves))
        nothing = Marked((), ())
        only = with_ghost(nothing, np.zeros(GHOST_SHAPE, np.float32)) if self.ghost else nothing
        ghosts, _ = _parts(self.optimizer.init(only))
        return [self._split_shard(shard, parts, ghosts) for shard in range(len(self.sharding.shards))]

    def _split_shard(self, shard: int, parts: Sequence[Any], ghosts: Sequence[Any]) -> tuple[np.ndarray, ...]:
        blocks, made = self._param_blocks(shard), []
        for part, ghost in zip(parts, ghosts, strict=True):
            if isinstance(part, Marked):
                made.append([*(self._part(part.items[block.leaf], block) for block in blocks), *ghost.items])
            else:
                made.append(part)
        return tuple(np.asarray(leaf) for leaf in jax.tree.leaves(made))

    def _part(self, kept: Any, block: LeafBlock) -> Any:
        """Return the part of the block of what is kept for a param; what is not an array is returned unchanged."""
        if self.sharding.whole_leaves or not _is_array(kept):
            return kept
        return np.reshape(kept, -1)[block.start : block.stop].reshape(self.sharding.shape(block))

    def _state(self, params: Marked) -> Any:
        return jax.eval_shape(self.optimizer.init, params)

    def _params(self) -> Marked:
        pairs = zip(self.sharding.shapes[: len(self.names)], self.sharding.dtypes)
        return Marked([jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in pairs], self.names)

    def _param_blocks(self, shard: int) -> list[LeafBlock]:
        return [block for block in self.sharding.shards[shard] if block.leaf < len(self.names)]

    def _blocks(self, shard: int) -> Marked:
        blocks = self._param_blocks(shard)
        shapes = [jax.ShapeDtypeStruct(self.sharding.shape(b), self.sharding.dtypes[b.leaf]) for b in blocks]
        found = Marked(shapes, [self.names[b.leaf] for b in blocks])
        return with_ghost(found) if self.ghost else found


def _parts(tree: Any) -> tuple[list[Any], Any]:
    return jax.tree.flatten(tree, is_leaf=lambda node: isinstance(node, Marked))


def _is_array(kept: Any) -> bool:
    return hasattr(kept, "shape")
