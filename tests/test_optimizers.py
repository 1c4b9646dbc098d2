"""Optimizers from their description: equal to optax written by hand, schedules at their corners, bits on any layout."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxdist import optimizers
from jaxdist.optimizers import Optimizer, Schedule

NAMES = ("sgd", "momentum", "nesterov", "adam", "adamw", "lion")


def make_params(seed=0, rows=7):
    rng = np.random.default_rng(seed)
    return {
        "kernel": jnp.asarray(rng.standard_normal((rows, 5)), jnp.float32),
        "bias": jnp.asarray(rng.standard_normal(5), jnp.float32),
        "scale": jnp.float32(1.5),
    }


def train(optimizer, steps=5, params=None):
    params = make_params() if params is None else params
    opt_state = optimizer.init(params)
    for step in range(steps):
        updates, opt_state = optimizer.update(make_params(step + 1), opt_state, params)
        params = optax.apply_updates(params, updates)
    return params, opt_state


def by_hand(name):
    kernels = {"kernel": True, "bias": False, "scale": False}
    decayed = optax.add_decayed_weights(0.1, kernels)
    return {
        "sgd": optax.chain(decayed, optax.sgd(0.01)),
        "momentum": optax.chain(decayed, optax.sgd(0.01, 0.9)),
        "nesterov": optax.chain(decayed, optax.sgd(0.01, 0.9, nesterov=True)),
        "adam": optax.adam(0.01),
        "adamw": optax.adamw(0.01, weight_decay=0.1, mask=kernels),
        "lion": optax.lion(0.01, weight_decay=0.1, mask=kernels),
    }[name]


@pytest.mark.parametrize("name", NAMES)
def test_each_optimizer_equals_optax_written_by_hand(name):
    described = Optimizer(name=name, learning_rate=0.01, weight_decay=0.0 if name == "adam" else 0.1)
    ours, _ = train(optimizers.build(described, global_batch_size=32))
    theirs, _ = train(by_hand(name))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), ours, theirs)


def test_a_ready_optimizer_is_taken_as_it_is():
    ready = optax.adam(1e-3)
    assert optimizers.build(ready, global_batch_size=32) is ready


def test_decay_may_hold_for_all():
    described = Optimizer(name="sgd", learning_rate=1.0, weight_decay=0.5, decay_mask="all")
    built = optimizers.build(described, global_batch_size=1)
    params = make_params()
    updates, _ = built.update(jax.tree.map(jnp.zeros_like, params), built.init(params), params)
    jax.tree.map(lambda update, param: np.testing.assert_array_equal(update, -0.5 * param), updates, params)


@pytest.mark.parametrize("clip_norm", [0.25, 100.0])
def test_the_global_norm_is_clipped(clip_norm):
    built = optimizers.build(Optimizer(name="sgd", learning_rate=1.0, clip_norm=clip_norm), global_batch_size=1)
    updates, _ = built.update(make_params(), built.init(make_params()), make_params())
    expected = min(clip_norm, float(optax.tree.norm(make_params())))
    assert optax.tree.norm(updates) == pytest.approx(expected)


def rate(step, *, batch=32, epoch=None, last=None, learning_rate=0.8, base=None, **schedule):
    described = Optimizer(name="sgd", learning_rate=learning_rate, base_batch_size=base, schedule=Schedule(**schedule))
    return optimizers.learning_rate_at(described, step, global_batch_size=batch, steps_per_epoch=epoch, max_steps=last)


def test_constant():
    assert [rate(step) for step in (1, 2, 10**6)] == pytest.approx([0.8] * 3)
    assert [rate(step, warmup=4) for step in (1, 2, 4, 5, 6)] == pytest.approx([0.2, 0.4, 0.8, 0.8, 0.8])


def test_linear():
    rates = [rate(step, name="linear", warmup=2, last=10) for step in range(1, 13)]
    assert rates == pytest.approx([0.4, 0.8, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0, 0.0], abs=1e-6)
    assert rate(99, name="linear", length=10, final_fraction=0.25) == pytest.approx(0.2)


def test_cosine():
    rates = [rate(step, name="cosine", last=4) for step in range(1, 6)]
    assert rates == pytest.approx([0.4 * (1 + math.cos(math.pi * done)) for done in (0, 0.25, 0.5, 0.75, 1)], abs=1e-6)
    assert rate(5, name="cosine", final_fraction=0.5, last=4) == pytest.approx(0.4)


@given(
    name=st.sampled_from(["constant", "linear", "cosine"]),
    warmup=st.floats(0, 5),
    length=st.floats(6, 20),
    epoch=st.integers(1, 50),
    step=st.integers(1, 1100),
)
def test_epochs_are_that_many_steps(name, warmup, length, epoch, step):
    def at(unit, length_of_unit):
        decay = {} if name == "constant" else {"length": round(length * epoch) / length_of_unit}
        return rate(step, name=name, unit=unit, warmup=round(warmup * epoch) / length_of_unit, epoch=epoch, **decay)

    assert at("epochs", epoch) == at("steps", 1)


def test_the_schedule_drives_the_updates():
    described = Optimizer(name="sgd", learning_rate=0.8, schedule=Schedule(name="linear", warmup=2))
    built = optimizers.build(described, global_batch_size=1, max_steps=6)
    params = {"x": jnp.zeros((2, 2))}
    opt_state = built.init(params)
    for step in range(1, 9):
        updates, opt_state = built.update({"x": jnp.ones((2, 2))}, opt_state, params)
        expected = optimizers.learning_rate_at(described, step, global_batch_size=1, max_steps=6)
        np.testing.assert_allclose(updates["x"], -expected, rtol=1e-6)


def test_the_linear_scaling_rule_warms_up_from_the_unscaled_rate():
    rates = [rate(step, learning_rate=0.1, base=32, batch=128, epoch=4) for step in (1, 10, 20, 21, 99)]
    assert rates == pytest.approx([0.1 + 0.3 / 20, 0.25, 0.4, 0.4, 0.4])
    assert rate(1, learning_rate=0.1, base=32, batch=128, warmup=0) == pytest.approx(0.4)
    # A smaller batch has nothing to warm up to.
    assert rate(1, learning_rate=0.1, base=32, batch=16) == pytest.approx(0.05)
    assert rate(1, learning_rate=0.1, base=32, batch=32) == pytest.approx(0.1)


def test_the_average_follows_the_params():
    params, opt_state = train(
        optimizers.build(Optimizer(name="sgd", learning_rate=0.1, ema_decay=0.3), global_batch_size=1)
    )
    plain = optimizers.build(Optimizer(name="sgd", learning_rate=0.1), global_batch_size=1)
    average = make_params()
    for step in range(1, 6):
        decay = min(0.3, (1 + step) / (10 + step))
        after, _ = train(plain, step)
        average = jax.tree.map(lambda old, new, decay=decay: decay * old + (1 - decay) * new, average, after)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), optimizers.ema_params(opt_state), average)
    jax.tree.map(np.testing.assert_array_equal, params, train(plain)[0])


def test_the_average_is_found_wherever_it_stands():
    built = optax.chain(optax.masked(optimizers.ema(0.9), True), optax.identity())
    params = {"x": jnp.ones(3, jnp.bfloat16)}
    found = optimizers.ema_params(built.init(params))
    assert found["x"].dtype == jnp.float32
    assert optimizers.ema_params(optax.adam(0.1).init(params)) is None
    with pytest.raises(ValueError, match="opt_state, params"):
        optimizers.ema(0.9).update(params, optimizers.ema(0.9).init(params))


def test_the_average_is_a_copy_that_survives_donation():
    built = optimizers.build(Optimizer(name="sgd", learning_rate=0.1, ema_decay=0.9), global_batch_size=1)

    @jax.jit
    def init():
        params = make_params()
        return params, built.init(params)

    params, opt_state = init()
    step = jax.jit(lambda params, opt_state: built.update(params, opt_state, params), donate_argnums=(0, 1))
    _, opt_state = step(params, opt_state)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(optimizers.ema_params(opt_state)))


@pytest.mark.parametrize("name", NAMES)
def test_the_bits_are_the_same_on_one_device_and_on_eight(name):
    described = Optimizer(
        name=name,
        learning_rate=0.3,
        clip_norm=1.0,
        weight_decay=0.0 if name == "adam" else 0.1,
        ema_decay=0.9,
        schedule=Schedule(name="cosine", warmup=3),
    )
    built = optimizers.build(described, global_batch_size=1, max_steps=8)

    def step(params, opt_state, grads):
        updates, opt_state = built.update(jax.lax.optimization_barrier(grads), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    def run(devices):
        mesh = jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])
        spec = PartitionSpec()
        mapped = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec, check_vma=False))
        params = jax.device_put(make_params(rows=20_000), NamedSharding(mesh, spec))
        opt_state = jax.device_put(built.init(make_params(rows=20_000)), NamedSharding(mesh, spec))
        for number in range(6):
            params, opt_state = mapped(
                params, opt_state, jax.device_put(make_params(number, rows=20_000), NamedSharding(mesh, spec))
            )
        return params, opt_state

    jax.tree.map(np.testing.assert_array_equal, run(1), run(8))


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"name": "adagrad"}, "sgd, momentum, nesterov, adam, adamw, lion"),
        ({"learning_rate": -1.0}, "learning_rate must be at least 0"),
        ({"learning_rate": math.nan}, "learning_rate must be"),
        ({"learning_rate": math.inf}, "learning_rate must be"),
        ({"clip_norm": 0.0}, "clip_norm must be above 0"),
        ({"ema_decay": 1.0}, "ema_decay must be at least 0 and below 1"),
        ({"base_batch_size": 0}, "base_batch_size must be above 0"),
        ({"weight_decay": -0.1}, "weight_decay must be at least 0"),
        ({"decay_mask": "some"}, "matrices, all"),
        ({"momentum": 0.9}, "no effect on adamw; it belongs to momentum, nesterov"),
        ({"name": "sgd", "beta1": 0.9}, "it belongs to adam, adamw, lion"),
        ({"name": "lion", "epsilon": 1e-3}, "it belongs to adam, adamw"),
        ({"name": "adam", "weight_decay": 0.1}, "Use adamw"),
        ({"decay_mask": "all"}, "Set optimizer.weight_decay"),
        ({"base_batch_size": 8}, "Set optimizer.schedule.warmup"),
    ],
)
def test_a_description_that_cannot_be_is_refused(changes, complaint):
    with pytest.raises(ValueError, match=complaint):
        optimizers.build(Optimizer(**({"name": "adamw", "learning_rate": 0.1} | changes)), global_batch_size=32)


@pytest.mark.parametrize(
    ("schedule", "complaint"),
    [
        ({"name": "polynomial"}, "constant, cosine, linear"),
        ({"unit": "days"}, "steps, epochs"),
        ({"warmup": -1}, "warmup must be at least 0"),
        ({"length": 0}, "length must be above 0"),
        ({"name": "cosine"}, "Set optimizer.schedule.length .* or stop.max_steps"),
        ({"name": "linear", "length": 5, "warmup": 5}, "it ends at step 5 and the warm-up at 5"),
        ({"length": 5}, "have no effect"),
        ({"final_fraction": 0.5}, "have no effect"),
        ({"unit": "epochs", "warmup": 1}, "Set optimizer.schedule.unit to steps"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused(schedule, complaint):
    with pytest.raises(ValueError, match=complaint):
        optimizers.build(Optimizer(name="sgd", learning_rate=0.1, schedule=Schedule(**schedule)), global_batch_size=32)


def test_a_run_that_ends_inside_its_warm_up_needs_no_other_schedule():
    schedule = Schedule(name="cosine", warmup=20)
    described = Optimizer(name="sgd", learning_rate=1.0, schedule=schedule)
    for max_steps in (5, 20, 100):
        rates = [
            optimizers.learning_rate_at(described, step, global_batch_size=1, max_steps=max_steps)
            for step in range(1, min(max_steps, 20) + 1)
        ]
        np.testing.assert_allclose(rates, [step / 20 for step in range(1, len(rates) + 1)], rtol=1e-6)


def test_one_field_is_overridden_at_a_time():
    described = Optimizer(name="momentum", learning_rate=0.1, momentum=0.8)
    assert dataclasses.replace(described, learning_rate=3e-4).learning_rate == 3e-4
    changed = dataclasses.replace(dataclasses.replace(described, name="sgd"), momentum=None)
    optimizers.build(changed, global_batch_size=1)
