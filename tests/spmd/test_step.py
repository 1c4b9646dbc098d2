import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from small_problem import (
    NUM_EXAMPLES,
    NUM_FEATURES,
    OPTIMIZERS,
    assert_close,
    counted_compiles,
    example_losses,
    init_params,
    loss_fn,
    new_state,
    numpy_batch,
    place,
    reference_params,
)

from jaxdist.spmd import layout as layouts
from jaxdist.spmd import metrics, reduce, sharded
from jaxdist.spmd import state as states
from jaxdist.spmd import step as steps
from jaxdist.spmd.canonical import canonical_step
from jaxdist.spmd.mesh import make_mesh

DEVICES = (1, 2, 4, 8)


def mesh_of(num_devices):
    return make_mesh(devices=jax.devices()[:num_devices])


@functools.cache
def shared_step(num_devices, num_microbatches, optimizer_name):
    return steps.data_parallel_step(
        loss_fn, OPTIMIZERS[optimizer_name], mesh_of(num_devices), num_microbatches=num_microbatches
    )


@functools.cache
def host_state(optimizer_name):
    """The first state as numpy arrays, and its key's data."""
    state = new_state(OPTIMIZERS[optimizer_name], mesh_of(1))
    return jax.device_get(dataclasses.replace(state, key=jax.random.key_data(state.key)))


def placed_state(optimizer_name, mesh):
    """A fresh copy, which a step may donate."""
    state = place(jax.tree.map(np.copy, host_state(optimizer_name)), mesh)
    return dataclasses.replace(state, key=jax.random.wrap_key_data(state.key))


def train(step, state, mesh, batches):
    for batch in batches:
        state, step_metrics = step(state, place(batch, mesh, "data"))
    return state, step_metrics


MASKS = st.lists(
    st.lists(st.booleans(), min_size=NUM_EXAMPLES, max_size=NUM_EXAMPLES).filter(any), min_size=2, max_size=2
)
RAGGED = [[index < 21 for index in range(NUM_EXAMPLES)], [index == 5 for index in range(NUM_EXAMPLES)]]


@pytest.mark.parametrize("num_microbatches", [1, 2, 4])
@pytest.mark.parametrize(
    ("num_devices", "optimizer_name"),
    [
        *itertools.product(DEVICES, ["sgd"]),
        *(
            pytest.param(*each, marks=pytest.mark.slow)
            for each in itertools.product(DEVICES, sorted(OPTIMIZERS.keys() - {"sgd"}))
        ),
    ],
)
def test_equals_the_one_device_step_whatever_the_mask(num_devices, num_microbatches, optimizer_name):
    """Fully padded devices and microbatches included: RAGGED leaves up to seven of eight devices without examples."""
    mesh = mesh_of(num_devices)
    step = shared_step(num_devices, num_microbatches, optimizer_name)

    @settings(max_examples=4)
    @given(MASKS)
    @example(RAGGED)
    def check(masks):
        batches = [numpy_batch(seed, mask) for seed, mask in enumerate(masks)]
        state, step_metrics = train(step, placed_state(optimizer_name, mesh), mesh, batches)
        expected = reference(optimizer_name, batches)
        assert_close(state.params, expected)
        assert int(step_metrics["nonfinite_leaf"]) == -1
        assert int(state.step) == len(batches)

    check()


def reference(optimizer_name, batches):
    return reference_params(OPTIMIZERS[optimizer_name], host_state(optimizer_name).params, batches)


def test_the_gradient_is_the_mean_and_not_the_sum_over_devices():
    """Under SGD, which shows the factor 8 of a gradient that shard_map summed already; Adam would hide it."""
    mesh = mesh_of(8)
    batch = numpy_batch()
    before = host_state("sgd").params
    state, _ = shared_step(8, 1, "sgd")(placed_state("sgd", mesh), place(batch, mesh, "data"))
    grads = jax.grad(lambda params: jnp.mean(example_losses(params, batch)))(before)
    assert_close(
        jax.tree.map(jnp.subtract, before, jax.device_get(state.params)), jax.tree.map(lambda g: 0.05 * g, grads)
    )


def test_loss_and_metrics_are_means_over_the_true_examples():
    mesh = mesh_of(8)
    batch = numpy_batch(mask=RAGGED[0])
    _, step_metrics = shared_step(8, 1, "sgd")(placed_state("sgd", mesh), place(batch, mesh, "data"))
    values = np.asarray(example_losses(host_state("sgd").params, batch))[:21]
    assert set(step_metrics) == {"loss", "above_one", "grad_norm", "nonfinite_leaf"}
    assert_close(step_metrics["loss"], values.mean())
    assert_close(step_metrics["above_one"], (values > 1).mean())
    assert all(value.shape == () for value in step_metrics.values())


@pytest.mark.parametrize("num_microbatches", [1, 4])
def test_pmap_gives_the_same_numbers(num_microbatches):
    mesh = mesh_of(4)
    batches = [numpy_batch(seed, mask) for seed, mask in enumerate(RAGGED)]
    twin = steps.pmap_step(loss_fn, OPTIMIZERS["adamw"], devices=jax.devices()[:4], num_microbatches=num_microbatches)
    state = placed_state("adamw", mesh_of(1))
    for batch in batches:
        state, step_metrics = twin(state, batch)
    expected, expected_metrics = train(
        shared_step(4, num_microbatches, "adamw"), placed_state("adamw", mesh), mesh, batches
    )
    assert_close(state.params, expected.params)
    assert_close(step_metrics, expected_metrics)


def running_mean_loss(params, batch, key, model_state):
    """A model with a running mean of its inputs, as batch normalisation keeps one."""
    del key
    mean = metrics.masked_mean(batch["x"][:, 0], batch["mask"]).value
    value = metrics.masked_mean(jnp.square(batch["x"][:, 0] * params["w"]), batch["mask"])
    return value, {}, {"running_mean": 0.9 * model_state["running_mean"] + 0.1 * mean}


def test_model_state_is_averaged_by_example_counts():
    """An uneven mask: the plain mean over devices would give another running mean, and NaN for the empty ones."""
    mesh = mesh_of(8)
    batch = numpy_batch(mask=RAGGED[0])
    optimizer = optax.sgd(0.1)
    state = states.create_state(
        lambda key: ({"w": jnp.ones(())}, {"running_mean": jnp.float32(2.0)}), optimizer, mesh=mesh, seed=0
    )
    state, _ = steps.data_parallel_step(running_mean_loss, optimizer, mesh)(state, place(batch, mesh, "data"))
    assert_close(state.model_state["running_mean"], 0.9 * 2.0 + 0.1 * batch["x"][:21, 0].mean())
    assert_close(state.params["w"], 1 - 0.1 * 2 * np.square(batch["x"][:21, 0]).mean())


def constants_loss(params, batch, key, model_state):
    value, _ = loss_fn(params, batch, key)
    held = model_state["held"]
    return value, {}, {"held": held, "mean": 0.5 * model_state["mean"] + 0.5 * batch["x"][:, 0].mean()}


@pytest.mark.parametrize("kind", ["all-reduce", "sharded", "canonical"])
@pytest.mark.parametrize("num_microbatches", [1, 2])
def test_constants_of_model_state_keep_their_bits(kind, num_microbatches):
    """A mean over 21 examples would give 0.1 other last bits, and make float32's largest number infinite."""
    held = {
        "tenth": jnp.full(3, 0.1, jnp.float32),
        "mask": jnp.float32(jnp.finfo(jnp.float32).min),
        "infinite": jnp.float32(-jnp.inf),
        "half": jnp.bfloat16(0.3),
        "count": jnp.int32(2**31 - 1),
        "empty": jnp.zeros((0, 2)),
    }
    mesh, optimizer = mesh_of(4), optax.sgd(0.1)

    def init(key):
        return init_params(key), {"held": held, "mean": jnp.float32(2.0)}

    state = states.create_state(init, optimizer, mesh=mesh, seed=0)
    if kind == "canonical":
        step = canonical_step.canonical_step(constants_loss, optimizer, mesh, num_microbatches=num_microbatches)
    elif kind == "sharded":
        step = sharded.sharded_step(
            constants_loss, optimizer, mesh, layout=layouts.replicated, num_microbatches=num_microbatches
        )
    else:
        step = steps.data_parallel_step(constants_loss, optimizer, mesh, num_microbatches=num_microbatches)
    state, _ = train(step, state, mesh, [numpy_batch(0, RAGGED[0])] * 3)
    assert float(state.model_state["mean"]) != 2.0
    for name, value in held.items():
        assert np.asarray(state.model_state["held"][name]).tobytes() == np.asarray(value).tobytes(), name


def test_compiles_once_from_the_first_state_on():
    mesh = mesh_of(8)
    step = steps.data_parallel_step(loss_fn, OPTIMIZERS["adamw"], mesh)
    state = new_state(OPTIMIZERS["adamw"], mesh)
    batches = [place(numpy_batch(seed), mesh, "data") for seed in range(3)]
    with counted_compiles() as compiles:
        for batch in batches:
            state, _ = step(state, batch)
    assert len(compiles) == 1, compiles


def test_the_state_is_donated():
    mesh = mesh_of(8)
    state = new_state(OPTIMIZERS["sgd"], mesh)
    shared_step(8, 1, "sgd")(state, place(numpy_batch(), mesh, "data"))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))


def test_a_loss_may_scan_from_a_constant():
    """shard_map's default check refuses such a carry, which is usual in a loss_fn for one device."""
    mesh = mesh_of(8)

    def scanned_loss(params, batch, key):
        del key
        total, _ = jax.lax.scan(lambda carry, x: (carry + (x * params["w"]).sum(), None), 0.0, batch["x"])
        return total / batch["x"].shape[0], {}

    optimizer = optax.sgd(0.1)
    state = states.create_state(lambda key: {"w": jnp.ones(NUM_FEATURES)}, optimizer, mesh=mesh, seed=0)
    batch = {"x": numpy_batch()["x"]}
    state, _ = steps.data_parallel_step(scanned_loss, optimizer, mesh)(state, place(batch, mesh, "data"))
    assert_close(state.params["w"], 1 - 0.1 * batch["x"].mean(axis=0))


def test_every_microbatch_of_every_device_has_a_key_of_its_own():
    mesh = mesh_of(4)

    def noise_loss(params, batch, key):
        noise = jax.random.uniform(key)
        return params["w"] * 0, {"noise": noise, "square": noise**2}

    optimizer = optax.sgd(0.1)
    step = steps.data_parallel_step(noise_loss, optimizer, mesh, num_microbatches=2)
    state = states.create_state(lambda key: {"w": jnp.ones(())}, optimizer, mesh=mesh, seed=0)
    seen = []
    for _ in range(2):
        key = jax.random.fold_in(state.key, state.step)
        expected = jnp.array([jax.random.uniform(jax.random.fold_in(key, index)) for index in range(8)])
        state, step_metrics = step(state, place(numpy_batch(), mesh, "data"))
        assert_close(step_metrics["noise"], expected.mean())
        assert_close(step_metrics["square"], jnp.square(expected).mean())
        seen.append(float(step_metrics["noise"]))
    assert seen[0] != seen[1]


def poisoned_loss(params, batch, key):
    """Linear in each leaf, so that the leaf that meets the poison is the one whose gradient is not finite."""
    del key
    finite = sum(params[name] for name in "abc")
    poison = sum(jnp.mean(batch[name] * params[name]) for name in "bc")
    return finite + poison + jnp.mean(batch["constant"]), {}


@pytest.mark.parametrize(
    ("poisoned_fields", "leaf"), [((), -1), (("b",), 1), (("c",), 2), (("b", "c"), 1), (("constant",), 3)]
)
def test_a_nonfinite_step_is_named_and_leaves_the_state_alone(poisoned_fields, leaf):
    mesh = mesh_of(4)
    optimizer = optax.adam(0.1)
    state = states.create_state(lambda key: dict.fromkeys("abc", jnp.ones(())), optimizer, mesh=mesh, seed=0)
    before = jax.device_get((state.step, state.params, state.opt_state))
    fine = {name: np.zeros(8, np.float32) for name in ("b", "c", "constant")}
    batch = {name: values.copy() for name, values in fine.items()}
    for name in poisoned_fields:
        batch[name][5] = np.nan
    step = steps.data_parallel_step(poisoned_loss, optimizer, mesh)
    state, step_metrics = step(state, place(batch, mesh, "data"))
    assert int(step_metrics["nonfinite_leaf"]) == leaf
    after = jax.device_get((steps.unmarked(state).step, state.params, state.opt_state))
    if leaf >= 0:
        jax.tree.map(np.testing.assert_array_equal, after, before)
        # A marked state stays unchanged, and its metrics say so, until the mark is removed.
        state, step_metrics = step(state, place(fine, mesh, "data"))
        assert int(step_metrics["nonfinite_leaf"]) >= 0
        assert np.isnan(step_metrics["loss"])
        state = steps.unmarked(state)
        jax.tree.map(np.testing.assert_array_equal, jax.device_get((state.step, state.params, state.opt_state)), before)
        state, step_metrics = step(state, place(fine, mesh, "data"))
        assert (int(step_metrics["nonfinite_leaf"]), int(state.step)) == (-1, 1)
    else:
        assert int(after[0]) == 1
        assert after[1]["a"] != before[1]["a"]


def test_a_metric_may_not_take_the_name_of_the_steps_own():
    mesh = mesh_of(2)
    optimizer = optax.sgd(0.1)
    state = states.create_state(lambda key: {"w": jnp.ones(())}, optimizer, mesh=mesh, seed=0)
    step = steps.data_parallel_step(lambda params, batch, key: (params["w"], {"loss": params["w"]}), optimizer, mesh)
    with pytest.raises(ValueError, match=r"cannot be metrics of a loss.*got loss"):
        step(state, place(numpy_batch(), mesh, "data"))


@pytest.mark.parametrize("find", [steps.first_nonfinite, steps.first_nonfinite_of_whole])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16, jnp.complex64])
def test_the_first_leaf_that_is_not_finite_is_found_in_every_dtype(dtype, find):
    largest = jnp.finfo(dtype).max

    def first(*leaves, loss=0.0):
        grads = [jnp.array(leaf, dtype) for leaf in leaves]
        return int(find(reduce.Averages(grads, jnp.float32(loss), {}, None, jnp.float32(1), jnp.float32(0))))

    # Finite values whose sum is infinite are finite.
    assert first([], [-largest, -largest], [0.0]) == -1
    for bad in (np.inf, -np.inf, np.nan, -np.nan):
        assert first([1.0], [0.0, bad], [bad]) == 1
        assert first([1.0], [2.0], loss=bad) == 2
    if jnp.issubdtype(dtype, jnp.complexfloating):
        assert first([1.0], [complex(0.0, np.nan)]) == 1


@pytest.mark.parametrize("first_bad", [0, 1, 3, 4, 5])
def test_the_first_of_small_and_large_leaves_that_are_not_finite_is_found(first_bad):
    sizes = [3, reduce.PACKED_MAX_SIZE + 1, 0, reduce.PACKED_MAX_SIZE, 5]
    dtypes = [jnp.float32, jnp.float32, jnp.float32, jnp.float32, jnp.bfloat16]
    for bad_at in (0, -1):
        grads = [jnp.ones(size, dtype) for size, dtype in zip(sizes, dtypes)]
        for number in {first_bad, 3, 4} if first_bad <= 3 else {first_bad} - {5}:
            grads[number] = grads[number].at[bad_at].set(jnp.inf)
        averages = reduce.Averages(grads, jnp.float32(np.nan), {}, None, jnp.float32(1), jnp.float32(0))
        assert int(steps.first_nonfinite_of_whole(averages)) == int(steps.first_nonfinite(averages)) == first_bad


@pytest.mark.parametrize("kind", ["all-reduce", "canonical"])
@pytest.mark.parametrize(
    "optimizer",
    [
        optax.polyak_sgd(0.1),
        optax.contrib.momo(0.1),
        optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau(factor=0.5, patience=1, rtol=1.0)),
    ],
)
def test_an_optimizer_that_takes_the_value_gets_the_loss_of_the_whole_batch(optimizer, kind):
    """Beside plain optax on one device, with ragged batches: the mean of the devices' means is another number."""
    batches = [numpy_batch(seed, mask) for seed, mask in enumerate([*RAGGED, *RAGGED])]
    params = init_params(jax.random.key(0))
    expected, opt_state = params, optimizer.init(params)
    for batch in batches:

        def mean_loss(params, batch=batch):
            return jnp.sum(example_losses(params, batch) * batch["mask"]) / jnp.sum(batch["mask"])

        value, grads = jax.value_and_grad(mean_loss)(expected)
        updates, opt_state = optimizer.update(grads, opt_state, expected, value=value)
        expected = optax.apply_updates(expected, updates)
    mesh = mesh_of(4)
    make = steps.data_parallel_step if kind == "all-reduce" else canonical_step.canonical_step
    state = states.create_state(lambda key: params, optimizer, mesh=mesh, seed=0)
    state, _ = train(make(loss_fn, optimizer, mesh), state, mesh, batches)
    assert_close(state.params, expected, 1e-5)


@pytest.mark.parametrize("rate", [np.nan, np.inf])
@pytest.mark.parametrize("choose", [steps.chosen_early, steps.chosen_afterwards])
def test_an_update_times_a_rate_that_is_not_finite_is_not_made(choose, rate):
    optimizer = optax.adamw(lambda count: jnp.where(count == 1, rate, 0.1))
    state = states.create_state(lambda key: {"w": jnp.ones(3)}, optimizer, mesh=mesh_of(1), seed=0)
    averages = reduce.Averages({"w": jnp.ones(3)}, jnp.float32(2), {}, None, jnp.float32(8), jnp.float32(1))
    update = jax.jit(lambda state: steps.apply_averages(state, averages, optimizer, choose=choose))
    first, metrics = update(state)
    assert int(metrics["nonfinite_leaf"]) < 0
    second, metrics = update(first)
    assert (int(metrics["nonfinite_leaf"]), int(second.step)) == (2, ~1)
    assert_close((second.params, second.opt_state), (first.params, first.opt_state))


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("value", [1.0, np.nan])
def test_choosing_early_and_in_turn_gives_the_numbers_of_choosing_afterwards(name, value):
    optimizer, state = OPTIMIZERS[name], placed_state(name, mesh_of(1))
    grads = jax.tree.map(lambda leaf: jnp.full_like(leaf, value), state.params)
    loss = jnp.float32(2.0)
    averages = reduce.Averages(grads, loss, {}, state.model_state, jnp.float32(8), jnp.float32(1))

    def updated(**how):
        return jax.jit(lambda state: steps.apply_averages(state, averages, optimizer, **how)[0])(state)

    early, afterwards = updated(choose=steps.chosen_early), updated(choose=steps.chosen_afterwards)
    in_turn = updated(keep_where=steps.keep_in_turn)
    for each in (early, in_turn):
        assert_close((each.params, each.opt_state), (afterwards.params, afterwards.opt_state))
    assert int(early.step) == int(in_turn.step) == int(afterwards.step) == (1 if value == 1.0 else -1)


def test_the_choices_of_small_leaves_follow_in_turn_and_others_do_not():
    def kept(leaves):
        keep = steps.keep_in_turn(jnp.array(True))
        return [keep(leaf, leaf + 1) for leaf in leaves]

    def num_waits(leaves):
        return sum(each.primitive.name == "false_after" for each in jax.make_jaxpr(kept)(leaves).eqns)

    small, large = jnp.ones(3), jnp.ones(reduce.PACKED_MAX_SIZE + 1)
    assert num_waits([small] * 9) == 9 - steps.ABREAST
    assert num_waits([large] * 9) == num_waits([jnp.ones(3, jnp.int32)] * 9) == num_waits([jnp.ones(0)] * 9) == 0
    assert [float(leaf[0]) for leaf in jax.jit(kept)([small] * 9)] == [1.0] * 9


def test_a_state_with_a_constant_of_python_is_kept_in_turn():
    optimizer, params = optax.optimistic_gradient_descent(0.1), {"w": jnp.ones(3)}

    @jax.jit
    def update(state):
        return steps.chosen_early(steps.keep_in_turn(jnp.array(False)), optimizer.update, params, state, params)

    state = optimizer.init(params)
    assert_close(update(state), optimizer.update(params, state, params))


def test_no_moment_is_copied_to_keep_the_state_of_a_step_that_is_not_finite():
    mesh, optimizer = mesh_of(1), optax.adam(1e-3)
    state = new_state(optimizer, mesh)
    step = steps.data_parallel_step(loss_fn, optimizer, mesh)
    text = step.trace(state, place(numpy_batch(0), mesh, "data")).lower().compile().as_text()
    copied = [line for line in text[text.index("ENTRY") :].splitlines() if " copy(" in line and "_mu_" in line]
    assert not copied, copied


class Result:
    """Stands for an array that is being computed."""

    def __init__(self):
        self.is_waited_for = False

    def block_until_ready(self):
        self.is_waited_for = True


def test_the_oldest_of_many_steps_is_waited_for():
    in_flight, results = steps.InFlight(), [Result() for _ in range(40)]
    for number, result in enumerate(results, 1):
        in_flight.add(result)
        newest = max((place for place, result in enumerate(results, 1) if result.is_waited_for), default=0)
        assert number - newest < 16, "steps are done in their order, so all before the newest that was waited for are"
        assert number - newest >= 8 or not newest, "the devices have work while the oldest is waited for"


def test_a_step_may_be_called_inside_another_program():
    mesh, optimizer = mesh_of(2), OPTIMIZERS["momentum"]
    step, state = steps.data_parallel_step(loss_fn, optimizer, mesh), placed_state("momentum", mesh)
    batch = place(numpy_batch(), mesh, "data")
    scanned, _ = jax.jit(lambda state: jax.lax.scan(lambda state, _: step(state, batch), state, length=20))(state)
    for _ in range(20):
        state, _ = step(state, batch)
    assert_close(scanned.params, state.params)


@pytest.mark.slow
@pytest.mark.parametrize("num_devices", [2, 8])
@pytest.mark.parametrize("kind", ["data parallel", "pmap", "sharded"])
def test_a_loop_that_looks_at_no_result_ends(kind, num_devices):
    """Without a bound, XLA waits forever once 32 programs are admitted to a device whose threads all wait."""
    mesh, optimizer = mesh_of(num_devices), OPTIMIZERS["sgd"]
    all_sharded = layouts.fsdp(mesh, min_size=16)
    step = {
        "data parallel": lambda: steps.data_parallel_step(loss_fn, optimizer, mesh),
        "pmap": lambda: steps.pmap_step(loss_fn, optimizer, devices=list(mesh.devices.flat)),
        "sharded": lambda: sharded.sharded_step(loss_fn, optimizer, mesh, layout=all_sharded),
    }[kind]()
    layout = all_sharded if kind == "sharded" else layouts.replicated
    state = states.create_state(init_params, optimizer, mesh=mesh, seed=0, layout=layout)
    batch = numpy_batch() if kind == "pmap" else place(numpy_batch(), mesh, "data")
    for _ in range(3000):
        state, _ = step(state, batch)
    assert int(state.step) == 3000
