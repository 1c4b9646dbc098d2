"""The dry run: sizes by hand, the real program's memory, and nothing left behind."""

import dataclasses

import jax
import numpy as np
import pytest
import tiny_experiment
from jax.sharding import NamedSharding, PartitionSpec

from jaxdist.errors import UserError
from jaxdist.plan import dry_run

BASE = tiny_experiment.get_config()


def test_leaves_are_sized_over_all_devices_and_on_each_the_largest_first():
    mesh = jax.make_mesh((4,), ("data",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:4])
    sharded, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("data",), ()))
    tree = {
        "small": jax.ShapeDtypeStruct((3,), np.int8, sharding=whole),
        "large": jax.ShapeDtypeStruct((8, 5), np.float32, sharding=sharded),
    }
    assert dry_run.leaf_sizes(tree) == [
        dry_run.LeafSize("large", (8, 5), "float32", 160, 40),
        dry_run.LeafSize("small", (3,), "int8", 3, 3),
    ]


@pytest.fixture(scope="module")
def made():
    return dry_run.dry_run(BASE, jax.devices()[:2])


def test_an_experiment_is_compiled_and_sized(made):
    assert [leaf.path for leaf in made.leaves["params"]] == [
        "Dense_0/kernel", "Dense_1/kernel", "Dense_0/bias", "Dense_1/bias"
    ]  # fmt: skip
    assert sum(leaf.bytes for leaf in made.leaves["params"]) == 4 * (6 * 8 + 8 + 8 * 2 + 2)
    assert made.leaves["model_state"] == []
    assert made.batch["image"] == "(16, 6) float32"
    state = sum(leaf.device_bytes for tree in made.leaves.values() for leaf in tree)
    assert state < made.step.arguments < state + 1000  # a device's part of the batch, counters and the key
    assert made.step.total > made.evaluation.total > 0
    assert made.step.reused > 0  # the state is donated
    assert made.flops_per_step > 2 * 16 * 6 * 8
    assert made.to_json()["step"]["total"] == made.step.total


def test_the_text_fits_and_says_what_is_not_known(made):
    text = dry_run.render(made)
    assert max(map(len, text.splitlines())) <= 80
    assert "that of this kind is not known" in text
    many = [dry_run.LeafSize(f"layer_{number}/" + "x" * 40, (number, 9), "float32", 36, 36) for number in range(30)]
    long = dry_run.render(dataclasses.replace(made, leaves={"params": many}, step=None, flops_per_step=None))
    assert max(map(len, long.splitlines())) <= 80
    assert "and 18 smaller" in long
    assert "one was called, and works" in long


@pytest.mark.slow
def test_a_canonical_step_is_called_once():
    found = dry_run.dry_run(dataclasses.replace(BASE, reduction="canonical"), jax.devices()[:2])
    assert (found.step, found.evaluation, found.flops_per_step) == (None, None, None)


def test_what_would_refuse_the_run_refuses_the_dry_run():
    with pytest.raises(UserError, match="must be a positive multiple of 2"):
        dry_run.dry_run(dataclasses.replace(BASE, global_batch_size=7), jax.devices()[:2])
