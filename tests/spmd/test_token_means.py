"""Losses per token against the plain mean over true tokens: `jax.grad` of it, under SGD, with nothing of ours in it.

Rows have uneven numbers of true tokens, so a mean that divides by anything but the number of true tokens (examples,
devices, a mean of means) is off by a factor that SGD shows.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdist.spmd import metrics, strategies
from jaxdist.spmd import state as states
from jaxdist.spmd import step as steps

VOCABULARY, WIDTH, LENGTH, ROWS = 8, 8, 5, 16
RATE = 0.5


def init_params(key):
    first, second = jax.random.split(key)
    return {
        "first": jax.random.normal(first, (VOCABULARY, WIDTH)),
        "second": jax.random.normal(second, (WIDTH, VOCABULARY)),
    }


def token_losses(params, batch):
    logits = jnp.tanh(params["first"][batch["x"]]) @ params["second"]
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), batch["y"][..., None], axis=-1)[..., 0]


def token_loss(params, batch, key):
    del key
    values = token_losses(params, batch)
    true_tokens = batch["true_tokens"] * batch["mask"][:, None]
    return metrics.masked_mean(values, true_tokens), {"above_two": metrics.masked_mean(values > 2, true_tokens)}


def make_batch(seed):
    """Rows of 0 to 5 true tokens; the last rows are padding, and hold values that would change everything."""
    random = np.random.default_rng(seed)
    tokens = random.integers(0, VOCABULARY, (2, ROWS, LENGTH)).astype(np.int32)
    lengths = random.permutation(np.arange(ROWS) % (LENGTH + 1))
    true_tokens = (np.arange(LENGTH) < lengths[:, None]).astype(np.float32)
    mask = (np.arange(ROWS) < 13 - 9 * seed).astype(np.float32)  # the second batch leaves two of four devices empty
    return {"x": tokens[0], "y": tokens[1], "true_tokens": true_tokens, "mask": mask}


def reference(params, batches):
    """SGD on one device, by hand: the loss is the mean over the true tokens, gathered by indexing."""
    losses, norms = [], []
    for batch in batches:
        chosen = np.nonzero(batch["true_tokens"] * batch["mask"][:, None])
        loss, grads = jax.value_and_grad(lambda params: token_losses(params, batch)[chosen].mean())(params)  # noqa: B023
        params = jax.tree.map(lambda param, grad: param - RATE * grad, params, grads)
        losses.append(float(loss))
        norms.append(float(jnp.sqrt(sum(jnp.square(leaf).sum() for leaf in jax.tree.leaves(grads)))))
    return params, losses, norms


BATCHES = [make_batch(0), make_batch(1)]
EMPTY = {**make_batch(2), "true_tokens": np.zeros((ROWS, LENGTH), np.float32)}
PADDING = {**make_batch(2), "mask": np.zeros(ROWS, np.float32)}
RULES = [("first", (None, "model")), ("second", ("model", None))]
CASES = {
    "data-parallel": {},
    "data-parallel canonical": {"reduction": "canonical", "logical_shards": 8},
    "zero1": {},
    "zero1 canonical": {"reduction": "canonical", "logical_shards": 4},
    "fsdp": {},
    "hsdp": {"mesh_axes": {"data": 2, "fsdp": 2}},
    "tensor": {"mesh_axes": {"data": 2, "model": 2}, "rules": RULES},
}


@pytest.mark.parametrize("num_microbatches", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_every_strategy_divides_by_the_number_of_true_tokens(case, num_microbatches):
    settings = dict(CASES[case])
    strategy = strategies.build(case.split()[0], devices=jax.devices()[:4], min_size=8, **settings)
    optimizer = optax.sgd(RATE)
    step = strategy.make_step(token_loss, optimizer, num_microbatches=num_microbatches)
    state = states.create_state(init_params, optimizer, mesh=strategy.mesh, seed=0, layout=strategy.layout)
    expected, losses, norms = reference(jax.device_get(state.params), BATCHES)
    sharding = jax.sharding.NamedSharding(strategy.mesh, jax.sharding.PartitionSpec(strategy.batch_axes))
    # Batches in which nothing counts, because of their weights or of the mask, make no update and are counted.
    wanted = [(losses[0], norms[0]), None, None, (losses[1], norms[1])]
    for batch, means in zip([BATCHES[0], EMPTY, PADDING, BATCHES[1]], wanted, strict=True):
        state, step_metrics = step(state, jax.device_put(batch, sharding))
        flag = int(step_metrics[steps.NONFINITE_LEAF])
        if means is None:
            assert flag == steps.EMPTY_BATCH
            assert np.isnan(step_metrics["loss"])
        else:
            assert flag == -1
            np.testing.assert_allclose((step_metrics["loss"], step_metrics["grad_norm"]), means, rtol=1e-5)
    assert int(state.step) == 4
    jax.tree.map(lambda ours, theirs: np.testing.assert_allclose(ours, theirs, atol=1e-5), state.params, expected)
