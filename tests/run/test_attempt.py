"""An attempt: what a run leaves, and that stops, kills and resumes change nothing of it."""

import dataclasses

import jax
import pytest
import tiny_experiment
from tiny_runs import Killed, assert_same_run, read_checkpoint, read_metrics, read_record, run

from jaxdist import errors, testing
from jaxdist.data import ArraySource, Loader
from jaxdist.launch.supervising import supervisor
from jaxdist.run import attempt, components
from jaxdist.rundir import record

pytestmark = pytest.mark.usefixtures("shared_compilations")


def test_a_run_leaves_its_record_its_metrics_and_its_checkpoints(undisturbed):
    made = read_record(undisturbed)
    assert set(record.KEYS) <= set(made)
    assert (made["end_reason"], made["step"], made["restarts"]) == ("max_steps", 10, 0)
    assert made["examples_seen"] == 2 * tiny_experiment.NUM_TRAIN + 2 * 16
    assert (made["strategy"], made["reduction"], made["num_devices"]) == ("data-parallel", "mean", 2)
    assert (made["num_processes"], made["compile_count"], made["command"]) == (1, 1, "a command")
    state, progress, position = read_checkpoint(undisturbed)
    assert made["params_sha256"] == record.params_sha256(state.params)
    assert made["metrics"] == progress.newest_metrics()
    assert set(made["metrics"]) == {f"{part}/{name}" for part in ("train", "eval") for name in ("loss", "accuracy")} | {
        "train/learning_rate",
        "train/grad_norm",
    }
    assert made["config"]["optimizer"]["learning_rate"] == 0.1
    assert (position["epoch"], position["position"]) == (2, 32)
    rows = read_metrics(undisturbed)
    assert [row["step"] for row in rows] == list(range(1, 11))
    assert [row["step"] for row in rows if "eval/accuracy" in row] == [4, 8, 10]
    assert sorted(path.name for path in (undisturbed / "checkpoints").iterdir()) == ["10", "8"]


@pytest.mark.parametrize("step", [1, 4, 6, 9])
def test_a_run_that_was_preempted_continues_as_if_never_stopped(undisturbed, tmp_path, step):
    first = run(tmp_path / "run", preempt=step)
    assert (first.end_reason, first.step) == ("preempted", step)
    assert run(tmp_path / "run", resume=True).restarts == 1
    assert_same_run(tmp_path / "run", undisturbed)


@pytest.mark.parametrize("step", [2, 4, 7])
def test_a_run_that_was_killed_continues_from_its_last_checkpoint(undisturbed, tmp_path, step):
    """Rows of metrics written after that checkpoint are written again, not twice; before the first, all are."""
    with pytest.raises(Killed):
        run(tmp_path / "run", kill=step)
    assert read_record(tmp_path / "run")["end_reason"] is None
    run(tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", undisturbed)


@pytest.mark.parametrize("step", [3, 4, 5, 6])
def test_a_run_that_was_killed_continues_from_memory_and_lacks_no_row(undisturbed, tmp_path, monkeypatch, step):
    monkeypatch.setenv(supervisor.MEMORY, str(tmp_path / "memory"))
    (tmp_path / "memory").mkdir()
    with pytest.raises(Killed):
        run(tmp_path / "run", "recovery.snapshot_every=1", kill=step)
    run(tmp_path / "run", "recovery.snapshot_every=1", resume=True)
    assert_same_run(tmp_path / "run", undisturbed)


def test_a_run_that_is_disturbed_again_and_again_ends_the_same(undisturbed, tmp_path):
    run(tmp_path / "run", preempt=3)
    run(tmp_path / "run", preempt=5, resume=True)
    with pytest.raises(Killed):
        run(tmp_path / "run", kill=6, resume=True)
    assert run(tmp_path / "run", resume=True).restarts == 3
    assert_same_run(tmp_path / "run", undisturbed)


def test_in_canonical_mode_the_bits_survive_a_move_to_another_number_of_devices(tmp_path):
    canonical = ["reduction=canonical", "model.dropout_rate=0.3"]
    run(tmp_path / "never", *canonical, num_devices=2)
    run(tmp_path / "moved", *canonical, num_devices=4, preempt=3)
    run(tmp_path / "moved", *canonical, num_devices=1, preempt=6, resume=True)
    assert run(tmp_path / "moved", *canonical, num_devices=8, resume=True).num_devices == 8
    assert_same_run(tmp_path / "moved", tmp_path / "never", *canonical)


def test_in_mean_mode_a_move_changes_the_rounding_alone(undisturbed, tmp_path):
    calm = ["model.dropout_rate=0.0"]
    run(tmp_path / "never", *calm, num_devices=2)
    run(tmp_path / "moved", *calm, num_devices=4, preempt=5)
    run(tmp_path / "moved", *calm, num_devices=1, resume=True)
    moved, never = (read_checkpoint(tmp_path / name, *calm)[0].params for name in ("moved", "never"))
    testing.assert_trees_close(moved, never, tolerance=1e-6)


def test_resuming_a_run_that_is_over_changes_nothing(undisturbed, tmp_path):
    run(tmp_path / "run")
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    again = run(tmp_path / "run", resume=True)
    assert (again.end_reason, again.step, again.restarts) == ("max_steps", 10, 1)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
    assert_same_run(tmp_path / "run", undisturbed)


def test_a_run_that_is_over_goes_on_with_a_later_end(undisturbed, tmp_path):
    run(tmp_path / "run", "stop.max_steps=5")
    longer = run(tmp_path / "run", resume=True)
    assert (longer.step, longer.params_sha256) == (10, read_record(undisturbed)["params_sha256"])
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == list(range(1, 11))


def test_patience_counts_over_a_resume(tmp_path):
    """At a rate of zero nothing gets better: the first evaluation is the best, and three more end the run."""
    patient = ["optimizer.learning_rate=0", "stop.patience=3", "stop.max_steps=None", "eval.every_steps=2"]
    never = run(tmp_path / "never", *patient)
    assert (never.end_reason, never.step) == ("patience", 8)
    run(tmp_path / "stopped", *patient, preempt=5)
    again = run(tmp_path / "stopped", *patient, resume=True)
    assert (again.end_reason, again.step) == ("patience", 8)
    assert_same_run(tmp_path / "stopped", tmp_path / "never", *patient)


def test_a_reached_target_ends_the_run(tmp_path):
    made = run(tmp_path / "run", "stop.target=0.3", "stop.max_steps=None", "eval.every_steps=3")
    assert (made.end_reason, made.step) == ("target_reached", 3)
    assert made.metrics["eval/accuracy"] >= 0.3


@pytest.mark.parametrize("beyond", [-1, 0])
def test_a_training_metric_ends_the_run_at_the_same_step_however_it_is_saved_and_stopped(
    undisturbed, tmp_path, monkeypatch, beyond
):
    """Rules see the metrics of a step after the next one, since they are usually read then."""
    losses = {row["step"]: row["train/loss"] for row in read_metrics(undisturbed) if "train/loss" in row}
    good = min(range(2, 8), key=losses.__getitem__)
    assert losses[1] > losses[good]
    step = good + beyond
    ends = [
        "stop.target_metric=train/loss",
        f"stop.target={losses[good]}",
        "stop.mode=min",
        "checkpoints.best_metric=eval/accuracy",
    ]
    made = run(tmp_path / "never", *ends)
    assert (made.end_reason, made.step) == ("target_reached", good + 1)
    assert run(tmp_path / "saved", *ends, "checkpoints.every_steps=1").params_sha256 == made.params_sha256
    first = run(tmp_path / "stopped", *ends, preempt=step)
    assert first.metrics["train/loss"] == losses[step]
    run(tmp_path / "stopped", *ends, resume=True)
    assert_same_run(tmp_path / "stopped", tmp_path / "never", *ends)
    (tmp_path / "memory").mkdir()
    monkeypatch.setenv(supervisor.MEMORY, str(tmp_path / "memory"))
    with pytest.raises(Killed):
        run(tmp_path / "killed", *ends, "recovery.snapshot_every=1", kill=step)
    run(tmp_path / "killed", *ends, "recovery.snapshot_every=1", resume=True)
    assert_same_run(tmp_path / "killed", tmp_path / "never", *ends)


def test_max_epochs_counts_ragged_epochs(tmp_path):
    made = run(tmp_path / "run", "stop.max_epochs=2", "stop.max_steps=None")
    assert (made.end_reason, made.step, made.examples_seen) == ("max_epochs", 8, 104)


def test_the_record_is_there_from_the_start_and_says_that_the_run_goes_on(tmp_path):
    seen = {}

    def look(step):
        seen[step] = read_record(tmp_path / "run")
        return False

    options = attempt.RunOptions(run_dir=tmp_path / "run", silent=True, stop_requested=look)
    attempt.train(tiny_experiment.get_config(), options, devices=jax.devices()[:2])
    assert [seen[step]["step"] for step in (3, 4, 7, 8)] == [0, 4, 4, 8]
    assert {made["end_reason"] for made in seen.values()} == {None}
    assert {made["params_sha256"] for made in seen.values()} == {None}


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_narrow_precision_trains(tmp_path, precision):
    made = run(tmp_path / "run", f"precision={precision}", "stop.max_steps=3")
    assert made.end_reason == "max_steps"


def test_a_run_continues_from_the_step_that_is_named_and_keeps_the_newer_ones_aside(tmp_path, undisturbed):
    run(tmp_path / "run")
    with pytest.raises(errors.UserError, match=r"holds steps 8, 10\. Choose another; got 5"):
        run(tmp_path / "run", resume=True, checkpoint=5)
    made = run(tmp_path / "run", resume=True, checkpoint=8, preempt=9)
    assert (made.end_reason, made.step) == ("preempted", 9)
    assert {path.name for path in (tmp_path / "run" / "set-aside" / "1").iterdir()} == {"10"}
    run(tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", undisturbed)


class CountedSource(ArraySource):
    """Counts how often its fingerprint is asked for, which may be to read every file."""

    count = 0

    def fingerprint(self):
        self.count += 1
        return super().fingerprint()


def counted_experiment():
    found = tiny_experiment.get_config()
    train, held_out = (CountedSource(source.arrays) for source in (found.data.train, found.data.eval))
    return dataclasses.replace(found, data=dataclasses.replace(found.data, train=train, eval=held_out))


def test_the_data_are_fingerprinted_once_and_a_known_fingerprint_is_passed_on(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(components.data, "Loader", lambda *args, **kwargs: made.append(0) or Loader(*args, **kwargs))
    experiment = counted_experiment()
    first = run(tmp_path / "run", "eval.every_steps=1", preempt=3, experiment=experiment)
    assert (first.step, experiment.data.train.count, experiment.data.eval.count) == (3, 1, 0)
    assert len(made) == 2  # one loader of the training data, one for all three evaluations

    experiment = counted_experiment()
    identity = components.identity(experiment)
    options = attempt.RunOptions(run_dir=tmp_path / "run", resume=True, silent=True, identity=identity)
    attempt.train(experiment, options, devices=jax.devices()[:2])
    assert (experiment.data.train.count, experiment.data.eval.count) == (1, 0)
