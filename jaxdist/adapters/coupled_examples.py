"""Whether a loss gives an example another value beside other examples, as contrastive losses do."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdist.adapters.functions import Loss


def are_coupled(loss: Loss, outputs: Any, batch: Mapping[str, Any]) -> bool:
    """Return whether the value that a loss gives to the first of two examples changes with the second.

    It is tried, with outputs drawn at random: once beside the second example, once beside a copy of the first. A loss
    that fails on two examples, or gives no value for each, is taken to be fine.

    `outputs` are shapes and dtypes of what the model returns, for any number of examples.
    """
    random = np.random.default_rng(0)

    def drawn(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        return jnp.asarray(random.normal(size=(2, *leaf.shape[1:])), leaf.dtype)

    def of_first(outputs: Any, fields: Mapping[str, Any]) -> list[jax.Array]:
        return [leaf[0] for leaf in jax.tree.leaves(loss(outputs, dict(fields))[0])]

    try:
        both = (jax.tree.map(drawn, outputs), {name: jnp.asarray(field) for name, field in batch.items()})
        first = jax.tree.map(lambda leaf: leaf.at[1].set(leaf[0]), both)
        beside_second, beside_itself = jax.jit(lambda *pairs: [of_first(*pair) for pair in pairs])(both, first)
    except Exception:
        return False  # what is wrong with the loss is told by the checks of its shapes
    pairs = zip(beside_second, beside_itself, strict=True)
    return not all(np.allclose(one, other, rtol=1e-4, atol=1e-6, equal_nan=True) for one, other in pairs)
