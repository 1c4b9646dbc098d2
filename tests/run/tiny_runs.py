"""Runs of the tiny experiment for the tests of attempts, and what they leave in their directories."""

import dataclasses
import json

import jax
import tiny_experiment

from jaxdist import testing
from jaxdist.config import overrides
from jaxdist.run import attempt, components, directory
from jaxdist.stop import Progress


class Killed(BaseException):
    """Ends a run as nothing else does: no checkpoint, no record."""


def run(
    run_dir,
    *assignments,
    num_devices=2,
    resume=False,
    overwrite=False,
    preempt=None,
    kill=None,
    experiment=None,
    checkpoint=None,
):
    def stop_requested(step):
        if step == kill:
            raise Killed
        return step == preempt

    experiment = overrides.override(experiment or tiny_experiment.get_config(), assignments)
    options = attempt.RunOptions(
        run_dir=run_dir,
        resume=resume,
        overwrite=overwrite,
        checkpoint=checkpoint,
        silent=True,
        command="a command",
        stop_requested=stop_requested,
    )
    return attempt.train(experiment, options, devices=jax.devices()[:num_devices])


def read_record(run_dir):
    return json.loads((run_dir / "run.json").read_text())


def read_metrics(run_dir):
    """Return the rows, without their seconds, which are never the same."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert all(row.pop("seconds") > 0 for row in rows)
    return rows


def read_checkpoint(run_dir, *assignments):
    """Return state and progress of the newest checkpoint; seconds, which never are the same, left out."""
    experiment = overrides.override(tiny_experiment.get_config(), assignments)
    parts = components.put_together(experiment, devices=jax.devices()[:1])
    checkpointer = directory.open_checkpoints(experiment, run_dir, parts.identity)
    state, data_state = checkpointer.restore(parts.abstract_state)
    checkpointer.close()
    progress = Progress.from_json(data_state["progress"])
    return state, dataclasses.replace(progress, seconds=0.0), data_state["position"]


def assert_same_run(run_dir, other, *assignments):
    """The same params, optimizer, position, epochs and evaluations, and each row of metrics once."""
    state, *rest = read_checkpoint(run_dir, *assignments)
    other_state, *other_rest = read_checkpoint(other, *assignments)
    testing.assert_trees_equal(state, other_state)
    assert rest == other_rest
    assert read_metrics(run_dir) == read_metrics(other)
    for key in ("end_reason", "step", "examples_seen", "params_sha256", "metrics"):
        assert read_record(run_dir)[key] == read_record(other)[key]
