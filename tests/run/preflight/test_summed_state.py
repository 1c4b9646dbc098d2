"""What is told of the state of a model is so: several devices make another one than plain Flax with the whole batch."""

import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxdist
from jaxdist import losses
from jaxdist.models.norm import BatchNorm
from jaxdist.run import components

BATCH_SIZE = 16
random = np.random.default_rng(0)
FIELDS = {
    "x": random.normal(size=(4 * BATCH_SIZE, 5)).astype(np.float32),
    "label": random.integers(0, 2, 4 * BATCH_SIZE).astype(np.int32),
}


def bessel(x, mask):
    rows = mask.sum()
    mean = (x * mask).sum(axis=0, keepdims=True) / rows
    return (jnp.square(x - mean) * mask).sum(axis=0) / (rows - 1)


CHANGES = {
    "steps": (jnp.int32, lambda old, x, mask: old + 1),
    "a mean": (jnp.float32, lambda old, x, mask: (x * mask).sum() / mask.sum()),
    "a running mean": (jnp.float32, lambda old, x, mask: 0.9 * old + 0.1 * (x * mask).sum() / mask.sum()),
    "a variance": (jnp.float32, lambda old, x, mask: 0.9 * old + 0.1 * bessel(x, mask).mean()),
    "a count": (jnp.float32, lambda old, x, mask: old + mask.sum()),
    "a sum": (jnp.float32, lambda old, x, mask: old + (x * mask).sum()),
    "a running sum": (jnp.float32, lambda old, x, mask: 0.9 * old + 0.1 * (x * mask).sum()),
    "a sum of squares": (jnp.float32, lambda old, x, mask: old + (jnp.square(x) * mask).sum()),
    "a whole count": (jnp.int32, lambda old, x, mask: old + mask.sum().astype(jnp.int32)),
    "a maximum": (jnp.float32, lambda old, x, mask: jnp.maximum(old, jnp.abs(x * mask).max())),
    "a running minimum": (jnp.float32, lambda old, x, mask: 0.9 * old + 0.1 * jnp.where(mask > 0, x, 9.0).min()),
    "a median": (jnp.float32, lambda old, x, mask: jnp.median(x[:, 0])),
    "a mean of maxima": (jnp.float32, lambda old, x, mask: (x.max(axis=1, keepdims=True) * mask).sum() / mask.sum()),
    "a flag": (bool, lambda old, x, mask: mask.sum() > 4),
}
SUMS = ["a count", "a sum", "a running sum", "a sum of squares"]
EXTREMES = ["a maximum", "a running minimum", "a median"]
WHOLE = ["a whole count", "a flag"]


class Keeping(nn.Module):
    """Keeps a value of what it sees."""

    kept: str

    @nn.compact
    def __call__(self, x, *, train, mask):
        dtype, change = CHANGES[self.kept]
        value = self.variable("kept", "value", lambda: jnp.zeros((), dtype))
        if train:
            value.value = change(value.value, x, mask.astype(jnp.float32)[:, None])
        return nn.Dense(2)(x)


class Normalised(nn.Module):
    @nn.compact
    def __call__(self, x, *, train, mask):
        x = BatchNorm()(nn.Dense(8)(x), train=train, mask=mask)
        return nn.Dense(2)(nn.Dropout(0.5, deterministic=not train)(x))


def experiment_of(model):
    return jaxdist.Experiment(
        name="keeping",
        model=model,
        loss=losses.classification,
        inputs="x",
        data=jaxdist.Data(train=FIELDS),
        optimizer=jaxdist.Optimizer(name="sgd", learning_rate=0.1),
        global_batch_size=BATCH_SIZE,
        stop=jaxdist.Stop(max_steps=1),
    )


def put_together(model, num_devices):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        parts = components.put_together(experiment_of(model), devices=jax.devices()[:num_devices])
    return parts, " ".join(str(each.message) for each in found)


@pytest.mark.parametrize("kept", CHANGES)
def test_a_state_that_is_no_mean_is_told_and_no_other(kept):
    parts, said = put_together(Keeping(kept), 4)
    kinds = {"a sum over": SUMS, "a whole number": WHOLE, "made of the largest": EXTREMES}
    for what, names in kinds.items():
        assert (f"model_state/kept/value is {what}" in said) == (kept in names), said
    state, batches = parts.create_state(), parts.batches()
    batch, _ = next(batches)
    batches.close()
    _, expected = Keeping(kept).apply(
        {"params": state.params, "kept": {"value": jnp.zeros((), CHANGES[kept][0])}},
        *(np.asarray(batch["x"]),),
        train=True,
        mask=np.ones(BATCH_SIZE, bool),
        mutable=["kept"],
    )
    is_same = np.allclose(
        parts.step(state, batch)[0].model_state["kept"]["value"], expected["kept"]["value"], rtol=1e-5
    )
    if kept != "a variance":  # of four rows it is told nowhere, as of batch normalisation
        assert is_same == (kept not in SUMS + WHOLE + EXTREMES)


def test_nothing_is_told_where_the_batch_is_together_or_a_module_normalises():
    assert put_together(Keeping("a sum"), 1)[1] == ""
    assert put_together(Normalised(), 4)[1] == ""


class Drawing(nn.Module):
    @nn.compact
    def __call__(self, x, *, train):
        key = self.variable("mine", "key", lambda: jax.random.key(3))
        if train:
            key.value = jax.random.fold_in(key.value, 1)
        return nn.Dense(2)(x)


def test_a_random_key_in_the_state_is_refused_by_name():
    with pytest.raises(ValueError, match=r"a random key has no mean; model_state/mine/key is key<fry>\. Draw from"):
        put_together(Drawing(), 1)
