"""A snapshot becomes the checkpoint that the run itself would have saved."""

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from left_in_memory import DATA_STATE, PROGRESS, leave, make_state

from jaxdist import testing
from jaxdist.checkpoint import checkpoints, snapshots
from jaxdist.rundir import record


@pytest.fixture
def left(tmp_path):
    return leave(tmp_path)


def restore(left):
    with checkpoints.Checkpointer(left.checkpoints, identity="mine") as checkpointer:
        sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        template = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), make_state(0)
        )
        return checkpointer.latest_step(), *checkpointer.restore(template)


def test_the_newest_snapshot_becomes_a_checkpoint_bit_for_bit_and_the_record_says_so(left):
    rescued, memory = left
    assert rescued.save(memory, "error") == 3
    step, state, data_state = restore(rescued)
    assert (step, data_state) == (3, DATA_STATE)
    testing.assert_trees_equal(state, make_state(3))
    made = record.RunRecord.read(rescued.run_dir)
    assert (made.step, made.examples_seen, made.end_reason) == (3, 48, "error")
    assert made.params_sha256 == record.params_sha256(make_state(3).params)
    assert made.metrics == PROGRESS["metrics"]


def test_what_is_no_newer_than_a_checkpoint_or_another_runs_is_left_out(left):
    rescued, memory = left
    assert dataclasses.replace(rescued, identity="another").save(memory, "error") is None
    with checkpoints.Checkpointer(rescued.checkpoints, identity="mine") as checkpointer:
        checkpointer.save(3, make_state(7), DATA_STATE, {})
    assert rescued.save(memory, "preempted") is None
    testing.assert_trees_equal(restore(rescued)[1], make_state(7))
    assert record.RunRecord.read(rescued.run_dir).end_reason == "error", "written by the first call"


def test_values_of_64_bits_keep_them(tmp_path):
    with jax.enable_x64(True), contextlib.closing(snapshots.Snapshots(tmp_path, identity="mine")) as taken:
        taken.save(1, {"x": jnp.float64(1) / 3}, DATA_STATE)
    (leaf,) = snapshots.read_newest(tmp_path, identity="mine").leaves
    assert np.asarray(leaf.data) == np.float64(1) / 3
