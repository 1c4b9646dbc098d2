"""Trials of plain functions and models on two examples: their params, which are drawn, and what traces tell of dims."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdist.spmd import state
from jaxdist.spmd.metrics import MASK

EXAMPLES = 1009
"""A number of examples, for tracing: a prime, so that a shape tells whether an array still has a value for each."""
_LINEAR = frozenset(
    {"add", "add_any", "sub", "neg", "convert_element_type", "reshape", "squeeze", "reduce_sum", "copy"}
)
OPAQUE = frozenset({"while", "pure_callback"})
"""What is not looked into: it may do anything with its operands."""
_MOST_VALUES = 1 << 26


def are_few(abstract: state.TrainState) -> bool:
    """Return whether the values of params and model_state are few enough to be drawn."""
    return sum(leaf.size for leaf in jax.tree.leaves((abstract.params, abstract.model_state))) <= _MOST_VALUES


def described(batch: Mapping[str, np.ndarray]) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the shapes of a batch of EXAMPLES examples like these."""
    return {name: jax.ShapeDtypeStruct((EXAMPLES, *field.shape[1:]), field.dtype) for name, field in batch.items()}


def dims_of_examples(atom: Any) -> set[int]:
    """Return the dims of a value in a trace that follow the number of examples."""
    return {dim for dim, size in enumerate(getattr(atom.aval, "shape", ())) if size and size % EXAMPLES == 0}


def has_examples(atom: Any) -> bool:
    """Return whether a value in a trace has a dim that follows the number of examples."""
    return bool(dims_of_examples(atom))


def is_linear(name: str, marked: Sequence[Any]) -> bool:
    """Return whether the result of a primitive is linear in its marked operands."""
    return name in _LINEAR or (name == "mul" and not all(marked)) or (name == "div" and not marked[1])


def arguments(params: Any, model_state: Any, batch: Any, key: Any) -> list[Any]:
    """Return what a loss_fn is called with."""
    return [params, batch, key, *([] if model_state is None else [model_state])]


def draw(abstract: state.TrainState, seed: int) -> tuple[Any, Any]:
    """Return params and model_state of these shapes; the params are drawn, and the state is of ones."""
    values = np.random.default_rng(seed).normal(scale=0.1, size=1021)
    params = jax.tree.map(lambda leaf: np.resize(values, leaf.shape).astype(leaf.dtype), abstract.params)
    return params, jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), abstract.model_state)


def counting(batch: Mapping[str, np.ndarray], which: Sequence[int]) -> dict[str, np.ndarray]:
    """Return the batch with a mask by which only these of its rows count, as far as they did."""
    mask = batch[MASK]
    return {**batch, MASK: np.array(which, mask.dtype).reshape(-1, *[1] * (mask.ndim - 1)) * mask}
