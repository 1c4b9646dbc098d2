"""Precision: float32 outside, narrow inside; the loss scale follows its rule and every replica decides alike."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from jaxdist.spmd import mesh as meshes
from jaxdist.spmd import metrics, precision, state, step

PRECISIONS = ("float32", "bfloat16", "float16")
WIDTH = {"float32": 32, "bfloat16": 16, "float16": 16}


def make_batch(num_examples=16):
    rng = np.random.default_rng(0)
    image = rng.standard_normal((num_examples, 6)).astype(np.float32)
    label = image.argmax(1).astype(np.int32)
    return {"image": image, "label": label, "mask": np.ones(num_examples, np.float32)}


def init_fn(key):
    keys = jax.random.split(key)
    return {
        "first": jax.random.normal(keys[0], (6, 16)) / 3,
        "second": jax.random.normal(keys[1], (16, 6)) / 4,
        "bias": jnp.zeros(6),
    }


def loss_fn(params, batch, key):
    hidden = jax.nn.relu(batch["image"] @ params["first"])
    logits = hidden @ params["second"] + params["bias"][None]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), batch["label"])
    return metrics.masked_mean(losses, batch["mask"]), {"logit": metrics.masked_mean(logits, batch["mask"])}


@pytest.mark.parametrize("name", PRECISIONS)
def test_narrow_inside_float32_outside(name):
    seen = {}

    def spy(params, batch, key, model_state):
        assert model_state["mean"].dtype == jnp.float32
        seen.update({**params, **batch})
        loss = (batch["image"] @ params["first"]).mean()
        seen["loss"] = loss
        return loss, {"metric": loss}, {"mean": model_state["mean"] + loss, "seen": loss}

    wrapped = precision.apply_precision(spy, name, inputs=("image",))
    batch = jax.tree.map(jnp.asarray, make_batch())
    model_state = {"mean": jnp.zeros(()), "seen": jnp.zeros(())}
    params = init_fn(jax.random.key(0))

    def scalar_loss(params):
        loss, *rest = wrapped(params, batch, jax.random.key(0), model_state)
        return loss, (loss, rest)

    grads, (loss, (reported, new_state)) = jax.grad(scalar_loss, has_aux=True)(params)
    narrow = jnp.dtype(name)
    assert {field: seen[field].dtype for field in ("first", "bias", "image", "loss")} == dict.fromkeys(
        ("first", "bias", "image", "loss"), narrow
    )
    assert (seen["mask"].dtype, seen["label"].dtype) == (jnp.float32, jnp.int32)
    for leaf in jax.tree.leaves((grads, loss, reported, new_state)):
        assert leaf.dtype == jnp.float32


def test_an_eval_fn_with_statistics_and_means():
    def eval_fn(params, batch, key, model_state):
        return metrics.masked_mean(batch["image"]), {"n": metrics.Mean(jnp.bfloat16(1), jnp.bfloat16(2))}

    loss, reported = precision.apply_precision(eval_fn, "bfloat16")({}, make_batch(), None, {"a": jnp.zeros(())})
    assert isinstance(loss, metrics.Mean)
    assert isinstance(reported["n"], metrics.Mean)
    assert reported["n"].total.dtype == jnp.float32


def test_float32_changes_nothing():
    assert precision.apply_precision(loss_fn, "float32") is loss_fn
    optimizer = optax.sgd(0.1)
    assert precision.with_loss_scale(optimizer, "float32") is optimizer
    assert precision.with_loss_scale(optimizer, "bfloat16") is optimizer
    assert precision.loss_scale(optimizer.init({})) is None
    assert precision.num_skipped(optimizer.init({})) is None


def make_run(name, devices, **scaling):
    mesh = meshes.make_mesh({"data": devices}, devices=jax.devices()[:devices])
    optimizer = optax.adam(0.02)
    if name == "float16":
        optimizer = precision.dynamic_loss_scale(optimizer, **scaling)
    train = step.data_parallel_step(precision.apply_precision(loss_fn, name, inputs=("image",)), optimizer, mesh)
    created = state.create_state(init_fn, optimizer, mesh=mesh, seed=0)
    placed = jax.device_put(make_batch(), NamedSharding(mesh, PartitionSpec("data")))
    return train, created, placed


@pytest.mark.parametrize("name", PRECISIONS)
def test_training_converges(name):
    train, current, batch = make_run(name, devices=8)
    losses = []
    for _ in range(80):
        current, reported = train(current, batch)
        losses.append(float(reported["loss"]))
    assert losses[0] > 1.5
    assert losses[-1] < 0.1
    assert {leaf.dtype for leaf in jax.tree.leaves(current.params)} == {jnp.dtype("float32")}


def test_narrow_training_stays_near_float32_and_is_not_float32():
    ends = {}
    for name in PRECISIONS:
        train, current, batch = make_run(name, devices=1, **({"initial_scale": 8.0} if name == "float16" else {}))
        for _ in range(10):
            current, reported = train(current, batch)
        ends[name] = float(reported["loss"])
    for name in ("bfloat16", "float16"):
        assert ends[name] != ends["float32"]
        assert ends[name] == pytest.approx(ends["float32"], rel=0.05)


def test_every_replica_takes_the_same_decision():
    """A scale far too large overflows; on which devices depends on their examples, yet all of them skip together."""
    train, current, batch = make_run("float16", devices=8, initial_scale=precision.MAX_LOSS_SCALE)
    before = jax.tree.map(np.asarray, current.params)
    current, _ = train(current, batch)
    assert float(precision.loss_scale(current.opt_state)) == precision.MAX_LOSS_SCALE / 2
    assert int(precision.num_skipped(current.opt_state)) == 1
    jax.tree.map(np.testing.assert_array_equal, current.params, before)
    for _ in range(30):
        current, reported = train(current, batch)
    assert np.isfinite(reported["loss"])
    assert 1 < int(precision.num_skipped(current.opt_state)) < 30
    for leaf in jax.tree.leaves((current.params, current.opt_state)):
        replicas = [np.asarray(shard.data) for shard in leaf.addressable_shards]
        assert len(replicas) == 8
        for replica in replicas:
            np.testing.assert_array_equal(replica, replicas[0])
            assert np.isfinite(replica).all()


def test_scaling_saves_gradients_that_float16_cannot_hold():
    def tiny_loss(params, batch, key):
        return (params["x"] * batch["factor"] * batch["factor"]).sum().astype(jnp.float32), {}

    wrapped = precision.apply_precision(tiny_loss, "float16", inputs=("factor",))
    params, batch = {"x": jnp.ones(1)}, {"factor": jnp.full(1, 1e-4)}

    def grad(scale):
        return jax.grad(lambda params: wrapped(params, batch, None)[0] * scale)(params)["x"] / scale

    assert float(grad(1.0)[0]) == 0.0
    np.testing.assert_allclose(grad(2.0**15), 1e-8, rtol=1e-2)


BAD = st.sampled_from([np.inf, -np.inf, np.nan])


@functools.cache
def make_scaled(interval):
    inner = optax.trace(0.5)
    scaled = precision.dynamic_loss_scale(inner, growth_interval=interval)
    return inner, scaled, jax.jit(scaled.update)


@settings(max_examples=30)
@given(
    faults=st.lists(st.none() | BAD, max_size=15),
    interval=st.integers(1, 4),
    exponent=st.sampled_from([0, 1, 10, 24]),
)
def test_the_scale_follows_its_rule_whatever_overflows(faults, interval, exponent):
    """Against a model in plain Python; the inner optimizer must look as if the bad gradients had never come."""
    inner, scaled, update = make_scaled(interval)
    params = {"a": jnp.zeros(3), "b": jnp.zeros(())}
    got, undisturbed = scaled.init(params)._replace(scale=jnp.float32(2.0**exponent)), inner.init(params)
    scale, good, skipped = 2.0**exponent, 0, 0
    for number, fault in enumerate(faults):
        grads = {"a": jnp.arange(3.0) + number, "b": jnp.float32(1.0)}
        if fault is None:
            expected, undisturbed = inner.update(grads, undisturbed)
            good += 1
            if good == interval:
                scale, good = min(scale * 2, precision.MAX_LOSS_SCALE), 0
        else:
            grads["a"] = grads["a"].at[number % 3].set(fault)
            expected = jax.tree.map(jnp.zeros_like, params)
            scale, good, skipped = max(scale / 2, precision.MIN_LOSS_SCALE), 0, skipped + 1
        updates, got = update(grads, got)
        jax.tree.map(np.testing.assert_array_equal, updates, expected)
    jax.tree.map(np.testing.assert_array_equal, got.inner, undisturbed)
    assert (float(precision.loss_scale(got)), int(precision.num_skipped(got))) == (scale, skipped)


def test_the_scale_is_found_wherever_it_stands():
    chained = optax.chain(optax.identity(), precision.with_loss_scale(optax.adam(0.1), "float16"))
    assert float(precision.loss_scale(chained.init({"x": jnp.zeros(2)}))) == 2.0**15


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda: precision.apply_precision(loss_fn, "float8"), "float32, bfloat16, float16"),
        (lambda: precision.with_loss_scale(optax.sgd(0.1), "half"), "float32, bfloat16, float16"),
        (lambda: precision.dynamic_loss_scale(optax.sgd(0.1), initial_scale=0.5), "initial_scale"),
        (lambda: precision.dynamic_loss_scale(optax.sgd(0.1), growth_interval=0), "growth_interval"),
        (lambda: precision.dynamic_loss_scale(optax.sgd(0.1), factor=1.0), "factor above 1"),
    ],
)
def test_wrong_settings_are_refused(make, complaint):
    with pytest.raises(ValueError, match=complaint):
        make()
