import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_problem import fingerprint, init_params

from jaxdist.spmd import layout as layouts
from jaxdist.spmd import state as states
from jaxdist.spmd.canonical import state_update
from jaxdist.spmd.mesh import make_mesh


@st.composite
def needs_of_results(draw):
    num_leaves = draw(st.integers(1, 8))
    few = st.sets(st.integers(0, num_leaves - 1), max_size=2).map(lambda places: sum(1 << place for place in places))
    needs = draw(st.lists(few, min_size=num_leaves, max_size=num_leaves + 3))  # with many, all would be one group
    leaves = sorted(draw(st.sets(st.integers(0, num_leaves - 1))))
    mask = sum(1 << place for place in leaves)
    return [need & mask for need in needs], {place: draw(st.integers(1, 9)) for place in leaves}


@given(needs_of_results(), st.integers(0, 20))
def test_no_result_needs_leaves_of_two_groups(example, least_bytes):
    needs, num_bytes = example
    groups = state_update.grouped(needs, num_bytes, least_bytes)
    assert sorted(place for group in groups for place in group.leaves) == sorted(num_bytes)
    assert sorted(place for group in groups for place in (*group.leaves, *group.others)) == sorted(
        {*range(len(needs)), *num_bytes}
    )
    for group in groups:
        own = sum(1 << place for place in group.leaves)
        assert all(needs[place] & ~own == 0 for place in (*group.leaves, *group.others))
    for group in groups[:-1]:
        assert sum(num_bytes[place] for place in group.leaves) >= least_bytes


def test_the_grouping_which_decides_bits_has_not_changed():
    """Leaves 0 and 2 are updated together, result 6 needs none, and a group ends as soon as it has the least bytes."""
    needs = [0b000101, 0b000010, 0b000101, 0b001000, 0b010000, 0b100000, 0, 0b001000]
    assert state_update.grouped(needs, dict.fromkeys(range(6), 4), 8) == [
        state_update.LeafGroup((0, 2), (6,)),
        state_update.LeafGroup((1, 3), (7,)),
        state_update.LeafGroup((4, 5), ()),
    ]


OPTIMIZERS = {
    "adamw after a norm": optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(1e-3)),
    "a norm after adam": optax.chain(optax.scale_by_adam(), optax.clip_by_global_norm(0.5), optax.scale(-1e-3)),
    "adafactor": optax.adafactor(1e-2, min_dim_size_to_factor=8),
    "lamb": optax.lamb(1e-2),
    "lion": optax.lion(1e-3),
    "muon": optax.contrib.muon(1e-2),
}


def updated(optimizer, num_devices):
    """The state and metrics after two updates of a state that the devices hold in shards."""
    mesh = make_mesh(devices=jax.devices()[:num_devices])
    layout = layouts.fsdp(mesh, min_size=8)
    state = states.create_same_state(init_params, optimizer, mesh=mesh, seed=0, layout=layout)
    sizes = [(name, leaf.shape) for name, leaf in sorted(jax.eval_shape(init_params, jax.random.key(0)).items())]

    def update(state, inputs, total):
        ends = np.cumsum([np.prod(shape) for _, shape in sizes])[:-1]
        grads = {name: part.reshape(shape) for (name, shape), part in zip(sizes, jnp.split(total, ends), strict=True)}
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        made = states.TrainState(state.step + 1, params, None, opt_state, None)
        return made, {"norm": optax.tree.norm(grads)}

    state = states.TrainState(state.step, state.params, None, state.opt_state, None)
    program = state_update.StateUpdate(update, mesh)
    placed = jax.tree.map(lambda leaf: leaf.sharding, state)
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    for seed in range(2):
        total = np.random.default_rng(seed).normal(size=8 * 16 + 16 * 8 + 3).astype(np.float32)
        given_state = state
        state, metrics = program(state, None, jax.device_put(total, everywhere))
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(given_state.params)), "the state is donated"
    assert jax.tree.map(lambda leaf: leaf.sharding, state) == placed
    return jax.device_get((state, metrics))


@pytest.mark.parametrize(
    "name", ["adamw after a norm", *(pytest.param(name, marks=pytest.mark.slow) for name in list(OPTIMIZERS)[1:])]
)
def test_shards_in_turns_have_the_bits_of_one_device(name, monkeypatch):
    monkeypatch.setattr(state_update, "WHOLE_BYTES", 0)
    assert fingerprint(updated(OPTIMIZERS[name], 4)) == fingerprint(updated(OPTIMIZERS[name], 1))


def test_a_small_state_is_updated_at_once():
    assert fingerprint(updated(optax.adam(1e-2), 2)) == fingerprint(updated(optax.adam(1e-2), 1))
