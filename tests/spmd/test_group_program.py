import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxdist.spmd import group_program
from jaxdist.spmd.mesh import make_mesh

WEIGHTS = np.random.default_rng(0).normal(size=(6, 8)).astype(np.float32)
ROWS = np.random.default_rng(1).normal(size=(4, 6)).astype(np.float32)


def product_and_norm(weights, rows):
    """Both need all devices of a group."""
    return (rows @ weights).sum(0, keepdims=True), jnp.sqrt(jnp.sum(weights**2))


def test_every_group_computes_its_part_together_and_has_what_all_groups_have():
    mesh = make_mesh({"data": 2, "model": 4})
    program = group_program.GroupProgram(
        product_and_norm, mesh, batch_axes=("data",), out_specs=lambda shapes: (P("data", "model"), P())
    )
    weights = jax.device_put(WEIGHTS, NamedSharding(mesh, P(None, "model")))
    sums, norm = program(weights, jax.device_put(ROWS, NamedSharding(mesh, P("data"))))
    assert program.num_compiles == 1
    assert sums.sharding.spec == P("data", "model")
    assert norm.is_fully_replicated
    np.testing.assert_allclose(sums, [ROWS[:2].sum(0) @ WEIGHTS, ROWS[2:].sum(0) @ WEIGHTS], rtol=1e-5)
    np.testing.assert_allclose(norm, np.linalg.norm(WEIGHTS), rtol=1e-6)


def test_a_donated_argument_is_deleted():
    mesh = make_mesh({"data": 2, "model": 4})
    program = group_program.GroupProgram(
        lambda leaf: leaf + 1,
        mesh,
        batch_axes=("data",),
        out_specs=lambda shapes: P(None, "model"),
        donate_argnums=(0,),
    )
    given = jax.device_put(WEIGHTS, NamedSharding(mesh, P(None, "model")))
    np.testing.assert_array_equal(program(given), WEIGHTS + 1)
    with pytest.raises(RuntimeError, match=r"deleted|donated"):
        np.asarray(given)


def test_the_axes_of_the_batch_come_first():
    with pytest.raises(ValueError, match=r"needs the axes data before the others; got \{'model': 4, 'data': 2\}"):
        group_program.group_meshes(make_mesh({"model": 4, "data": 2}), ("data",))
