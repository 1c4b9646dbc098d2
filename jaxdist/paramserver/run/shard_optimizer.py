"""An optax optimizer on the blocks of one server.

An optimizer that clips by the global norm also needs the gradients of the other servers. It gets a *ghost*, one
additional element whose square is the missing part of the squared norm, so that it computes the global norm.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import optax

from jaxdist.paramserver.run.optimizer_kind import GHOST_SHAPE, Kind, Marked, needs_norm, with_ghost
from jaxdist.spmd.state import WithInputs

Arrays = tuple[np.ndarray, ...]


@dataclass(frozen=True)
class _Made:
    """The result of an update: JAX arrays, and the same memory as NumPy arrays, which the protocol handles.

    Most updates begin with the result of the one before, and then JAX need not take up the arrays again.
    """

    params: Arrays
    opt_state: Arrays
    jax_params: tuple[jax.Array, ...]
    jax_opt_state: tuple[jax.Array, ...]

    @classmethod
    def of(cls, params: Sequence[jax.Array], opt_state: Sequence[jax.Array]) -> "_Made":
        """Return both views of what an update made."""
        return cls(tuple(map(np.asarray, params)), tuple(map(np.asarray, opt_state)), tuple(params), tuple(opt_state))

    def instead_of(self, params: Arrays, opt_state: Arrays) -> tuple[Any, Any]:
        """Return the JAX arrays of these params and this state, or themselves if they are not what was made."""
        mine = all(a is b for a, b in zip(self.params, params)) and len(self.params) == len(params)
        mine = mine and all(a is b for a, b in zip(self.opt_state, opt_state)) and bool(self.params)
        return (self.jax_params, self.jax_opt_state) if mine else (params, opt_state)


class OptaxUpdater:
    """The optimizer of one shard.

    Args:
      optimizer: the optax optimizer.
      kind: the result of `choose_kind`.
      shapes: the shape of each block of params. Further blocks are model state (batch statistics), which an update
        replaces by the pushed mean.
      names: the path of the leaf of each block of params.
    """

    def __init__(
        self,
        optimizer: optax.GradientTransformation,
        *,
        kind: Kind,
        shapes: Sequence[tuple[int, ...]],
        names: Sequence[str],
    ) -> None:
        self.needs_norm = needs_norm(kind)
        self.shapes, self.names, self.num_params = tuple(shapes), tuple(names), len(shapes)
        self._optimizer = optimizer
        self._inputs = optimizer.inputs if isinstance(optimizer, WithInputs) else None
        self._structure: Any = None
        self._step = jax.jit(self._update)
        self._made = _Made((), (), (), ())

    def init(self, params: Arrays) -> Arrays:
        """Return the leaves of the optimizer state."""
        state = jax.jit(self._optimizer.init)(self._tree(params[: self.num_params], 0.0))
        leaves, self._structure = jax.tree.flatten(state)
        return tuple(np.asarray(leaf) for leaf in leaves)

    def update(
        self, params: Arrays, opt_state: Arrays, grads: Arrays, *, step: int, scale: float, norm_squared: float
    ) -> tuple[Arrays, Arrays]:
        """Return blocks and state after one step; see `shard.Updater`."""
        n = self.num_params
        rest = 0.0
        if self.needs_norm:
            rest = math.sqrt(max(norm_squared - sum(float(np.vdot(g, g).real) for g in grads[:n]), 0.0))
        # Left out if it is 1, because another multiplication changes how the compiler rounds those around it.
        factor = None if scale == 1.0 else np.float32(scale)
        blocks = self._tree(grads[:n], rest)
        before = self._made.instead_of(params[:n], opt_state)
        updated, leaves = self._step(*before, blocks, factor, np.int32(step), self._inputs)
        made = _Made.of(updated, leaves)
        self._made = made
        return (*made.params, *grads[n:]), made.opt_state

    def _tree(self, blocks: Sequence[Any], rest: float) -> Marked:
        shaped = [block.reshape(shape) for block, shape in zip(blocks, self.shapes, strict=True)]
        params = Marked(shaped, self.names)
        return with_ghost(params, np.full(GHOST_SHAPE, rest, np.float32)) if self.needs_norm else params

    def _update(
        self,
        params: Any,
        opt_state: Any,
        grads: Any,
        scale: jax.Array | None,
        step: jax.Array,
        inputs: jax.Array | None,
    ) -> tuple[Any, Any]:
        state = jax.tree.unflatten(self._structure, opt_state)
        whole = self._tree(params, 0.0)
        blocks = whole.items[: self.num_params]
        # The learning rate goes by all steps, as on devices: its own count leaves out those without an update.
        extra = {"step": step, "inputs": inputs} if isinstance(self._optimizer, WithInputs) else {}
        updates, state = optax.with_extra_args_support(self._optimizer).update(grads, state, whole, **extra)
        updates = updates.items[: self.num_params]
        if scale is not None:
            updates = jax.tree.map(lambda update: update * scale, updates)
        updated = optax.apply_updates(blocks, updates)
        return tuple(leaf.reshape(-1) for leaf in updated), jax.tree.leaves(state)
