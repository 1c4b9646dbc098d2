"""What is told of examples that are mixed is so: a step of parts is not that of plain JAX with the whole batch."""

import dataclasses
import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxdist
from jaxdist import adapters
from jaxdist.run import components

random = np.random.default_rng(0)
FIELDS = {
    "x": random.normal(size=(32, 5)).astype(np.float32),
    "y": random.normal(size=(32, 5)).astype(np.float32),
    "w": random.uniform(0.1, 2, 32).astype(np.float32),
    "label": random.integers(0, 5, 32).astype(np.int32),
}
CHANGES = {
    "nothing": lambda h: h,
    "normalises features": lambda h: h - h.mean(axis=1, keepdims=True),
    "sorts features": lambda h: jnp.sort(h, axis=1),
    "sums up features": lambda h: jnp.cumsum(h, axis=1),
    "chooses features": lambda h: jnp.take_along_axis(h, jnp.argsort(h, axis=1), axis=1),
    "reshapes": lambda h: jnp.tanh(h.reshape(-1)).reshape(h.shape),
    "scans features": lambda h: jax.lax.scan(lambda carry, each: (carry + each, carry), h[:, 0], h.T)[1].T,
    "loops": lambda h: jax.lax.map(jnp.tanh, h),
    "centres": lambda h: h - h.mean(axis=0, keepdims=True),
    "attends": lambda h: jax.nn.softmax(h @ h.T) @ h,
    "shifts": lambda h: jnp.roll(h, 1, axis=0) * h,
    "reverses": lambda h: h[::-1] * h,
    "sums up": lambda h: jnp.cumsum(h, axis=0),
    "uses the first": lambda h: h * h[:1],
    "ranks": lambda h: jnp.sort(h, axis=0),
}
MIXES = ["centres", "attends", "shifts", "reverses", "sums up", "uses the first", "ranks"]


class Linen(nn.Module):
    change: str

    @nn.compact
    def __call__(self, x, *, train):
        return nn.Dropout(0.1, deterministic=not train)(CHANGES[self.change](nn.Dense(5)(x)))


class Nnx(nnx.Module):
    def __init__(self, change, rngs):
        self.dense, self.change = nnx.Linear(5, 5, rngs=rngs), change

    def __call__(self, x):
        return CHANGES[self.change](self.dense(x))


def squared(outputs, batch):
    return jnp.square(outputs - batch["y"]).mean(axis=1), {}


def experiment_of(model, loss=squared, **changes):
    return jaxdist.Experiment(
        name="mixing",
        model=model,
        loss=loss,
        inputs="x",
        data=jaxdist.Data(train=FIELDS),
        optimizer=jaxdist.Optimizer(name="sgd", learning_rate=0.1),
        global_batch_size=16,
        stop=jaxdist.Stop(max_steps=1),
        **changes,
    )


def said(experiment, num_devices):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        components.put_together(experiment, devices=jax.devices()[:num_devices])
    return " ".join(str(each.message) for each in found)


@pytest.mark.parametrize("change", CHANGES)
def test_a_model_that_mixes_examples_is_told_and_no_other(change):
    model = Linen(change) if len(change) % 2 else lambda rngs: Nnx(change, rngs)
    expected = "These are 8 of the 16 of a batch here, and another number on other devices."
    assert (expected in said(experiment_of(model), 2)) == (change in MIXES)


def mean(values, mask):
    return (values * mask).sum() / mask.sum()


PLAIN = {
    "a mean": lambda errors, batch: mean(errors, batch["mask"]),
    "a weighted Mean": lambda errors, batch: jaxdist.masked_mean(jaxdist.Weighted(errors, batch["w"]), batch["mask"]),
    "a mean of labels": lambda errors, batch: mean(jnp.exp(errors) * (batch["label"] > 2), batch["mask"]),
    "a weighted mean": lambda errors, batch: mean(errors, batch["mask"] * batch["w"]),
    "a root": lambda errors, batch: jnp.sqrt(mean(errors, batch["mask"])),
    "a share": lambda errors, batch: mean(errors, batch["mask"]) / mean(1 + jnp.square(errors), batch["mask"]),
    "a difference": lambda errors, batch: mean(jnp.square(errors - mean(errors, batch["mask"])), batch["mask"]),
}


def functions_of(kind):
    def loss_fn(params, batch, key):
        errors = jnp.square(batch["x"] @ params["kernel"] - batch["y"]).mean(axis=1)
        return PLAIN[kind](errors, batch), {}

    return adapters.Functions(lambda key: {"kernel": jnp.ones((5, 5))}, loss_fn, loss_fn)


@pytest.mark.parametrize("kind", PLAIN)
def test_plain_functions_whose_parts_do_not_make_the_whole_are_told_and_no_others(kind):
    functions = functions_of(kind)
    params = {"kernel": jnp.asarray(random.normal(size=(5, 5)), jnp.float32)}

    def grads(rows):
        batch = {name: jnp.asarray(field[rows]) for name, field in FIELDS.items()} | {"mask": jnp.ones(len(rows))}
        fields = FIELDS["w"][rows].sum() if "weighted Mean" in kind else len(rows)

        def value(params):
            loss = functions.loss_fn(params, batch, None)[0]
            return loss.value if isinstance(loss, jaxdist.Mean) else loss

        return jax.grad(value)(params)["kernel"], fields

    whole, *parts = (grads(np.arange(*ends)) for ends in ((0, 16), (0, 8), (8, 16)))
    added = sum(grad * count for grad, count in parts) / sum(count for _, count in parts)
    is_right = np.allclose(whole[0], added, rtol=1e-4, atol=1e-6)
    assert is_right == (list(PLAIN).index(kind) < 3)
    assert ("depends on the other examples" not in said(experiment_of(functions, None), 2)) == is_right


def test_padding_that_enters_other_losses_is_told_also_on_one_device():
    ragged = {name: field[:20] for name, field in FIELDS.items()}
    expected = "rows of padding, of which the last batch of an epoch has some"
    for kind, is_told in (("centres", True), ("nothing", False)):
        experiment = experiment_of(lambda rngs, kind=kind: Nnx(kind, rngs))
        assert expected not in said(experiment, 1)
        experiment = dataclasses.replace(experiment, data=jaxdist.Data(train=ragged))
        assert (expected in said(experiment, 1)) == is_told
    experiment = dataclasses.replace(experiment_of(functions_of("a difference"), None), data=jaxdist.Data(train=ragged))
    assert not said(experiment, 1)
