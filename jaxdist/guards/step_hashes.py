"""Hashes of a canonical step: what two runs are compared by, step for step, down to the leaf and the logical shard.

The numbers do not depend on the number of devices, since the bits that they stand for do not. Each is read off memory
that the step has just written, once: that is what it costs.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jaxdist.guards import array_hash
from jaxdist.spmd import reduce
from jaxdist.spmd.canonical.canonical_step import Applied, together
from jaxdist.spmd.layout import path_name
from jaxdist.spmd.state import TrainState

REST = "loss and metrics"
"""What else a logical shard sums: its loss, its metrics, its counts."""


class StepHashing:
    """One hash for the sums of each logical shard; for each step one of every leaf of the gradients, params and
    model_state, and one of `REST`.
    """

    def of_shard(self, flat: jax.Array) -> jax.Array:
        """Return the hash of the sums of one logical shard, a vector: shape (1,)."""
        return array_hash.of_array(flat)[None]

    def of_step(self, sums: reduce.Sums, params: Any, model_state: Any, applied: Applied = together) -> jax.Array:
        """Return the hashes of the sums of the whole batch, and of the state after the step; see `names`.

        `applied(function, vector)` computes the hash of each leaf.
        """
        rest = array_hash.of_arrays(jax.tree.leaves(sums._replace(grads=None)))
        return jnp.concatenate([_each(sums.grads, applied), rest[None], _each((params, model_state), applied)])


def of_state(state: TrainState) -> jax.Array:
    """Return the hashes of the leaves of params and model_state, in the order of their `names`."""
    return _each((state.params, state.model_state))


def names(state: TrainState) -> list[str]:
    """Return the names of the hashes of a step without those of the logical shards; `state` may be abstract."""
    grads = _names({"grads": state.params})
    return [*grads, REST, *state_names(state)]


def state_names(state: TrainState) -> list[str]:
    """Return the names of the hashes of `of_state`."""
    return [*_names({"params": state.params}), *_names({"model_state": state.model_state})]


def _each(tree: Any, applied: Applied = together) -> jax.Array:
    prints = [applied(_of_vector, leaf.reshape(-1)) for leaf in jax.tree.leaves(tree)]
    return jnp.concatenate(prints) if prints else jnp.zeros(0, jnp.uint32)


def _of_vector(vector: jax.Array) -> jax.Array:
    return array_hash.of_array(vector)[None]


def _names(tree: Any) -> list[str]:
    return [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
