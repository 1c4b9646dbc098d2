from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from small_problem import counted_compiles, init_params

from jaxdist.spmd import state as states
from jaxdist.spmd import step as steps
from jaxdist.spmd.mesh import make_mesh


def columns(path, leaf):
    return PartitionSpec(None, "data") if path.endswith("first") and leaf.ndim == 2 else PartitionSpec()


def test_every_leaf_is_born_where_the_layout_says():
    mesh = make_mesh()
    state = states.create_state(init_params, optax.adam(0.1), mesh=mesh, seed=0, layout=columns)
    for tree in (state.params, state.opt_state[0].mu, state.opt_state[0].nu):
        assert tree["first"].sharding == NamedSharding(mesh, PartitionSpec(None, "data"))
        assert tree["first"].addressable_shards[0].data.shape == (8, 2)
        assert tree["second"].sharding.is_fully_replicated
    assert state.step.dtype == jnp.int32
    assert int(state.step) == 0
    assert jnp.issubdtype(state.key.dtype, jax.dtypes.prng_key)


def test_one_program_creates_the_whole_state():
    mesh = make_mesh()
    with counted_compiles() as compiles:
        states.create_state(init_params, optax.adam(0.1), mesh=mesh, seed=3)
    assert [name for name in compiles if "make" in name] == ["jit(make)"] or compiles.count("make") == 1, compiles


def test_the_layout_changes_no_number_and_the_seed_changes_all():
    mesh = make_mesh()
    whole = states.create_state(init_params, optax.adam(0.1), mesh=mesh, seed=0)
    cut = states.create_state(init_params, optax.adam(0.1), mesh=mesh, seed=0, layout=columns)
    other = states.create_state(init_params, optax.adam(0.1), mesh=mesh, seed=1)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(whole.params), jax.device_get(cut.params))
    assert not np.array_equal(whole.params["first"], other.params["first"])
    assert not np.array_equal(jax.random.key_data(whole.key), jax.random.key_data(other.key))


def test_a_stateful_model_brings_its_state_along():
    def init(key):
        return {"w": jax.random.normal(key, (4,))}, {"running_mean": jnp.ones((2,))}

    state = states.create_state(init, optax.sgd(0.1), mesh=make_mesh(), seed=0)
    assert set(state.params) == {"w"}
    np.testing.assert_array_equal(state.model_state["running_mean"], [1, 1])
    stateless = states.create_state(lambda key: init(key)[0], optax.sgd(0.1), mesh=make_mesh(), seed=0)
    assert stateless.model_state is None


def test_the_abstract_state_describes_the_real_one_without_making_it():
    mesh = make_mesh()
    arguments = {"mesh": mesh, "layout": columns}
    abstract = states.abstract_state(init_params, optax.adam(0.1), **arguments)
    real = states.create_state(init_params, optax.adam(0.1), seed=0, **arguments)
    assert jax.tree.structure(abstract) == jax.tree.structure(real)

    def check(shape, leaf):
        assert isinstance(shape, jax.ShapeDtypeStruct)
        assert (shape.shape, shape.dtype) == (leaf.shape, leaf.dtype)
        assert shape.sharding.is_equivalent_to(leaf.sharding, leaf.ndim)

    jax.tree.map(check, abstract, real)


class Pair(NamedTuple):
    w: jax.Array
    b: jax.Array


@pytest.mark.parametrize(
    ("created", "params", "model_state"),
    [
        ({"w": jnp.ones(2)}, {"w": jnp.ones(2)}, None),
        (({"w": jnp.ones(2)}, {"mean": jnp.zeros(2)}), {"w": jnp.ones(2)}, {"mean": jnp.zeros(2)}),
        (states.InitialState((jnp.ones(2), jnp.zeros(()))), (jnp.ones(2), jnp.zeros(())), None),
        (states.InitialState({"w": jnp.ones(2)}, jnp.zeros(2)), {"w": jnp.ones(2)}, jnp.zeros(2)),
        (Pair(jnp.ones(2), jnp.zeros(())), Pair(jnp.ones(2), jnp.zeros(())), None),
        ([jnp.ones(2), jnp.zeros(())], [jnp.ones(2), jnp.zeros(())], None),
        ((jnp.ones(2), jnp.ones(3), jnp.ones(4)), (jnp.ones(2), jnp.ones(3), jnp.ones(4)), None),
    ],
)
def test_a_pair_is_params_and_model_state_and_anything_else_is_params(created, params, model_state):
    state = states.create_state(lambda key: created, optax.sgd(0.1), mesh=make_mesh(), seed=0)
    assert jax.tree.structure(state.params) == jax.tree.structure(params)
    assert jax.tree.structure(state.model_state) == jax.tree.structure(model_state)


def test_a_pair_of_arrays_is_refused_because_it_may_mean_two_things():
    def init(key):
        return jax.random.normal(key, (4, 2)), jnp.zeros(2)

    with pytest.raises(ValueError, match=r"shape \(2,\)\. Return jaxdist\.InitialState\(\(first, second\)\)"):
        states.create_state(init, optax.sgd(0.1), mesh=make_mesh(), seed=0)


def test_params_that_are_a_pair_can_be_trained():
    def init(key):
        return states.InitialState((jax.random.normal(key, (4,)), jnp.zeros(())))

    def loss(params, batch, key):
        w, b = params
        return jnp.square(batch["x"] @ w + b).mean(), {}

    mesh, optimizer = make_mesh(devices=jax.devices()[:2]), optax.sgd(0.1)
    state = states.create_state(init, optimizer, mesh=mesh, seed=0)
    batch = {"x": jax.device_put(jnp.ones((4, 4)), NamedSharding(mesh, PartitionSpec("data")))}
    w, _ = jax.device_get(state.params)
    state, _ = steps.data_parallel_step(loss, optimizer, mesh)(state, batch)
    np.testing.assert_allclose(state.params[1], -0.1 * 2 * w.sum(), rtol=1e-5)


def test_the_inputs_of_an_optimizer_are_placed_by_each_process_without_asking_the_others(monkeypatch):
    mesh = make_mesh({"data": -1})
    values = np.float32([0.5, 2.0, 3.0])
    monkeypatch.setattr(jax, "device_put", lambda *_: pytest.fail("it compares the values of all processes"))
    placed = states.PlacedInputs(states.WithInputs.make(optax.sgd(0.1), values), mesh).placed()
    assert placed.sharding == NamedSharding(mesh, PartitionSpec())
    np.testing.assert_array_equal(placed, values)
