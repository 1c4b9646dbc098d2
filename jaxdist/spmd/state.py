"""What training carries from one step to the next, created already laid out over the mesh."""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from jaxdist.spmd import layout as layouts

PyTree: TypeAlias = Any
InitFn: TypeAlias = Callable[[jax.Array], Any]
"""`init_fn(key) -> params`, or `(params, model_state)` for a model that keeps statistics."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Arrays only. `step` counts finished updates (int32, scalar); `model_state` is None for stateless models."""

    step: jax.Array
    params: PyTree
    model_state: PyTree
    opt_state: PyTree
    key: jax.Array


def create_state(
    init_fn: InitFn,
    optimizer: optax.GradientTransformation,
    *,
    mesh: Mesh,
    seed: int,
    layout: layouts.Layout = layouts.replicated,
) -> TrainState:
    """Return the state before the first step, every leaf born with its final sharding.

    One jitted program makes it, so no device ever holds more than its own shards, and the train step, which sees the
    same shardings from its first call to its last, compiles once.
    """
    return state_program(init_fn, optimizer, mesh=mesh, layout=layout)(jax.random.key(seed))


def state_program(
    init_fn: InitFn,
    optimizer: optax.GradientTransformation,
    *,
    mesh: Mesh,
    layout: layouts.Layout = layouts.replicated,
) -> jax.stages.Wrapped:
    """Return the jitted function of a key that `create_state` calls; its `lower` shows what it will do."""
    make = _make_state_fn(init_fn, optimizer)
    shardings = layouts.shardings(jax.eval_shape(make, jax.random.key(0)), mesh, layout)
    return jax.jit(make, out_shardings=shardings)


def abstract_state(
    init_fn: InitFn,
    optimizer: optax.GradientTransformation,
    *,
    mesh: Mesh,
    layout: layouts.Layout = layouts.replicated,
) -> TrainState:
    """Return the state's shapes, dtypes and shardings as ShapeDtypeStructs, without computing anything."""
    shapes = jax.eval_shape(_make_state_fn(init_fn, optimizer), jax.random.key(0))
    shardings = layouts.shardings(shapes, mesh, layout)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes, shardings
    )


def _make_state_fn(init_fn: InitFn, optimizer: optax.GradientTransformation) -> Callable[[jax.Array], TrainState]:
    def make(key: jax.Array) -> TrainState:
        init_key, train_key = jax.random.split(key)
        created = init_fn(init_key)
        params, model_state = created if isinstance(created, tuple) and len(created) == 2 else (created, None)
        return TrainState(jnp.zeros((), jnp.int32), params, model_state, optimizer.init(params), train_key)

    return make
