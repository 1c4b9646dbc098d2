"""A model small enough to compile often, its batches, and the one-device step written out by hand to compare with."""

import contextlib
import functools
import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxdist.spmd import state as states

NUM_EXAMPLES = 32
NUM_FEATURES = 8

OPTIMIZERS = {
    "sgd": optax.sgd(0.05),
    "momentum": optax.sgd(0.05, momentum=0.9, nesterov=True),
    # The norm of the gradients here is between 1 and 10, so that the clipping acts.
    "adamw": optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(1e-3, weight_decay=0.1)),
}


def init_params(key: jax.Array) -> dict[str, jax.Array]:
    """Two matrices whose dims are all divisible by 8, and a bias whose length is not."""
    first, second = jax.random.split(key)
    return {
        "bias": jnp.zeros((3,)),
        "first": jax.random.normal(first, (NUM_FEATURES, 16)),
        "second": jax.random.normal(second, (16, 8)),
    }


def example_losses(params: Any, batch: Any) -> jax.Array:
    hidden = jnp.tanh(batch["x"] @ params["first"]) @ params["second"]
    return jnp.square(hidden.mean(axis=1) + params["bias"].sum() - batch["y"])


def loss_fn(params: Any, batch: Any, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The plain mean over the true examples: 0/0 where a device holds padding only."""
    del key
    values, mask = example_losses(params, batch), batch["mask"]
    return (values * mask).sum() / mask.sum(), {"above_one": ((values > 1) * mask).sum() / mask.sum()}


def numpy_batch(seed: int = 0, mask: Any = None) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    x = random.normal(size=(NUM_EXAMPLES, NUM_FEATURES)).astype(np.float32)
    mask = np.ones(NUM_EXAMPLES) if mask is None else np.asarray(mask)
    return {"x": x, "y": x.sum(axis=1) + 1, "mask": mask.astype(np.float32)}


def place(tree: Any, mesh: Mesh, *axes: str) -> Any:
    """Place host arrays on the mesh, sharded over `axes` in their leading dim."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec(axes) if axes else PartitionSpec()))


def new_state(optimizer: optax.GradientTransformation, mesh: Mesh) -> states.TrainState:
    return states.create_state(init_params, optimizer, mesh=mesh, seed=0)


@functools.cache
def reference_step(optimizer: optax.GradientTransformation) -> Callable[..., tuple[Any, Any]]:
    """One step on one device, on the whole batch at once, without any code of jaxdist."""

    def step(params: Any, opt_state: Any, batch: Any) -> tuple[Any, Any]:
        def mean_loss(params: Any) -> jax.Array:
            return jnp.sum(example_losses(params, batch) * batch["mask"]) / jnp.sum(batch["mask"])

        updates, opt_state = optimizer.update(jax.grad(mean_loss)(params), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    return jax.jit(step)


def reference_params(optimizer: optax.GradientTransformation, params: Any, batches: list[Any]) -> Any:
    """Return the params after each of several full-batch steps on one device."""
    opt_state = optimizer.init(params)
    for batch in batches:
        params, opt_state = reference_step(optimizer)(params, opt_state, batch)
    return params


def assert_close(actual: Any, expected: Any, tolerance: float = 1e-6) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), actual, expected)


def fingerprint(tree: Any) -> str:
    return hashlib.sha256(b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree))).hexdigest()


@contextlib.contextmanager
def counted_compiles() -> Iterator[list[str]]:
    """Give a list that grows by one for each program XLA compiles. (`_cache_size()` would count lookups, too.)"""
    compiles: list[str] = []

    def listen(event: str, duration: float, **details: Any) -> None:
        del duration
        if event == "/jax/core/compile/backend_compile_duration":
            compiles.append(str(details.get("fun_name")))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield compiles
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
