"""States of every kind of leaf and small ones, for tests of checkpoints: made, saved, compared bit for bit."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from jaxdist.checkpoint.checkpoints import Checkpointer
from jaxdist.spmd.mesh import make_mesh
from jaxdist.spmd.state import TrainState

P = PartitionSpec
MESH = make_mesh()
DTYPES = ("float32", "bfloat16", "float16", "int8", "int32", "uint32", "bool", "complex64", "float8_e4m3fn")


class Slots(NamedTuple):
    count: jax.Array
    slots: dict


def random_bits(shape, dtype, seed):
    generator = np.random.default_rng(seed)
    if dtype == "bool":
        return generator.integers(0, 2, shape).astype(bool)
    size = int(np.prod(shape)) * jnp.dtype(dtype).itemsize
    return np.frombuffer(generator.bytes(size), jnp.dtype(dtype)).reshape(shape)  # NaNs of every kind among them.


def make_state(mesh, spec=None, seed=0):
    """Return a state with every kind of leaf; `spec` is the PartitionSpec of its two-dimensional leaves."""
    spec = P() if spec is None else spec

    def put(value, spec):
        return jax.device_put(value, NamedSharding(mesh, spec))

    slots = {name: put(random_bits((8, 16), name, seed + i), spec) for i, name in enumerate(DTYPES)}
    return TrainState(
        step=put(np.int32(7 + seed), P()),
        params={
            "dense": {"kernel": put(random_bits((16, 8), "float32", seed), spec)},
            "empty": put(np.zeros((0, 4)), P()),
        },
        model_state=None,
        opt_state=(Slots(put(np.int32(seed), P()), slots), optax.EmptyState()),
        key=put(jax.random.key(seed), P()),
    )


def template_of(state, mesh=None, spec=None):
    def struct(leaf):
        where = leaf.sharding if mesh is None else NamedSharding(mesh, spec if leaf.ndim == 2 and leaf.size else P())
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

    return jax.tree.map(struct, state)


def bits(state):
    """Return path -> dtype, shape and bytes of every leaf."""

    def of(leaf):
        data = jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
        return str(leaf.dtype), leaf.shape, np.asarray(data).tobytes()

    return {jax.tree_util.keystr(path): of(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(state)}


def small_state(value, size=4):
    w = jax.device_put(jnp.full(size, value, jnp.float32), NamedSharding(MESH, P()))
    return {"params": {"w": w, "b": w[:2] + 1}, "key": jax.device_put(jax.random.key(value), w.sharding)}


def saved_steps(directory, *steps, **options):
    with Checkpointer(directory, identity="test", **options) as checkpointer:
        for step in steps:
            checkpointer.save(step, small_state(step), {"position": step}, {})
    return directory


def key_struct(impl):
    key = jax.random.key(0, impl=impl)
    return jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=key.sharding)
