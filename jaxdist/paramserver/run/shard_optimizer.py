"""An optax optimizer on the pieces of a server shard: which ones may run there, and the update itself.

A server sees its own blocks only. An optimizer that works element by element does not mind. One that clips by the
global norm needs to know how much gradient lies elsewhere: it gets a *ghost*, one more element whose square is that
norm's missing part, so that every norm it takes is the global one. What gives other numbers on pieces than on the whole
is found out by trying, before training starts, and refused.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

Kind = Literal["elementwise", "global_norm"]
Arrays = tuple[np.ndarray, ...]

GHOST_SHAPE = (1,)


def classify(optimizer: optax.GradientTransformation, shapes: Sequence[tuple[int, ...]]) -> Kind:
    """Return how `optimizer` can run on shards of params of these shapes.

    Tries it for a few steps on small random leaves of the same ranks, whole and cut up, with small and large gradients.

    Raises:
      ValueError: it gives other updates on pieces than on whole leaves.
    """
    leaves = sorted({_small(shape) for shape in shapes})
    rng = np.random.default_rng(0)
    params = [np.asarray(rng.normal(size=shape), np.float32) for shape in leaves]
    grads = [[np.asarray(rng.normal(size=s) * size, np.float32) for s in leaves] for size in (0.01, 1.0, 100.0)]
    try:
        whole = _try_whole(optimizer, params, grads)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"this optimizer depends on the params' tree, which a server's shard does not have ({error}). "
            "Use one that works on any tree: masks may look at a leaf's rank, not at its name"
        ) from error
    for kind in ("elementwise", "global_norm"):
        if _close(whole, _try_pieces(optimizer, params, grads, ghost=kind == "global_norm")):
            return kind
    raise ValueError(
        "this optimizer gives other updates on pieces of the params than on the whole, so it cannot run on the shards "
        "of a parameter server: it mixes elements otherwise than by the global norm of the gradients. Use one that "
        "works element by element (SGD, momentum, Adam, AdamW, Lion; clipping by global norm may come first)"
    )


def _small(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(min(size, 4) for size in shape)


def _try_whole(
    optimizer: optax.GradientTransformation, params: list[np.ndarray], steps: list[list[np.ndarray]]
) -> list[np.ndarray]:
    return [leaf.reshape(-1) for leaf in _last_updates(optimizer, params, steps)]


def _last_updates(
    optimizer: optax.GradientTransformation, params: list[np.ndarray], steps: list[list[np.ndarray]]
) -> list[np.ndarray]:
    def play(params: Any, steps: Any) -> Any:
        state, updates = optimizer.init(params), params
        for grads in steps:
            updates, state = optimizer.update(grads, state, params)
        return updates

    return [np.asarray(leaf) for leaf in jax.jit(play)(params, steps)]  # one program: compiling is all the cost


def _try_pieces(
    optimizer: optax.GradientTransformation, params: list[np.ndarray], steps: list[list[np.ndarray]], *, ghost: bool
) -> list[np.ndarray]:
    """Update two halves of every leaf by themselves, and put the halves together again."""
    updates = []
    for side in (0, 1):
        mine = [_halves(grads, side) for grads in steps]
        norms = [sum(float(np.vdot(g, g)) for g in grads) for grads in steps]
        rests = [norm - sum(float(np.vdot(g, g)) for g in half) for norm, half in zip(norms, mine)]
        grown = [_with_ghost(half, math.sqrt(max(rest, 0.0)), ghost=ghost) for half, rest in zip(mine, rests)]
        tree = _with_ghost(_halves(params, side), 0.0, ghost=ghost)
        found = _last_updates(optimizer, tree, grown)
        updates.append([leaf.reshape(-1) for leaf in found[: len(mine[0])]])
    second = iter(updates[1])
    return [np.concatenate([half, next(second)]) if leaf.size > 1 else half for half, leaf in zip(updates[0], params)]


def _halves(leaves: list[np.ndarray], side: int) -> list[np.ndarray]:
    cuts = [(leaf.reshape(-1), (leaf.size + 1) // 2, leaf.ndim) for leaf in leaves]
    if side == 0:
        return [with_rank(flat[:cut], rank) for flat, cut, rank in cuts]
    return [with_rank(flat[cut:], rank) for flat, cut, rank in cuts if flat.size > 1]


def _with_ghost(tree: list[np.ndarray], value: float, *, ghost: bool) -> list[np.ndarray]:
    return [*tree, np.full(GHOST_SHAPE, value, np.float32)] if ghost else tree


def with_rank(block: Any, rank: int) -> Any:
    """Return a flat block with its leaf's rank, which is what masks for weight decay look at."""
    return block.reshape((-1,) + (1,) * (rank - 1)) if rank else block.reshape(())


def _close(whole: list[np.ndarray], pieces: list[np.ndarray]) -> bool:
    pairs = zip(whole, pieces, strict=True)
    return all(np.allclose(a, b, rtol=1e-4, atol=1e-7, equal_nan=True) for a, b in pairs)


class OptaxUpdater:
    """The optimizer of one shard.

    Args:
      optimizer: optax.
      kind: what `classify` said.
      ranks: the rank of each params block's leaf. Blocks beyond these are model state (batch statistics), which an
        update replaces by the mean that was pushed.
    """

    def __init__(self, optimizer: optax.GradientTransformation, *, kind: Kind, ranks: Sequence[int]) -> None:
        self.needs_norm = kind == "global_norm"
        self.ranks, self.num_params = tuple(ranks), len(ranks)
        self._optimizer = optimizer
        self._structure: Any = None
        self._step = jax.jit(self._update)

    def init(self, params: Arrays) -> Arrays:
        """Return the leaves of the optimizer's state."""
        state = jax.jit(self._optimizer.init)(self._tree(params[: self.num_params], 0.0))
        leaves, self._structure = jax.tree.flatten(state)
        return tuple(np.asarray(leaf) for leaf in leaves)

    def update(
        self, params: Arrays, opt_state: Arrays, grads: Arrays, *, scale: float, norm_squared: float
    ) -> tuple[Arrays, Arrays]:
        """Return blocks and state after one step; see `shard.Updater`."""
        n = self.num_params
        rest = 0.0
        if self.needs_norm:
            rest = math.sqrt(max(norm_squared - sum(float(np.vdot(g, g)) for g in grads[:n]), 0.0))
        # Left out where it is 1: one more product changes how the compiler rounds the ones around it.
        factor = None if scale == 1.0 else np.float32(scale)
        updated, leaves = self._step(params[:n], opt_state, self._tree(grads[:n], rest), factor)
        return (*map(np.asarray, updated), *grads[n:]), tuple(map(np.asarray, leaves))

    def _tree(self, blocks: Arrays, rest: float) -> Arrays:
        ghost = (np.full(GHOST_SHAPE, rest, np.float32),) if self.needs_norm else ()
        return (*(with_rank(block, rank) for block, rank in zip(blocks, self.ranks, strict=True)), *ghost)

    def _update(self, params: Any, opt_state: Any, grads: Any, scale: jax.Array | None) -> tuple[Any, Any]:
        state = jax.tree.unflatten(self._structure, opt_state)
        blocks = tuple(with_rank(block, rank) for block, rank in zip(params, self.ranks, strict=True))
        whole = (*blocks, jnp.zeros(GHOST_SHAPE, jnp.float32)) if self.needs_norm else blocks
        updates, state = self._optimizer.update(grads, state, whole)
        updates = updates[: len(blocks)]
        if scale is not None:
            updates = jax.tree.map(lambda update: update * scale, updates)
        updated = optax.apply_updates(blocks, updates)
        return tuple(leaf.reshape(-1) for leaf in updated), jax.tree.leaves(state)
