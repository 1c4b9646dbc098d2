import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdist.run.preflight import drawn_params
from jaxdist.spmd import state


def abstract(rows):
    params = {"w": jax.ShapeDtypeStruct((rows, 3), jnp.float32)}
    return state.TrainState(None, params, {"n": jax.ShapeDtypeStruct((), jnp.int32)}, None, None)


def test_params_are_drawn_by_the_seed_and_not_for_models_that_are_large():
    (first, model_state), (again, _), (other, _) = (drawn_params.draw(abstract(4), seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first["w"], again["w"])
    assert not np.allclose(first["w"], other["w"])
    assert (first["w"].shape, model_state["n"]) == ((4, 3), 1)
    assert drawn_params.are_few(abstract(4))
    assert not drawn_params.are_few(abstract(1 << 26))


@pytest.mark.parametrize(("mask", "expected"), [([1.0, 1.0], [1, 0]), ([[1.0, 0.0], [1.0, 1.0]], [[1, 0], [0, 0]])])
def test_the_rows_that_count_are_chosen_among_those_that_did(mask, expected):
    batch = drawn_params.counting({"x": np.ones(2), "mask": np.array(mask)}, (1, 0))
    np.testing.assert_array_equal(batch["mask"], expected)


def test_a_shape_tells_which_dims_follow_the_examples():
    size = drawn_params.EXAMPLES
    traced = jax.make_jaxpr(lambda x: x.reshape(-1).sum() + x)(jnp.zeros((size, 2)))
    flat, total, _ = (equation.outvars[0] for equation in traced.jaxpr.eqns[:3])
    assert drawn_params.dims_of_examples(flat) == {0}
    assert not drawn_params.has_examples(total)
    assert drawn_params.described({"x": np.zeros((3, 2))})["x"].shape == (size, 2)
