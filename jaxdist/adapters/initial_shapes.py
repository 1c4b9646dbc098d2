"""The shapes of what a model begins with; where a job starts again, process 0 traces the model and tells the others."""

import json
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxdist.spmd import device_program

PyTree: TypeAlias = Any


class InitialShapes:
    """Finds the shapes of new params and model_state by tracing what makes them.

    With a mesh of several processes process 0 traces and tells the others, which all have to ask. Without one each
    traces: so mistakes in the model are found by the process that is asked.
    """

    def __init__(self, mesh: Mesh | None = None):
        self._mesh = mesh
        self._told: tuple[PyTree, PyTree] | None = None

    def of(self, init: Callable[[jax.Array], tuple[PyTree, PyTree]], name: str) -> tuple[PyTree, PyTree]:
        """Return the shapes of `init(key)`, (params, model_state), of the module called `name`."""

        def trace() -> tuple[PyTree, PyTree]:
            return jax.eval_shape(init, jax.random.key(0))

        def read(content: bytes) -> tuple[PyTree, PyTree]:
            params, model_state = map(_built, json.loads(content))
            self._told = params, model_state
            return self._told

        if self._mesh is None:
            return trace()
        asked = f"initial shapes of {name}"
        with device_program.TOLD.kept():
            return device_program.told_by_first(asked, trace, self._mesh, write=_written, read=read)

    def alike(self, init_fn: Callable[[jax.Array], Any]) -> Callable[[jax.Array], Any]:
        """Return a function that gives arrays of the shapes of `init_fn`, perhaps other numbers, sooner traced."""
        if self._told is None:
            return init_fn
        params, model_state = self._told
        known = (params, model_state) if model_state else params
        return lambda key: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), known)


def _written(shapes: tuple[PyTree, PyTree]) -> bytes | None:
    """Return the shapes as JSON; None for a tree that is not of dicts alone, such as boxed params."""
    described = [_described(tree) for tree in shapes]
    return None if None in described else json.dumps(described).encode()


def _described(tree: PyTree) -> Any:
    if isinstance(tree, jax.ShapeDtypeStruct):
        return [tree.shape, str(tree.dtype)] if isinstance(tree.dtype, np.dtype) else None
    if type(tree) is not dict or not all(isinstance(name, str) for name in tree):
        return None
    parts = {name: _described(part) for name, part in tree.items()}
    return None if None in parts.values() else parts


def _built(described: Any) -> PyTree:
    if isinstance(described, dict):
        return {name: _built(part) for name, part in described.items()}
    shape, dtype = described
    return jax.ShapeDtypeStruct(tuple(shape), jnp.dtype(dtype))
