"""A contrastive loss on several devices trains as plain JAX does with the whole batch on one."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxdist
from jaxdist import adapters, losses
from jaxdist.spmd import strategies

ROWS, WIDTH = 16, 8


class Encoder(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        return nn.Dense(WIDTH)(nn.tanh(nn.Dense(WIDTH)(x)))


def similarities(outputs, mask):
    """Cross-entropy of each row's similarity with itself, among all true rows."""
    logits = jnp.where(mask > 0, outputs @ outputs.T, -1e9)
    return -jnp.diagonal(jax.nn.log_softmax(logits))


def contrastive(outputs, batch):
    values = similarities(outputs, batch["mask"])
    return values, {"nearest": jnp.where(batch["mask"] > 0, outputs @ outputs.T, -jnp.inf).max(axis=1)}


def of_a_mean(outputs, batch):
    values = similarities(outputs, batch["mask"]) * batch["mask"]
    return jaxdist.Mean(values.sum(), batch["mask"].sum()), {}


def make_batch(padding):
    random = np.random.default_rng(padding)
    mask = (np.arange(ROWS) < ROWS - padding).astype(np.float32)
    return {"x": random.normal(size=(ROWS, 4)).astype(np.float32), "mask": mask}


def in_plain_jax(params, batches):
    def loss(params, batch):
        values = similarities(Encoder().apply({"params": params}, batch["x"], train=True), batch["mask"])
        return (values * batch["mask"]).sum() / batch["mask"].sum()

    for batch in batches:
        params = jax.tree.map(lambda p, g: p - 0.1 * g, params, jax.grad(loss)(params, batch))
    return params


@pytest.mark.parametrize(
    ("strategy", "num_devices", "mesh"),
    [("data-parallel", 1, None), ("data-parallel", 4, None), ("fsdp", 4, None), ("hsdp", 4, {"data": 2, "fsdp": 2})],
)
def test_any_strategy_trains_as_plain_jax_with_the_whole_batch(strategy, num_devices, mesh):
    built = strategies.build(strategy, devices=jax.devices()[:num_devices], mesh_axes=mesh, min_size=1)
    batches = [make_batch(padding) for padding in (0, 5, 15)]
    functions = adapters.linen(Encoder(), losses.WholeBatch(contrastive), batches[0], inputs="x")
    optimizer = optax.sgd(0.1)
    state = jaxdist.create_state(functions.init_fn, optimizer, mesh=built.mesh, seed=0, layout=built.layout)
    expected = in_plain_jax(jax.device_get(state.params), batches)
    step = built.make_step(functions.loss_fn, optimizer)
    sharding = jax.sharding.NamedSharding(built.mesh, jax.sharding.PartitionSpec(built.batch_axes))
    for batch in batches:
        state, _ = step(state, jax.device_put(batch, sharding))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), state.params, expected)


def test_metrics_are_of_the_whole_batch():
    built = strategies.build("data-parallel", devices=jax.devices()[:4])
    batch = make_batch(3)
    functions = adapters.linen(Encoder(), losses.WholeBatch(contrastive), batch, inputs="x")
    state = jaxdist.create_state(functions.init_fn, optax.sgd(0.1), mesh=built.mesh, seed=0, layout=built.layout)
    outputs = Encoder().apply({"params": jax.device_get(state.params)}, batch["x"], train=True)
    expected = (outputs @ outputs.T)[:-3, :-3].max(axis=1).mean()
    sharding = jax.sharding.NamedSharding(built.mesh, jax.sharding.PartitionSpec("data"))
    _, metrics = built.make_step(functions.loss_fn, optax.sgd(0.1))(state, jax.device_put(batch, sharding))
    np.testing.assert_allclose(metrics["nearest"], expected, rtol=1e-5)


def test_a_mean_is_refused():
    built = strategies.build("data-parallel", devices=jax.devices()[:2])
    batch = make_batch(3)
    functions = adapters.linen(Encoder(), losses.WholeBatch(of_a_mean), batch, inputs="x")
    state = jaxdist.create_state(functions.init_fn, optax.sgd(0.1), mesh=built.mesh, seed=0, layout=built.layout)
    with pytest.raises(ValueError, match="takes a loss that returns a value for each example"):
        built.make_step(functions.loss_fn, optax.sgd(0.1)).trace(state, batch)
