"""A state saved under one layout and restored under another."""

import jax
import numpy as np
import pytest
from layout_cases import CASES
from small_problem import OPTIMIZERS, init_params

from jaxdist import testing
from jaxdist.checkpoint.checkpoints import Checkpointer
from jaxdist.spmd import state as states

DEVICES = {"replicated": 4, "zero1": 2}
"""Some layouts on fewer devices than the eight of the others."""


def abstract_state(name):
    mesh, layout, _ = CASES[name].on(jax.devices()[: DEVICES.get(name, 8)])
    return states.abstract_state(init_params, OPTIMIZERS["adamw"], mesh=mesh, layout=layout)


def values(struct):
    """Numbers that all differ, so that an exchange of two shards would be noticed."""
    if jax.dtypes.issubdtype(struct.dtype, jax.dtypes.prng_key):
        return jax.random.key(7)
    numbers = np.random.default_rng(struct.size).normal(size=struct.shape)
    return (1000 * numbers).astype(struct.dtype)


HOST_STATE = jax.tree.map(values, abstract_state("replicated"))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """One checkpoint of the same state from each layout; name -> its directory."""
    root = tmp_path_factory.mktemp("layouts")
    for name in CASES:
        shardings = jax.tree.map(lambda struct: struct.sharding, abstract_state(name))
        with Checkpointer(root / name, identity="relayout") as checkpointer:
            checkpointer.save(1, jax.device_put(HOST_STATE, shardings), {}, {})
    return root


@pytest.mark.parametrize("written", CASES)
@pytest.mark.parametrize("read", CASES)
def test_any_layout_resumes_onto_any_other_with_the_same_bits(saved, written, read):
    template = abstract_state(read)
    with Checkpointer(saved / written, identity="relayout") as checkpointer:
        state, _ = checkpointer.restore(template)
    testing.assert_trees_equal(state, HOST_STATE)
    for leaf, struct in zip(jax.tree.leaves(state), jax.tree.leaves(template), strict=True):
        assert leaf.sharding.is_equivalent_to(struct.sharding, leaf.ndim)
