"""A snapshot becomes the checkpoint that the run itself would have saved."""

import contextlib
import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdist import testing
from jaxdist.checkpoint import checkpoints, snapshots
from jaxdist.run import killed_supervisor, rescue
from jaxdist.rundir import record

PROGRESS = {"examples_seen": 48, "metrics": {"eval/accuracy": 0.5}}
DATA_STATE = {"position": {"epoch": 0, "position": 48}, "progress": PROGRESS}


@dataclasses.dataclass
class State:
    """Looks as a TrainState does to JAX."""

    step: jax.Array
    params: dict
    key: jax.Array


jax.tree_util.register_dataclass(State, data_fields=["step", "params", "key"], meta_fields=[])


def make_state(step):
    params = {"bias": jnp.full((3,), step, jnp.bfloat16), "kernel": jnp.arange(6.0).reshape(2, 3) * step}
    return State(jnp.int32(step), params, jax.random.key(step))


@pytest.fixture
def left(tmp_path):
    """Return a Rescue, a directory in memory with snapshots of steps 1 to 3, and a record of a run that was killed."""
    memory, run_dir = tmp_path / "memory", tmp_path / "run"
    with contextlib.closing(snapshots.Snapshots(memory, identity="mine")) as taken:
        for step in range(1, 4):
            taken.save(step, make_state(step), DATA_STATE)
    run_dir.mkdir()
    empty = dict.fromkeys(record.KEYS) | {"step": 1, "restarts": 0, "metrics": {}, "config": {}, "versions": {}}
    record.RunRecord(**empty | {"step_seconds": {}, "time_seconds": {}}).write(run_dir)
    keep = {"keep_last": 2, "keep_every": None, "best_metric": None, "best_mode": "max"}
    checkpoints_dir = run_dir / "checkpoints"
    return rescue.Rescue(run_dir=str(run_dir), checkpoints=str(checkpoints_dir), identity="mine", keep=keep), memory


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


def test_the_program_saves_and_removes_the_memory_and_keeps_it_where_that_fails(left, capsys):
    rescued, memory = left
    pathlib.Path(rescued.checkpoints).write_text("no directory")
    killed_supervisor.main([rescued.to_text(), str(memory)])
    assert "was not saved" in capsys.readouterr().err
    assert memory.exists()
    pathlib.Path(rescued.checkpoints).unlink()
    killed_supervisor.main([rescued.to_text(), str(memory)])
    assert "Step 3 was saved from memory" in capsys.readouterr().err
    assert not memory.exists()
