"""What every adapter's functions keep to, and that models learn by them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from small_cnns import ADAPT, EXAMPLE, KINDS, ROWS, assert_trees_close, functions, make_batch, random_variables

from jaxdist import adapters, losses
from jaxdist.models import cnn
from jaxdist.spmd.metrics import Weighted, masked_mean


@pytest.mark.parametrize("kind", KINDS)
def test_a_stateless_model_has_params_alone(kind):
    fns = functions(kind, dropout_rate=0.5)
    params = random_variables(fns)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
    batch = make_batch(num_true=4)
    for function in (fns.loss_fn, fns.eval_fn):
        loss, metrics = function(params, batch, jax.random.key(1))
        assert loss.count == metrics["accuracy"].count == 4
        assert list(metrics) == ["accuracy"]


@pytest.mark.parametrize("kind", KINDS)
def test_model_state_holds_statistics_and_no_random_state(kind):
    fns = functions(kind, batch_norm=True, dropout_rate=0.5)
    params, model_state = jax.eval_shape(fns.init_fn, jax.random.key(0))
    names = {jax.tree_util.keystr(path[-1:]) for path, _ in jax.tree_util.tree_leaves_with_path(model_state)}
    assert names == {"['mean']", "['var']"}
    assert jax.tree.structure((params, model_state)).num_leaves == 2 * 5 + 2


@pytest.mark.parametrize("kind", KINDS)
def test_the_params_depend_on_the_key_alone(kind):
    fns = functions(kind)
    first, again, other = (fns.init_fn(jax.random.key(seed)) for seed in (0, 0, 1))
    assert_trees_close(first, again, rtol=0)
    assert not np.allclose(*(jax.flatten_util.ravel_pytree(tree)[0] for tree in (first, other)))


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_follows_the_key_in_training_and_is_off_in_evaluation(kind):
    fns = functions(kind, dropout_rate=0.5)
    params, batch = random_variables(fns), make_batch()
    first, again, other = (fns.loss_fn(params, batch, jax.random.key(seed))[0].total for seed in (1, 1, 2))
    assert first == again
    assert first != other
    assert fns.eval_fn(params, batch, jax.random.key(1)) == fns.eval_fn(params, batch, jax.random.key(2))
    without = functions(kind)
    assert_trees_close(
        fns.eval_fn(params, batch, jax.random.key(1)), without.loss_fn(params, batch, jax.random.key(1)), rtol=1e-6
    )


@pytest.mark.parametrize("kind", KINDS)
def test_batch_statistics_are_the_batch_s_in_training_and_the_running_ones_in_evaluation(kind):
    fns = functions(kind, batch_norm=True)
    params, model_state = random_variables(fns)
    batch = make_batch()
    *_, new_state = fns.loss_fn(params, batch, jax.random.key(1), model_state)
    changed = jax.tree.map(lambda new, old: not np.allclose(new, old), new_state, model_state)
    assert all(jax.tree.leaves(changed))
    assert jax.tree.map(jnp.shape, new_state) == jax.tree.map(jnp.shape, model_state)
    evaluated = [fns.eval_fn(params, batch, jax.random.key(1), state)[0].total for state in (model_state, new_state)]
    assert evaluated[0] != evaluated[1]
    assert len(fns.eval_fn(params, batch, jax.random.key(1), model_state)) == 2


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=10)
@given(num_true=st.integers(1, ROWS), padding=st.floats(-1e3, 1e3, width=32))
def test_padding_rows_change_nothing(kind, num_true, padding):
    fns = functions(kind, batch_norm=True)
    params, model_state = random_variables(fns)
    first, other = (make_batch(num_true, padding=value) for value in (0.0, padding))
    expected = fns.loss_fn(params, first, jax.random.key(1), model_state)
    assert_trees_close(fns.loss_fn(params, other, jax.random.key(1), model_state), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_padded_batch_equals_the_batch_without_its_padding(kind):
    fns = functions(kind, batch_norm=True)
    params, model_state = random_variables(fns)
    padded = make_batch(num_true=4, padding=7.0)
    short = {name: field[:4] for name, field in padded.items() if name != "mask"}
    expected = fns.loss_fn(params, short, jax.random.key(1), model_state)
    assert_trees_close(fns.loss_fn(params, padded, jax.random.key(1), model_state), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_of_padding_alone_gives_zeros_and_keeps_the_statistics(kind):
    fns = functions(kind, batch_norm=True)
    params, model_state = random_variables(fns)

    def total(params):
        loss, metrics, new_state = fns.loss_fn(params, make_batch(num_true=0), jax.random.key(1), model_state)
        return loss.total, (loss, metrics, new_state)

    grads, (loss, metrics, new_state) = jax.grad(total, has_aux=True)(params)
    assert_trees_close(grads, jax.tree.map(jnp.zeros_like, params), atol=0)
    assert (loss.total, loss.count, metrics["accuracy"].total) == (0, 0, 0)
    assert_trees_close(new_state, model_state, rtol=0)


def test_means_and_weighted_values_of_a_loss_are_taken_as_they_are():
    def loss(outputs, batch):
        values = outputs.sum(axis=1)
        weighted = Weighted(values, batch["label"].astype(jnp.float32))
        return weighted, {"own": masked_mean(values, batch["mask"] * (batch["label"] > 4)), "weighted": weighted}

    fns = adapters.linen(cnn.CNN(10, width=2, num_stages=1), loss, EXAMPLE)
    params, batch = fns.init_fn(jax.random.key(0)), make_batch(num_true=4)
    total, found = fns.eval_fn(params, batch, jax.random.key(0))
    assert total.count == found["weighted"].count == batch["label"][:4].sum()
    assert found["own"].count == (batch["label"][:4] > 4).sum()


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_computes_in_bfloat16_and_the_loss_sees_targets_and_outputs_in_float32(kind):
    """256 and 257 are the same number in bfloat16: a rounded target would be off by one."""
    seen = {}

    class Linen(nn.Module):
        @nn.compact
        def __call__(self, image, *, train):
            seen["image"] = image.dtype
            return nn.Dense(1, kernel_init=nn.initializers.zeros)(image.reshape(image.shape[0], -1))[:, 0]

    class NNX(nnx.Module):
        def __init__(self, rngs):
            self.dense = nnx.Linear(64, 1, kernel_init=nnx.initializers.zeros, rngs=rngs)

        def __call__(self, image):
            seen["image"] = image.dtype
            return self.dense(image.reshape(image.shape[0], -1))[:, 0]

    def loss(outputs, batch):
        seen["outputs"], seen["target"] = outputs.dtype, batch["target"].dtype
        return jnp.square(outputs - batch["target"]), {}

    batch = make_batch() | {"target": np.full(ROWS, 257.0, np.float32)}
    model = Linen() if kind == "linen" else NNX
    fns = adapters.from_model(model, loss, batch, precision="bfloat16")
    params = fns.init_fn(jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    for function in (fns.loss_fn, fns.eval_fn):
        assert function(params, batch, jax.random.key(0))[0].value == 257.0**2
        assert seen == {"image": jnp.bfloat16, "outputs": jnp.float32, "target": jnp.float32}


def digits() -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The scikit-learn digits as training and held-out batches."""
    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    fields = {"image": (data.images[order, ..., None] / 16).astype(np.float32), "label": data.target[order]}
    return {k: v[:1408] for k, v in fields.items()}, {k: v[1408:] for k, v in fields.items()}


def train_on_digits(kind: str, *, num_epochs: int = 4, batch_size: int = 64) -> float:
    """Return the held-out accuracy after a plain single-device Adam loop."""
    adapt, model = ADAPT[kind]
    train, held_out = digits()
    fns = adapt(model(num_classes=10, width=16, batch_norm=True, dropout_rate=0.1), losses.classification, train)
    params, model_state = jax.jit(fns.init_fn)(jax.random.key(0))
    # Decayed to zero: at a constant rate the accuracy after the last step is a matter of luck.
    optimizer = optax.adam(optax.cosine_decay_schedule(5e-3, num_epochs * (1408 // batch_size)))
    opt_state = optimizer.init(params)

    @jax.jit
    def step(params, model_state, opt_state, batch, key):
        def mean_loss(params):
            loss, _, new_state = fns.loss_fn(params, batch, key, model_state)
            return loss.value, new_state

        grads, model_state = jax.grad(mean_loss, has_aux=True)(params)
        updates, opt_state = optimizer.update(grads, opt_state)
        return optax.apply_updates(params, updates), model_state, opt_state

    order = np.concatenate([np.random.default_rng(epoch).permutation(1408) for epoch in range(num_epochs)])
    for index, rows in enumerate(order.reshape(-1, batch_size)):
        batch = {name: field[rows] for name, field in train.items()}
        params, model_state, opt_state = step(params, model_state, opt_state, batch, jax.random.key(index))
    _, metrics = jax.jit(fns.eval_fn)(params, held_out, jax.random.key(0), model_state)
    return float(metrics["accuracy"].value)


@pytest.mark.slow
def test_linen_and_nnx_learn_the_digits_equally_well():
    accuracy = {kind: train_on_digits(kind) for kind in KINDS}
    assert min(accuracy.values()) > 0.95
    # The inits differ, so the accuracies agree up to chance: 389 held-out digits, standard error 0.005 at 0.99.
    assert abs(accuracy["linen"] - accuracy["nnx"]) < 0.02, accuracy
