"""A job that was killed: what it left in memory, and its run directory."""

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import run_records

from jaxdist.checkpoint import snapshots
from jaxdist.run import rescue
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


def leave(tmp_path):
    """Return a Rescue, a directory in memory with snapshots of steps 1 to 3, and a record of a run that was killed."""
    memory, run_dir = tmp_path / "memory", tmp_path / "run"
    with contextlib.closing(snapshots.Snapshots(memory, identity="mine")) as taken:
        for step in range(1, 4):
            taken.save(step, make_state(step), DATA_STATE)
    run_dir.mkdir()
    record.RunRecord(**run_records.EMPTY | {"step": 1}).write(run_dir)
    keep = {"keep_last": 2, "keep_every": None, "best_metric": None, "best_mode": "max"}
    checkpoints_dir = run_dir / "checkpoints"
    return rescue.Rescue(run_dir=str(run_dir), checkpoints=str(checkpoints_dir), identity="mine", keep=keep), memory
