"""A run of two real processes begins with the same weights as one of one process, or does not begin."""

import dataclasses
import hashlib
import os
import pathlib

import jax
import numpy as np
import pytest
import tiny_experiment

import jaxdist
from jaxdist import errors, testing
from jaxdist.run import attempt, components
from jaxdist.spmd import layout as layouts


def own_values(array):
    """Values that differ between processes, as a file on a disk of each host may."""
    return array + np.float32(os.getpid())


def parts_of(path, strategy, rules=()):
    experiment = dataclasses.replace(
        tiny_experiment.get_config(),
        init_from=jaxdist.InitFrom(path=path, rules=rules),
        optimizer=jaxdist.Optimizer(name="adam", learning_rate=0.1, ema_decay=0.9),
        strategy=strategy,
        layout=jaxdist.LayoutSettings(min_size=16),
    )
    return components.put_together(experiment, devices=jax.devices())


def state_digest(path, strategy):
    parts = parts_of(path, strategy)
    state = parts.create_state()
    kept = (state.params, state.opt_state)
    whole = jax.jit(lambda tree: layouts.constrain(tree, parts.strategy.mesh, layouts.replicated))(kept)
    return hashlib.sha256(b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(whole))).hexdigest()


def refusal(path):
    parts = parts_of(path, "data-parallel", (jaxdist.WeightRule(pattern="Dense_0/kernel", function=own_values),))
    try:
        attempt._check_weights(parts, attempt.RunOptions(run_dir=pathlib.Path("none")))
    except errors.UserError as error:
        return str(error)
    return "none"


@pytest.fixture
def path(tmp_path):
    random = np.random.default_rng(0)
    shapes = {"Dense_0.kernel": (6, 8), "Dense_0.bias": (8,), "Dense_1.kernel": (8, 2), "Dense_1.bias": (2,)}
    np.savez(tmp_path / "w.npz", **{name: random.normal(size=shape).astype("f4") for name, shape in shapes.items()})
    return str(tmp_path / "w.npz")


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["zero1", "fsdp"])
def test_two_processes_begin_with_the_state_of_one(strategy, path):
    found = testing.run_processes(state_digest, path, strategy, processes=2, devices=1)
    parts = parts_of(path, "data-parallel")
    with np.load(path) as content:
        params = {f"Dense_{n}": {leaf: content[f"Dense_{n}.{leaf}"] for leaf in ("bias", "kernel")} for n in (0, 1)}
    leaves = jax.tree.leaves((params, parts.optimizer.init(params)))
    wanted = hashlib.sha256(b"".join(np.asarray(leaf).tobytes() for leaf in leaves)).hexdigest()
    assert found == [wanted, wanted]


@pytest.mark.slow
def test_processes_that_read_other_values_are_refused_on_all_of_them(path):
    first, second = testing.run_processes(refusal, path, processes=2, devices=1)
    assert first == second
    assert "SHA-256 of the weights of init_from" in first
