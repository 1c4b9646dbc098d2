"""Canonical bits and sharded layouts over two real processes."""

import contextlib
import hashlib
import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxdist import adapters, data, losses, testing
from jaxdist.models import cnn, gpt
from jaxdist.spmd import layout as layouts
from jaxdist.spmd import state as states
from jaxdist.spmd import strategies

BATCH_SIZE = 16
MASK = (np.arange(BATCH_SIZE) < 13).astype(np.float32)


def images(seed):
    random = np.random.default_rng(seed)
    image = random.normal(size=(BATCH_SIZE, 8, 8, 1)).astype(np.float32)
    return {"image": image, "label": random.integers(0, 10, BATCH_SIZE).astype(np.int32), "mask": MASK}


def tokens(seed):
    return {"tokens": np.random.default_rng(seed).integers(0, 32, (BATCH_SIZE, 12)).astype(np.int32), "mask": MASK}


def model(name):
    if name == "gpt":
        module = gpt.GPT(32, 12, num_layers=1, num_heads=2, width=16, dropout_rate=0.1)
        return adapters.linen(module, losses.next_token, tokens(0), inputs="tokens"), tokens
    module = cnn.CNN(10, width=4, num_stages=1, batch_norm=name == "cnn with batch norm")
    return adapters.linen(module, losses.classification, images(0)), images


def train(model_name, strategy_name, reduction, num_steps, num_devices=None):
    """Train on all devices of the job; return the hash of the params and how many numbers they hold, summed."""
    functions, make_batch = model(model_name)
    optimizer = optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(1e-3))
    strategy = strategies.build(strategy_name, reduction=reduction, devices=jax.devices()[:num_devices])
    state = states.create_state(functions.init_fn, optimizer, mesh=strategy.mesh, seed=0, layout=strategy.layout)
    step = strategy.make_step(functions.loss_fn, optimizer)
    sharding = NamedSharding(strategy.mesh, PartitionSpec(strategy.batch_axes))
    for index in range(num_steps):
        batch = {
            name: jax.make_array_from_callback(leaf.shape, sharding, lambda index, leaf=leaf: leaf[index])
            for name, leaf in make_batch(index % 4).items()
        }
        state, metrics = step(state, batch)
    whole = jax.jit(lambda params: layouts.constrain(params, strategy.mesh, layouts.replicated))(state.params)
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(whole)]
    digest = hashlib.sha256(b"".join(leaf.tobytes() for leaf in leaves)).hexdigest()
    return {"hash": digest, "loss": float(metrics["loss"]), "sizes": [float(np.abs(leaf).sum()) for leaf in leaves]}


@pytest.mark.parametrize(
    "model_name",
    [pytest.param("cnn with batch norm", marks=pytest.mark.soak), pytest.param("gpt", marks=pytest.mark.slow)],
)
def test_two_processes_give_the_bits_of_one(model_name):
    arguments = (model_name, "data-parallel", "canonical", 10)
    results = testing.run_processes(train, *arguments, processes=2, devices=2)
    assert {result["hash"] for result in results} == {train(*arguments, 1)["hash"]}


def train_fed(num_devices=None):
    """Train through the input pipeline, as a run does; return the hash of the params."""
    functions, make_batch = model("gpt")
    optimizer = optax.adamw(1e-3)
    strategy = strategies.build("data-parallel", reduction="canonical", devices=jax.devices()[:num_devices])
    state = states.create_state(functions.init_fn, optimizer, mesh=strategy.mesh, seed=0)
    step = strategy.make_step(functions.loss_fn, optimizer)
    source = data.ArraySource({"tokens": np.concatenate([make_batch(seed)["tokens"] for seed in range(5)])})
    loader = data.Loader(source, global_batch_size=BATCH_SIZE, seed=1, num_epochs=2)
    for batch, _ in data.feed(loader, strategy.mesh, logical_shards=strategy.logical_shards):
        state, _ = step(state, batch)
    leaves = [np.asarray(leaf.addressable_data(0)) for leaf in jax.tree.leaves(state.params)]
    return hashlib.sha256(b"".join(leaf.tobytes() for leaf in leaves)).hexdigest()


@pytest.mark.slow
def test_three_processes_give_the_bits_of_one():
    """Eight logical shards, two, three and three of them."""
    assert set(testing.run_processes(train_fed, processes=3, devices=1)) == {train_fed(1)}


@pytest.mark.slow
def test_a_gpt_has_the_bits_of_one_device_on_more_devices_than_cores(tmp_path):
    """XLA divides its products by the number of threads, of which there is at least one for each device."""
    environment = {name: value for name, value in os.environ.items() if "NPROC" not in name}
    experiment = pathlib.Path(__file__).parents[2] / "experiments" / "bytes_gpt.py"
    found = []
    for devices in (1, 4):
        command = [sys.executable, "-m", "jaxdist.cli", "train", str(experiment), "--reduction", "canonical", "--json"]
        command += ["--devices", str(devices), "--max-steps", "1", "--run-dir", str(tmp_path / str(devices))]
        made = subprocess.run(command, env=environment, check=True, capture_output=True, timeout=200)
        found.append(json.loads(made.stdout)["params_sha256"])
    assert found[0] == found[1]


LAYOUTS = [(1, 1), (1, 2), (1, 4), (1, 8), (2, 1), (2, 2), (2, 4)]
"""Processes, and devices of each."""


@pytest.mark.soak
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("model_name", ["cnn", "cnn with batch norm", "gpt"])
def test_a_hundred_steps_have_the_same_bits_on_every_layout_and_number_of_cores(model_name, monkeypatch):
    """Compiled anew each time; one core is what the scheduler gives, four are what XLA is told it has."""
    monkeypatch.delenv("NPROC", raising=False)
    anew = {"JAX_ENABLE_COMPILATION_CACHE": "false"}
    hashes = {}
    for processes, devices in LAYOUTS:
        for cores in (1, 2, 4) if (processes, devices) in [(1, 1), (1, 4), (2, 2)] else (2,):
            with on_one_core() if cores == 1 else contextlib.nullcontext():
                results = testing.run_processes(
                    train, model_name, "data-parallel", "canonical", 100,
                    processes=processes, devices=devices, timeout_seconds=600,
                    environment=anew if cores == 1 else anew | {"NPROC": str(cores)},
                )  # fmt: skip
            hashes[processes, devices, cores] = {result["hash"] for result in results}
    assert len(set.union(*hashes.values())) == 1, hashes


@contextlib.contextmanager
def on_one_core():
    """Let this process, and those it starts, use one core alone."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


SOAK_AND_SLOW = [pytest.param("zero1", marks=pytest.mark.soak), pytest.param("fsdp", marks=pytest.mark.slow)]


@pytest.mark.parametrize("strategy_name", SOAK_AND_SLOW)
def test_layouts_over_two_processes_equal_those_in_one(strategy_name):
    """Two processes of four devices against one of eight, after three steps."""
    arguments = ("cnn", strategy_name, "mean", 3)
    here = train(*arguments)
    for result in testing.run_processes(train, *arguments, processes=2, devices=4):
        np.testing.assert_allclose(result["loss"], here["loss"], rtol=1e-6)
        np.testing.assert_allclose(result["sizes"], here["sizes"], rtol=1e-6)
