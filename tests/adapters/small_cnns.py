"""Small CNNs in Linen and NNX, their functions, and batches for them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxdist import adapters, losses
from jaxdist.models import cnn, cnn_nnx

ADAPT = {"linen": (adapters.linen, cnn.CNN), "nnx": (adapters.nnx, cnn_nnx.CNN)}
KINDS = sorted(ADAPT)
ROWS = 6
EXAMPLE = {
    "image": jax.ShapeDtypeStruct((ROWS, 8, 8, 1), jnp.float32),
    "label": jax.ShapeDtypeStruct((ROWS,), jnp.int32),
    "mask": jax.ShapeDtypeStruct((ROWS,), jnp.float32),
}


@functools.cache
def functions(kind: str, **hyperparameters) -> adapters.Functions:
    """The jitted functions of a tiny CNN."""
    adapt, model = ADAPT[kind]
    made = adapt(model(num_classes=10, width=2, num_stages=1, **hyperparameters), losses.classification, EXAMPLE)
    return adapters.Functions(*map(jax.jit, made))


def random_variables(fns: adapters.Functions):
    """What init_fn returns, filled with positive numbers (a variance is positive) without compiling an init."""
    random = np.random.default_rng(1)
    shapes = jax.eval_shape(fns.init_fn, jax.random.key(0))
    return jax.tree.map(lambda leaf: jnp.asarray(random.uniform(0.1, 0.5, leaf.shape), leaf.dtype), shapes)


def make_batch(num_true: int = ROWS, seed: int = 0, padding: float = 0.0) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    mask = (np.arange(ROWS) < num_true).astype(np.float32)
    image = random.normal(size=(ROWS, 8, 8, 1)).astype(np.float32)
    image[num_true:] = padding
    return {"image": image, "label": random.integers(0, 10, ROWS).astype(np.int32), "mask": mask}


def assert_trees_close(actual, expected, **tolerances):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerances), actual, expected)
