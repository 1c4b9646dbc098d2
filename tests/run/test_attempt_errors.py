"""Attempts that end otherwise than planned: what is said, what is saved, and how they continue."""

import dataclasses
import errno
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_experiment
from tiny_runs import read_record, run

import jaxdist
from jaxdist import errors
from jaxdist.checkpoint import checkpoints
from jaxdist.config import overrides
from jaxdist.data import CorruptExample
from jaxdist.launch.supervising import job_memory
from jaxdist.run import attempt, preflight
from jaxdist.rundir import ledger, record, writers

pytestmark = pytest.mark.usefixtures("shared_compilations")


def test_an_error_is_recorded_and_raised(tmp_path):
    def fail(step):
        if step == 6:
            raise RuntimeError("broken")
        return False

    options = attempt.RunOptions(run_dir=tmp_path / "run", silent=True, stop_requested=fail)
    with pytest.raises(RuntimeError, match="broken"):
        attempt.train(tiny_experiment.get_config(), options, devices=jax.devices()[:2])
    made = read_record(tmp_path / "run")
    assert (made["end_reason"], made["step"]) == ("error", 6)
    assert run(tmp_path / "run", resume=True).end_reason == "max_steps"


def corrupt_at_30(example, random):
    if (example["image"] == tiny_experiment.get_config().data.train[30]["image"]).all():
        raise CorruptExample("pictures/30.png: it ends too early")
    return example


def test_corrupt_data_are_one_message_and_may_be_left_out(tmp_path):
    config = tiny_experiment.get_config()
    experiment = dataclasses.replace(config, data=dataclasses.replace(config.data, example_fn=corrupt_at_30))
    with pytest.raises(errors.UserError, match=r"Example 30 .epoch 0.: pictures/30.png.*data\.on_bad=skip"):
        run(tmp_path / "raise", experiment=experiment)
    assert read_record(tmp_path / "raise")["end_reason"] == "error"
    skipping = run(tmp_path / "skip", "data.on_bad=skip", "stop.max_epochs=1", experiment=experiment)
    assert (skipping.end_reason, skipping.step) == ("max_epochs", 4)


class Broken:
    """A hook, and a transform, that raise at one place until they are corrected."""

    def __init__(self, where, step=7):
        self.where, self.step = where, step

    def on_step(self, info):
        if self.where == "hook" and info.step == self.step:
            raise KeyError("mine")

    def on_evaluation(self, info):
        if self.where == "evaluation":
            raise KeyError("mine")

    def example_fn(self, example, random):
        if self.where == "example":
            return corrupt_at_30(example, random)
        return example


@pytest.mark.parametrize("where", ["hook", "evaluation", "example"])
def test_a_mistake_of_the_user_loses_no_step(tmp_path, where, capsys):
    broken, config = Broken(where), tiny_experiment.get_config()
    data = dataclasses.replace(config.data, example_fn=broken.example_fn)
    experiment = dataclasses.replace(config, data=data, hooks=[broken], recovery=jaxdist.Recovery(ledger=True))
    experiment = overrides.override(experiment, ["checkpoints.every_steps=100", "reduction=canonical"])
    with pytest.raises(errors.UserError, match=r"mine|too early"):
        run(tmp_path / "run", experiment=experiment)
    made, shown = read_record(tmp_path / "run"), capsys.readouterr().err
    assert made["end_reason"] == "error"
    assert made["step"] == {"hook": 7, "evaluation": 4}.get(where, made["step"])
    if made["step"]:
        assert f"Step {made['step']} is saved" in shown
        assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == [str(made["step"])]
    broken.where = "nowhere"
    resumed = run(tmp_path / "run", experiment=experiment, resume=True)
    whole = run(tmp_path / "whole", experiment=experiment)
    assert resumed.params_sha256 == whole.params_sha256
    assert [*ledger.read(tmp_path / "run")] == [*ledger.read(tmp_path / "whole")]


def with_nan(number):
    """Return the tiny experiment, whose training example `number` holds a NaN."""
    experiment = tiny_experiment.get_config()
    fields = {name: values.copy() for name, values in experiment.data.train.arrays.items()}
    fields["image"][number, 2] = np.nan
    source = jaxdist.ArraySource(fields)
    unshuffled = dataclasses.replace(experiment.data, train=source, shuffle=False)
    return dataclasses.replace(experiment, data=unshuffled)


def test_a_state_that_is_not_finite_is_not_saved_at_a_mistake(tmp_path):
    broken = Broken("hook", step=2)
    experiment = dataclasses.replace(with_nan(5), hooks=[broken])
    experiment = overrides.override(experiment, ["checkpoints.every_steps=100", "stop.max_steps=8"])
    with pytest.raises(errors.UserError, match="mine"):
        run(tmp_path / "run", experiment=experiment)
    assert not (tmp_path / "run/checkpoints").exists()


def test_a_step_that_is_not_finite_is_explained_and_the_good_checkpoint_kept(tmp_path, capsys):
    """Example 37 is row 5 of step 3; the checkpoint of step 2 is the last good one."""
    made = run(tmp_path / "run", "checkpoints.every_steps=1", experiment=with_nan(37))
    # Two updates were made, of 16 examples each; the record says what the state says.
    assert (made.end_reason, made.step, made.examples_seen) == ("nonfinite", 2, 32)
    report = (tmp_path / "run" / "nonfinite.txt").read_text()
    assert "Step 3: the loss is nan" in report
    assert re.search(r"First gradient that is not finite: params\S+", report)
    assert re.search(r"not finite: 5\.", report)
    assert report in capsys.readouterr().err
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["1", "2"]
    # The params are those of a finite update.
    assert made.metrics["train/loss"] != made.metrics["train/loss"]


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.adam(lambda count: jnp.where(count == 4, jnp.nan, 0.1)),
        jaxdist.Optimizer(name="sgd", learning_rate=lambda count: jnp.where(count == 4, -1.0, 0.1)),
    ],
)
def test_a_learning_rate_that_is_none_is_named_and_its_update_not_made(tmp_path, optimizer):
    options = ["checkpoints.every_steps=2"]
    experiment = dataclasses.replace(tiny_experiment.get_config(), optimizer=optimizer, stop=jaxdist.Stop(max_epochs=9))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preflight, "check_rates", lambda *args, **kwargs: None)  # as for a run without a last step
        made = run(tmp_path / "run", *options, experiment=experiment)
        good = run(tmp_path / "good", *options, "stop.max_steps=4", experiment=experiment)
    assert (made.end_reason, made.step, made.params_sha256) == ("nonfinite", 4, good.params_sha256)
    report = (tmp_path / "run/nonfinite.txt").read_text()
    assert report.startswith("Step 5: the loss and all gradients are finite, but the optimizer would multiply")
    assert "The checkpoint of step 4 is kept." in report
    assert "Rows" not in report
    assert isinstance(optimizer, optax.GradientTransformation) or "rate of step 5 is -1." in report


@pytest.mark.parametrize("steps", [5, 6])
def test_params_that_an_update_made_no_numbers_are_not_saved(tmp_path, steps, capsys):
    """An optimizer divides arrays by 0 in step 5: no scalar tells, so the next step does, or the end of the run."""

    def update(grads, count, params=None):
        return jax.tree.map(lambda grad: -0.1 * jnp.where(count == 4, 0 * grad / (0 * grad), grad), grads), count + 1

    optimizer = optax.GradientTransformation(lambda params: jnp.zeros((), jnp.int32), update)
    experiment = dataclasses.replace(tiny_experiment.get_config(), optimizer=optimizer)
    made = run(tmp_path / "run", "checkpoints.every_steps=1", f"stop.max_steps={steps}", experiment=experiment)
    assert made.end_reason == "nonfinite"
    report = (tmp_path / "run/nonfinite.txt").read_text()
    assert "step 5 were finite" in report or "of that step were finite" in report
    assert "The checkpoint of step 4 is kept." in report
    assert "Rows" not in report
    assert (tmp_path / "run/checkpoints/4").exists()
    assert not (tmp_path / "run/checkpoints/5").exists()


@pytest.mark.parametrize(
    ("owner", "name", "error"),
    [
        (writers.JsonlWriter, "write", lambda: OSError(errno.EFBIG, "File too large", "runs/a/metrics.jsonl")),
        (checkpoints.Checkpointer, "save", lambda: checkpoints.CheckpointError("A checkpoint could not be written")),
    ],
    ids=["metrics", "checkpoint"],
)
def test_a_file_that_cannot_be_written_is_one_message_and_loses_no_step(
    tmp_path, owner, name, error, monkeypatch, capsys
):
    original = getattr(owner, name)

    def write(self, step, *rest):
        if step >= 6:
            raise error()
        return original(self, step, *rest)

    monkeypatch.setattr(owner, name, write)
    with pytest.raises(errors.RunFailedError, match=r"(metrics\.jsonl|checkpoint) (cannot|could not) be written"):
        run(tmp_path / "run", "checkpoints.every_steps=3")
    shown = capsys.readouterr().err
    (step,) = re.findall(r"The state of step (\d+) stays in /dev/shm/\S+; continue with --resume", shown)
    assert int(step) >= 6
    monkeypatch.undo()
    resumed = run(tmp_path / "run", resume=True)
    assert f"Step {step} was saved from memory, as a checkpoint." in capsys.readouterr().err
    assert not list(job_memory.left_behind(tmp_path / "run"))
    assert resumed.params_sha256 == run(tmp_path / "whole").params_sha256


FULL = OSError(errno.ENOSPC, "No space left on device", "runs/a/metrics.csv")


@pytest.mark.parametrize("error", [FULL, checkpoints.CheckpointError("Free space")])
def test_a_full_disk_is_one_message_and_the_run_can_be_resumed(tmp_path, error, monkeypatch):
    def fail(step):
        if step == 6:
            monkeypatch.setattr(record.RunRecord, "write", write)
            raise error
        return False

    def write(*_):
        raise FULL

    options = attempt.RunOptions(run_dir=tmp_path / "run", silent=True, stop_requested=fail)
    with pytest.raises(errors.RunFailedError, match="space") as raised:
        attempt.train(tiny_experiment.get_config(), options, devices=jax.devices()[:2])
    assert raised.value.__cause__ is error
    monkeypatch.undo()
    assert run(tmp_path / "run", resume=True).end_reason == "max_steps"
