"""Batch normalisation in a whole step, beside plain JAX. Statistics are of a device's rows, or a logical shard's."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from small_problem import place

import jaxdist
from jaxdist import adapters, losses, testing
from jaxdist.spmd.canonical import canonical_step
from jaxdist.spmd.mesh import make_mesh
from jaxdist.spmd.step import data_parallel_step

ROWS, RATE, MOMENTUM = 16, 0.01, 0.9
TRUE_ROWS = (13, 9)
"""Of the batches: with eight logical shards, one has a single row and others have none."""


class Normalised(nn.Module):
    @nn.compact
    def __call__(self, image, train, mask=None):
        rows = None if mask is None else mask[:, None] > 0
        hidden = nn.Dense(6)(image)
        hidden = nn.BatchNorm(use_running_average=not train, momentum=MOMENTUM)(hidden, mask=rows)
        return nn.Dense(3)(nn.relu(hidden))


def batches():
    random = np.random.default_rng(0)
    for count in TRUE_ROWS:
        yield {
            "image": random.normal(size=(ROWS, 5)).astype(np.float32),
            "label": random.integers(0, 3, ROWS).astype(np.int32),
            "mask": (np.arange(ROWS) < count).astype(np.float32),
        }


def loss_by_hand(params, running, batch, groups):
    """Return the mean loss of the true rows, normalised in equal groups, and the running statistics by true rows."""
    total, kept, counted = 0.0, jax.tree.map(jnp.zeros_like, running), batch["mask"].sum()
    first, norm, last = params["Dense_0"], params["BatchNorm_0"], params["Dense_1"]
    for rows in np.split(np.arange(ROWS), groups):
        true = rows[batch["mask"][rows] > 0]
        if not len(true):
            continue
        hidden = batch["image"][true] @ first["kernel"] + first["bias"]
        mean, var = hidden.mean(0), hidden.var(0)
        normal = (hidden - mean) / jnp.sqrt(var + 1e-5) * norm["scale"] + norm["bias"]
        logits = jax.nn.relu(normal) @ last["kernel"] + last["bias"]
        total += -jax.nn.log_softmax(logits)[np.arange(len(true)), batch["label"][true]].sum()
        for name, new in {"mean": mean, "var": var}.items():
            moved = MOMENTUM * running[name] + (1 - MOMENTUM) * new
            kept[name] += len(true) / counted * moved
    return total / counted, kept


def by_hand(params, running, groups):
    for batch in batches():
        loss_of = functools.partial(loss_by_hand, batch=batch, groups=groups)
        (loss, running), grads = jax.jit(jax.value_and_grad(loss_of, has_aux=True))(params, running)
        params = jax.tree.map(lambda param, grad: param - RATE * grad, params, grads)
        yield params, running, loss


@pytest.mark.parametrize(
    ("make_step", "num_devices", "groups"),
    [
        pytest.param(data_parallel_step, 1, 1, marks=pytest.mark.slow),
        (data_parallel_step, 4, 4),
        pytest.param(canonical_step.canonical_step, 1, 8, marks=pytest.mark.slow),
        (canonical_step.canonical_step, 4, 8),
    ],
)
def test_a_step_with_batch_statistics_is_that_of_plain_jax(make_step, num_devices, groups):
    functions = adapters.linen(Normalised(), losses.classification, next(batches()))
    mesh = make_mesh(devices=jax.devices()[:num_devices])
    optimizer = optax.sgd(RATE)
    state = jaxdist.create_state(functions.init_fn, optimizer, mesh=mesh, seed=0)
    running = state.model_state["batch_stats"]["BatchNorm_0"]
    with jax.numpy_rank_promotion("allow"):
        expected = list(by_hand(*jax.device_get((state.params, running)), groups))
    step = make_step(functions.loss_fn, optimizer, mesh)
    for batch, (params, statistics, loss) in zip(batches(), expected, strict=True):
        state, metrics = step(state, place(batch, mesh, "data"))
        testing.assert_trees_close(state.params, params, tolerance=1e-6)
        testing.assert_trees_close(state.model_state["batch_stats"]["BatchNorm_0"], statistics, tolerance=1e-6)
        assert float(metrics["loss"]) == pytest.approx(float(loss), rel=1e-5)
