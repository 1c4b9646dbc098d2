"""Optimizers from their description: equal to optax written by hand, schedules at their corners, bits on any layout."""

import dataclasses
import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxdist import optimizers
from jaxdist.optimizers import Group, Optimizer
from jaxdist.optimizers.schedules import Schedule
from jaxdist.spmd import precision

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


def test_exponential_and_inverse_square_root_equal_optax():
    ours = [rate(step, name="exponential", length=10, final_fraction=0.01) for step in range(1, 12)]
    theirs = optax.exponential_decay(0.8, 10, 0.01, end_value=0.008)
    np.testing.assert_allclose(ours, [theirs(step) for step in range(11)], rtol=1e-5)
    ours = [rate(step, name="inverse_sqrt", warmup=4) for step in (1, 4, 16, 100)]
    np.testing.assert_allclose(ours, [0.8 / 4, 0.8, 0.8 * 0.5, 0.8 * 0.2], rtol=1e-6)


def test_step_falls_at_each_boundary():
    rates = [rate(step, name="step", boundaries=(2, 4), decay_factor=0.5) for step in range(1, 7)]
    np.testing.assert_allclose(rates, [0.8, 0.8, 0.4, 0.4, 0.2, 0.2], rtol=1e-6)
    by_epoch = [rate(step, name="step", boundaries=(1,), unit="epochs", epoch=3) for step in (3, 4)]
    np.testing.assert_allclose(by_epoch, [0.8, 0.08], rtol=1e-6)


def test_warmup_stable_decay_is_constant_until_the_last_part():
    settings = {"name": "warmup_stable_decay", "warmup": 2, "length": 12, "decay_fraction": 0.4}
    rates = [rate(step, **settings) for step in (1, 2, 3, 9, 10, 11, 12, 13, 50)]
    np.testing.assert_allclose(rates, [0.4, 0.8, 0.8, 0.8, 0.6, 0.4, 0.2, 0.0, 0.0], atol=1e-6)


def test_one_cycle_equals_optax():
    theirs = optax.cosine_onecycle_schedule(100, 0.8, pct_start=0.3, div_factor=25, final_div_factor=1e4)
    ours = [rate(step, name="one_cycle", length=100, final_fraction=1e-4 / 25) for step in range(1, 102, 10)]
    np.testing.assert_allclose(ours, [theirs(step) for step in range(0, 101, 10)], rtol=1e-4, atol=1e-6)


def test_an_offset_is_that_many_steps_more():
    described = Optimizer(name="sgd", learning_rate=0.8, schedule=Schedule(name="cosine", warmup=3))
    make = functools.partial(optimizers.make_schedule, described, global_batch_size=1, max_steps=20)
    assert [float(make(offset=5)(step)) for step in range(10)] == [float(make()(step + 5)) for step in range(10)]


def test_another_learning_rate_is_another_input_of_the_same_program():
    def lowered(learning_rate):
        described = Optimizer(name="adamw", learning_rate=learning_rate, weight_decay=0.1, schedule=Schedule(warmup=3))
        built = optimizers.build(described, global_batch_size=1)
        params = make_params()

        def update(grads, opt_state, params, step, inputs):
            return built.update(grads, opt_state, params, step=step, inputs=inputs)

        args = (params, built.init(params), params, jnp.int32(5), jnp.asarray(built.inputs))
        return built.inputs, jax.jit(update).lower(*args).as_text()

    (first, program), (second, other) = lowered(0.3), lowered(0.7)
    assert program == other
    np.testing.assert_allclose(first * 7, second * 3, rtol=1e-6)


@pytest.mark.parametrize("name", ["sgd", "adafactor"])
def test_the_learning_rate_is_that_of_the_step_also_after_updates_that_were_skipped(name):
    described = Optimizer(name=name, learning_rate=0.8, schedule=Schedule(name="linear"))
    built = precision.dynamic_loss_scale(optimizers.build(described, global_batch_size=1, max_steps=6))
    params = {"x": jnp.zeros((2, 2))}
    opt_state = built.init(params)
    for step in range(7):
        grads = {"x": jnp.full((2, 2), jnp.inf if step < 3 else 1.0)}
        updates, opt_state = built.update(grads, opt_state, params, step=jnp.int32(step), inputs=built.inputs)
        assert bool((updates["x"] == 0).all()) == (step < 3 or step == 6)


@pytest.mark.parametrize(
    ("name", "arguments", "theirs"),
    [
        ("adagrad", {"eps": 1e-5}, lambda rate: optax.adagrad(rate, eps=1e-5)),
        ("adafactor", {}, optax.adafactor),
        ("lamb", {"b1": 0.8}, lambda rate: optax.lamb(rate, b1=0.8)),
        ("rmsprop", {"momentum": 0.5}, lambda rate: optax.rmsprop(rate, momentum=0.5)),
    ],
)
def test_an_optimizer_taken_from_optax_by_name_equals_it(name, arguments, theirs):
    described = Optimizer(name=name, learning_rate=0.1, schedule=Schedule(name="linear"), arguments=arguments)
    ours, _ = train(optimizers.build(described, global_batch_size=1, max_steps=8))
    expected, _ = train(theirs(optax.linear_schedule(0.1, 0.0, 8)))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7), ours, expected)


@pytest.mark.filterwarnings("ignore:`optimistic_adam` is deprecated:DeprecationWarning")
def test_every_optimizer_of_optax_that_takes_a_learning_rate_can_be_named():
    for name in optimizers.of_optax():
        built = optimizers.build(Optimizer(name=name, learning_rate=0.01), global_batch_size=1)
        jax.eval_shape(built.init, make_params())
    assert {"adafactor", "lamb", "rmsprop", "adagrad", "radam", "yogi"} <= set(optimizers.of_optax())


@pytest.mark.parametrize(
    ("path", "num_dims", "decayed"),
    [
        ("Dense_0/kernel", 2, True),
        ("layers/Dense_0/kernel", 3, True),
        ("embed/embedding", 2, True),
        ("position_embedding", 2, True),
        ("first", 2, True),
        ("Dense_0/bias", 1, False),
        ("MultiHeadDotProductAttention_0/query/bias", 2, False),
        ("layers/Dense_0/bias", 2, False),
        ("layers/LayerNorm_0/scale", 2, False),
        ("layers/final_norm/weights", 2, False),
        ("block/b1", 2, False),
        ("scale", 0, False),
    ],
)
def test_weight_decay_is_for_matrices_by_what_a_param_is(path, num_dims, decayed):
    assert optimizers.decays(path, num_dims) == decayed


def test_the_biases_and_scales_of_scanned_layers_and_of_attention_are_not_decayed():
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            x = nn.LayerNorm()(x + nn.MultiHeadDotProductAttention(2)(x, x))
            return nn.Dense(x.shape[-1])(x), None

    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)()(x, None)[0]

    params = jax.eval_shape(lambda: Stack().init(jax.random.key(0), jnp.ones((1, 4, 8))))["params"]
    described = Optimizer(name="adamw", learning_rate=0.1, weight_decay=0.1)
    decayed = {each.path.split("/")[-1] for each in optimizers.describe(described, params) if each.decays}
    kept = {each.path.split("/")[-1] for each in optimizers.describe(described, params) if not each.decays}
    assert (decayed, kept) == ({"kernel"}, {"bias", "scale"})


def test_groups_have_a_learning_rate_a_decay_and_a_freeze_of_their_own():
    groups = (Group(pattern="^kernel", learning_rate=0.5, decay=False), Group(pattern="bias", frozen=True))
    described = Optimizer(
        name="sgd", learning_rate=1.0, weight_decay=0.1, decay_mask="all", groups=groups, clip_norm=1e3
    )
    built = optimizers.build(described, global_batch_size=1)
    params, grads = make_params(), make_params(1)
    updates, _ = built.update(grads, built.init(params), params)
    np.testing.assert_allclose(updates["kernel"], -0.5 * grads["kernel"], rtol=1e-6)
    np.testing.assert_array_equal(updates["bias"], np.zeros(5))
    np.testing.assert_allclose(updates["scale"], -(grads["scale"] + 0.1 * params["scale"]), rtol=1e-6)
    assert [tuple(each) for each in optimizers.describe(described, params)] == [
        ("bias", False, 1.0, True),
        ("kernel", False, 0.5, False),
        ("scale", True, 1.0, False),
    ]


def test_a_frozen_param_counts_in_no_norm():
    described = Optimizer(name="sgd", learning_rate=1.0, clip_norm=1.0, groups=(Group(pattern="bias", frozen=True),))
    built = optimizers.build(described, global_batch_size=1)
    grads = {"kernel": jnp.full((2, 2), 0.5), "bias": jnp.full(3, 100.0)}
    updates, _ = built.update(grads, built.init(grads), grads)
    np.testing.assert_allclose(updates["kernel"], np.full((2, 2), -0.5), rtol=1e-6)


def test_a_group_that_matches_nothing_is_refused():
    described = Optimizer(name="sgd", learning_rate=1.0, groups=(Group(pattern="kernels"),))
    with pytest.raises(ValueError, match=r"nothing matches 'kernels'. The nearest param is kernel"):
        optimizers.build(described, global_batch_size=1).init(make_params())


def test_the_average_of_complex_params_keeps_their_imaginary_part():
    average = optimizers.ema(0.5)
    params = {"w": jnp.full(2, 1 + 2j)}
    _, state = average.update(jax.tree.map(jnp.zeros_like, params), average.init(params), params)
    np.testing.assert_allclose(state.params["w"], params["w"])


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
        ({"name": "adaam"}, "sgd, momentum, nesterov, adam, adamw, lion, or .*adafactor.*Did you mean 'adam'"),
        ({"name": "lbfgs"}, "optimizer.name must be one of"),
        ({"arguments": {"b1": 0.5}}, "adamw has its own settings"),
        ({"name": "adagrad", "weight_decay": 0.1}, "adagrad of optax takes .*; got mask, weight_decay"),
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
        ({"name": "exponential", "length": 5}, "never reaches 0: set"),
        ({"name": "step"}, "boundaries belong to the schedule 'step'"),
        ({"boundaries": (3,)}, "boundaries belong to the schedule 'step'"),
        ({"name": "one_cycle", "length": 5, "warmup": 1}, "one_cycle rises by itself"),
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
