import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental import multihost_utils
from jax.sharding import PartitionSpec
from layout_cases import CASES
from small_problem import (
    OPTIMIZERS,
    counted_compiles,
    init_params,
    loss_fn,
    numpy_batch,
    place,
    reference_params,
)

from jaxdist import adapters, losses, testing
from jaxdist.models import gpt
from jaxdist.spmd import metrics as metrics_lib
from jaxdist.spmd import sharded, strategies
from jaxdist.spmd import state as states

P = PartitionSpec
MASK = np.arange(32) < 21
"""Leaves three of eight devices with padding alone, and a loss of 0/0."""

GRID = [(name, devices, microbatches) for name in CASES for devices in (1, 2, 4, 8) for microbatches in (1, 4)]
DEFAULT = [(name, 8, 4) for name in CASES if name != "tensor alone"]
DEFAULT += [("zero1", 2, 1), ("fsdp", 1, 1), ("fsdp", 4, 1), ("tensor", 4, 1)]


def three_models(key):
    """One model for each optimizer, all from the same params: a program that trains them side by side compiles once."""
    return dict.fromkeys(OPTIMIZERS, init_params(key))


def three_losses(params, batch, key):
    """The sum of the models' losses: the gradient of each is that of its own."""
    losses_of = [loss_fn(each, batch, key)[0] for each in params.values()]
    return sum(losses_of), {}


EACH_ITS_OWN = optax.multi_transform(OPTIMIZERS, lambda params: {name: name for name in params})


def three_steps(name, devices, num_microbatches):
    """Train three steps; return the params and the last metrics, having seen one compile and the same shardings."""
    mesh, layout, batch_axes = CASES[name].on(devices)
    step = sharded.sharded_step(
        three_losses, EACH_ITS_OWN, mesh, layout=layout, batch_axes=batch_axes, num_microbatches=num_microbatches
    )
    state = states.create_state(three_models, EACH_ITS_OWN, mesh=mesh, seed=0, layout=layout)
    before = jax.tree.map(lambda leaf: leaf.sharding, state)
    batches = [place(numpy_batch(seed, MASK), mesh, *batch_axes) for seed in range(3)]
    with counted_compiles() as compiles:
        for batch in batches:
            state, metrics = step(state, batch)
    after = jax.tree.map(lambda leaf: leaf.sharding, state)
    assert all(a.is_equivalent_to(b, 4) for a, b in zip(*map(jax.tree.leaves, (before, after)), strict=True))
    assert len(compiles) == 1, compiles
    return multihost_utils.process_allgather(state.params, tiled=True), jax.device_get(metrics)


@functools.cache
def expected(optimizer_name):
    """What one device makes of the whole batch, by a step with nothing of jaxdist in it."""
    first, _ = jax.random.split(jax.random.key(0))
    batches = [numpy_batch(seed, MASK) for seed in range(3)]
    return reference_params(OPTIMIZERS[optimizer_name], init_params(first), batches)


def check_equality(name, devices, num_microbatches):
    """Assert that each optimizer's params are one device's to 1e-6. (The largest is near 3, its own rounding 2e-7.)"""
    params, metrics = three_steps(name, devices, num_microbatches)
    for optimizer_name in OPTIMIZERS:
        testing.assert_trees_close(params[optimizer_name], expected(optimizer_name), tolerance=1e-6)
    assert int(metrics["nonfinite_leaf"]) == -1


@pytest.mark.parametrize(("name", "num_devices", "num_microbatches"), DEFAULT)
def test_every_layout_equals_one_device_under_sgd_momentum_and_adamw_with_clipping(name, num_devices, num_microbatches):
    """The clipping acts on the global norm: on the norm of a shard, three steps would end elsewhere."""
    check_equality(name, jax.devices()[:num_devices], num_microbatches)


@pytest.mark.soak
@pytest.mark.parametrize(("name", "num_devices", "num_microbatches"), [case for case in GRID if case not in DEFAULT])
def test_every_layout_equals_one_device_on_the_rest_of_the_grid(name, num_devices, num_microbatches):
    check_equality(name, jax.devices()[:num_devices], num_microbatches)


def compare_in_process(cases):
    """Train in one of several processes; for `testing.run_processes`."""
    jax.config.update("jax_numpy_rank_promotion", "raise")
    for name, num_microbatches in cases:
        check_equality(name, jax.devices(), num_microbatches)
    hybrid = strategies.build("hsdp")
    local = {device for row in hybrid.mesh.devices for device in row if device.process_index == jax.process_index()}
    return [dict(hybrid.mesh.shape), set(jax.local_devices()) == local == set(hybrid.mesh.devices[jax.process_index()])]


def test_layouts_that_span_two_processes_equal_one_device_and_hsdp_cuts_inside_a_process():
    hsdp = [{"data": 2, "fsdp": 4}, True]
    found = testing.run_processes(compare_in_process, [["zero1", 1], ["hsdp", 4]], processes=2, devices=4)
    assert found == [hsdp, hsdp]


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_every_layout_equals_one_device_on_two_processes():
    cases = [(name, microbatches) for name in CASES for microbatches in (1, 4)]
    testing.run_processes(compare_in_process, cases, processes=2, devices=4, timeout_seconds=800)


TOKENS = jax.ShapeDtypeStruct((16, 32), jnp.int32)


def gpt_functions(*, num_layers, width, dropout_rate=0.0):
    # 40 and not 32 positions, so that no shard of one leaf has the shape of another leaf.
    model = gpt.GPT(256, 40, num_layers, num_heads=4, width=width, dropout_rate=dropout_rate)
    return adapters.linen(model, losses.next_token, {"tokens": TOKENS}, inputs="tokens")


@pytest.mark.parametrize(("name", "mesh_axes"), [("fsdp", None), ("tensor", {"data": 1, "fsdp": 2, "model": 4})])
def test_no_leaf_is_ever_whole_on_one_device_when_the_state_is_born(name, mesh_axes):
    """Read off the compiled program that makes it: no instruction has the whole shape of a sharded leaf."""
    strategy = strategies.build(name, mesh_axes=mesh_axes)
    functions = gpt_functions(num_layers=1, width=64)
    how = {"mesh": strategy.mesh, "layout": strategy.layout}
    state = states.abstract_state(functions.init_fn, optax.adam(1e-3), **how)
    cut = {leaf.shape for leaf in jax.tree.leaves(state) if not leaf.sharding.is_fully_replicated}
    assert len(cut) > 3
    program = states.state_program(functions.init_fn, optax.adam(1e-3), **how).lower(jax.random.key(0)).compile()
    held = re.findall(r"\bf32\[([\d,]+)\]", program.as_text())
    assert held
    assert cut & {tuple(map(int, shape.split(","))) for shape in held} == set()


def test_dropout_is_that_of_the_data_parallel_step_on_as_many_devices():
    functions = gpt_functions(num_layers=1, width=32, dropout_rate=0.1)
    tokens = np.random.default_rng(0).integers(0, 256, (16, 32)).astype(np.int32)
    losses_of = {}
    for name in ("data-parallel", "fsdp"):
        strategy = strategies.build(name)
        step = strategy.make_step(functions.loss_fn, OPTIMIZERS["sgd"])
        state = states.create_state(
            functions.init_fn, OPTIMIZERS["sgd"], mesh=strategy.mesh, seed=0, layout=strategy.layout
        )
        _, metrics = step(state, place({"tokens": tokens}, strategy.mesh, "data"))
        losses_of[name] = float(metrics["loss"])
    assert losses_of["fsdp"] == pytest.approx(losses_of["data-parallel"], abs=1e-5)


@pytest.mark.parametrize("name", ["fsdp", "hsdp"])
def test_complex_numbers_pass_through_sharded_steps(name):
    """Of params, and between real ones, as a Fourier transform makes them."""
    random = np.random.default_rng(0)
    params = {
        "complex": jnp.asarray(random.normal(size=(8, 8)) + 1j * random.normal(size=(8, 8)), jnp.complex64),
        "real": jnp.asarray(random.normal(size=(8, 8)), jnp.float32),
    }
    batch = {"x": random.normal(size=(8, 8)).astype(np.float32), "mask": np.ones(8, np.float32)}

    def values(params, x):
        spectrum = jnp.fft.fft(x @ params["real"]) @ params["complex"]
        return jnp.square(jnp.abs(spectrum)).sum(axis=1) + jnp.real(spectrum[:, 0])

    def loss_fn(params, batch, key):
        return metrics_lib.masked_mean(values(params, batch["x"]), batch["mask"]), {}

    strategy = strategies.build(name, devices=jax.devices()[:4], min_size=0)
    optimizer = optax.sgd(1e-3)
    state = states.create_state(lambda key: params, optimizer, mesh=strategy.mesh, seed=0, layout=strategy.layout)
    placed = jax.device_put(batch, jax.sharding.NamedSharding(strategy.mesh, PartitionSpec(strategy.batch_axes)))
    state, _ = strategy.make_step(loss_fn, optimizer)(state, placed)
    grads = jax.grad(lambda params: values(params, batch["x"]).mean())(params)
    for leaf, param in params.items():
        np.testing.assert_allclose(state.params[leaf], param - 1e-3 * jnp.conj(grads[leaf]), rtol=1e-4, atol=1e-4)
        assert np.abs(state.params[leaf] - param).max() > 1e-2
