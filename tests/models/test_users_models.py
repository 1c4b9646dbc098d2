"""A table of users' models: two steps on 1 and 4 devices, mean and canonical, against plain Flax and plain SGD.

The reference differentiates the mean loss of each part of the batch whose rows see each other (all rows, those of a
device, or those of a logical shard: only batch norm can tell), averages over the parts, and subtracts.
"""

import compile_cache
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import users_models
from flax import nnx

from jaxdist import adapters, losses
from jaxdist.spmd import state as states
from jaxdist.spmd import strategies

ROWS, PARTS, RATE = 8, 4, 0.5
LAYOUTS = {
    "mean on 1": ("mean", 1),
    "mean on 4": ("mean", 4),
    "canonical on 1": ("canonical", 1),
    "canonical on 4": ("canonical", 4),
}


@pytest.fixture(scope="module", autouse=True)
def shared_compilations(tmp_path_factory):
    # Programs this small take longer to compile than to run.
    jax.config.update("jax_disable_most_optimizations", True)
    with compile_cache.compile_once(tmp_path_factory.mktemp("xla")):
        yield
    jax.config.update("jax_disable_most_optimizations", False)


def make_batch(seed):
    random = np.random.default_rng(seed)
    return {
        "x": random.normal(size=(ROWS, users_models.LENGTH, users_models.WIDTH)).astype(np.float32),
        "tokens": random.integers(0, users_models.CLASSES, (ROWS, users_models.LENGTH)).astype(np.int32),
        "label": random.integers(0, users_models.CLASSES, ROWS).astype(np.int32),
    }


BATCHES = [make_batch(0), make_batch(1)]


def linen_forward(module):
    def forward(params, model_state, inputs):
        if model_state is None:
            return module.apply({"params": params}, inputs, train=True), None
        return module.apply({"params": params, **model_state}, inputs, train=True, mutable=list(model_state))

    return forward


def nnx_forward(make_module):
    """Return the same for NNX; params and state are dicts by attribute names, read and written path by path."""
    graph, params_like, random, rest_like = nnx.split(make_module(nnx.Rngs(0)), nnx.Param, nnx.RngState, ...)

    def filled(like, tree):
        leaves = {
            jax.tree_util.keystr(path, simple=True, separator="/"): leaf
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        }
        flat = [
            (path, each.replace(leaves["/".join(map(str, path))]) if isinstance(each, nnx.Variable) else each)
            for path, each in nnx.to_flat_state(like)
        ]
        return nnx.from_flat_state(flat)

    def fresh(like):
        return nnx.from_flat_state([(path, each.replace(each.get_value())) for path, each in nnx.to_flat_state(like)])

    def forward(params, model_state, inputs):
        module = nnx.merge(graph, filled(params_like, params), fresh(random), filled(rest_like, model_state))
        module.train()
        logits = module(inputs)
        new = nnx.to_flat_state(nnx.split(module, nnx.Param, nnx.RngState, ...)[3])
        values = {"/".join(map(str, path)): each.get_value() for path, each in new if isinstance(each, nnx.Variable)}
        named = jax.tree_util.tree_map_with_path(
            lambda path, _: values[jax.tree_util.keystr(path, simple=True, separator="/")], model_state
        )
        return logits, named

    return forward


def by_hand(forward, field, params, model_state, num_parts):
    """Return params and model_state after SGD over the batches, written out."""

    def loss(params, model_state, inputs, labels):
        logits, new_state = forward(params, model_state, inputs)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), new_state

    part_grads = jax.jit(jax.grad(loss, has_aux=True))
    for batch in BATCHES:
        cut = [{name: np.split(batch[name], num_parts)[part] for name in batch} for part in range(num_parts)]
        found = [part_grads(params, model_state, part[field], part["label"]) for part in cut]
        grads, model_state = jax.tree.map(lambda *leaves: sum(leaves) / num_parts, *found)
        params = jax.tree.map(lambda param, grad: param - RATE * grad, params, grads)
    return params, model_state


def trained(functions, reduction, num_devices):
    """Return the state before, and that after one step on each batch."""
    strategy = strategies.build(
        "data-parallel", devices=jax.devices()[:num_devices], reduction=reduction, logical_shards=PARTS
    )
    optimizer = optax.sgd(RATE)
    state = states.create_state(functions.init_fn, optimizer, mesh=strategy.mesh, seed=0)
    before = jax.device_get((state.params, state.model_state))
    step = strategy.make_step(functions.loss_fn, optimizer)
    sharding = jax.sharding.NamedSharding(strategy.mesh, jax.sharding.PartitionSpec("data"))
    for batch in BATCHES:
        state, metrics = step(state, jax.device_put({**batch, "mask": np.ones(ROWS, np.float32)}, sharding))
    assert np.isfinite(metrics["loss"])
    return before, (state.params, state.model_state)


CASES = [("linen", name) for name in users_models.LINEN] + [("nnx", name) for name in users_models.NNX]
QUICK = (("linen", "batch norm"), ("nnx", "tied weights"))


@pytest.mark.parametrize(
    ("kind", "name"), [case if case in QUICK else pytest.param(*case, marks=pytest.mark.slow) for case in CASES]
)
def test_a_users_model_trains_as_it_does_in_plain_flax(kind, name):
    field = "tokens" if name == "tied weights" else "x"
    model = {"linen": users_models.LINEN, "nnx": users_models.NNX}[kind][name]
    functions = adapters.from_model(model, losses.classification, BATCHES[0], inputs=field)
    forward = linen_forward(model) if kind == "linen" else nnx_forward(model)
    expected = {}
    for reduction, num_devices in LAYOUTS.values():
        before, after = trained(functions, reduction, num_devices)
        num_parts = PARTS if name != "batch norm" or reduction == "canonical" else num_devices
        if num_parts not in expected:
            expected[num_parts] = by_hand(forward, field, *before, num_parts)
        moved = [float(jnp.abs(a - b).max()) for a, b in zip(*map(jax.tree.leaves, (before[0], after[0])), strict=True)]
        assert max(moved) > 1e-3
        assert_equal(after, expected[num_parts], f"{reduction} on {num_devices}")


def assert_equal(ours, theirs, where):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5, err_msg=where), ours, theirs)
