import dataclasses
import errno
import json
import pathlib
import re
import shutil

import jax
import numpy as np
import pytest
import tiny_experiment

import jaxdist
from jaxdist import errors, testing
from jaxdist.checkpoint import checkpoints
from jaxdist.config import overrides
from jaxdist.data import ArraySource, CorruptExample, Loader
from jaxdist.launch.supervising import supervisor
from jaxdist.run import attempt, components, directory
from jaxdist.rundir import ledger, record
from jaxdist.stop import Progress

pytestmark = pytest.mark.usefixtures("shared_compilations")


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


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The run of 10 steps that nothing happened to."""
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    run(run_dir)
    return run_dir


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


def test_a_state_that_is_not_finite_is_not_saved_at_a_mistake(tmp_path):
    broken = Broken("hook", step=2)
    experiment = dataclasses.replace(with_nan(5), hooks=[broken])
    experiment = overrides.override(experiment, ["checkpoints.every_steps=100", "stop.max_steps=8"])
    with pytest.raises(errors.UserError, match="mine"):
        run(tmp_path / "run", experiment=experiment)
    assert not (tmp_path / "run/checkpoints").exists()


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


def with_nan(number):
    """Return the tiny experiment, whose training example `number` holds a NaN."""
    experiment = tiny_experiment.get_config()
    fields = {name: values.copy() for name, values in experiment.data.train.arrays.items()}
    fields["image"][number, 2] = np.nan
    source = jaxdist.ArraySource(fields)
    unshuffled = dataclasses.replace(experiment.data, train=source, shuffle=False)
    return dataclasses.replace(experiment, data=unshuffled)


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


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_narrow_precision_trains(tmp_path, precision):
    made = run(tmp_path / "run", f"precision={precision}", "stop.max_steps=3")
    assert made.end_reason == "max_steps"


def contents(folder):
    """Return the files below a folder with their bytes, but not the signs of life that a process gives at its start."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.parent.name != supervisor.BOARD_NAME)
    return {path: path.read_bytes() for path in files}


def refused(match, run_dir, *assignments, **options):
    with pytest.raises(errors.UserError, match=match):
        run(run_dir, *assignments, **options)


def test_a_directory_that_holds_a_run_is_not_written_to(undisturbed):
    before = contents(undisturbed)
    refused(r"already holds a run\. Continue it with --resume", undisturbed)
    refused(r"another experiment: name tiny -> other\. To resume", undisturbed, "name=other")
    refused(r"another experiment: model\.width 8 -> 9\. To resume", undisturbed, "model.width=9", resume=True)
    refused(r"another experiment: seed 0 -> 1\. To resume", undisturbed, "seed=1", resume=True)
    refused(r"this was changed: optimizer\.name momentum -> adam\.$", undisturbed, "optimizer.name=adam", resume=True)
    shorter = other_data(tiny_experiment.make_source(51, 0))
    refused(r"experiment: data\.train 52 examples -> 51 examples\. To", undisturbed, experiment=shorter, resume=True)
    others = other_data(tiny_experiment.make_source(52, 9))
    refused(r"holds other examples \(fingerprint [\w:]+ -> [\w:]+\)\. To", undisturbed, experiment=others, resume=True)
    assert contents(undisturbed) == before


def other_data(source):
    experiment = tiny_experiment.get_config()
    return dataclasses.replace(experiment, data=dataclasses.replace(experiment.data, train=source))


def test_overwrite_replaces_a_run_and_nothing_else(tmp_path):
    run_dir = tmp_path / "run"
    before = run(run_dir, "stop.max_steps=4", "recovery.ledger=true")
    (run_dir / "notes.txt").write_text("a user's own file")
    (run_dir / "figures").mkdir()
    refused("Lower global_batch_size", run_dir, "global_batch_size=1000", overwrite=True)
    assert json.loads((run_dir / "run.json").read_text())["step"] == 4
    after = run(run_dir, "stop.max_steps=2", "seed=1", overwrite=True)
    assert (after.step, after.restarts) == (2, 0)
    assert after.params_sha256 != before.params_sha256
    assert [int(path.name) for path in (run_dir / "checkpoints").iterdir()] == [2]
    steps = [json.loads(line)["step"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert max(steps) == 2
    assert not (run_dir / "ledger.txt").exists()
    assert (run_dir / "notes.txt").read_text() == "a user's own file"
    assert (run_dir / "figures").is_dir()


def test_overwrite_starts_a_run_where_there_is_none_and_leaves_what_is_no_run(tmp_path):
    assert run(tmp_path / "new", "stop.max_steps=1", overwrite=True).step == 1
    (tmp_path / "theirs" / "checkpoints").mkdir(parents=True)
    refused("it is unclear which run", tmp_path / "theirs", overwrite=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "run.json").write_text('{"a user": "wrote this"}')
    refused("is not a jaxdist run record", tmp_path / "other", overwrite=True)
    assert (tmp_path / "other" / "run.json").read_text() == '{"a user": "wrote this"}'


def test_nothing_to_resume(tmp_path):
    refused("--resume needs a run", tmp_path / "absent", resume=True)
    assert not (tmp_path / "absent").exists()


def test_a_directory_that_cannot_be_written(tmp_path):
    """The tests may run as root, who may write anywhere but here."""
    (tmp_path / "file").write_text("a file")
    refused("file is a file, or a link to nothing", tmp_path / "file")
    refused("must be writable; .*file/run is not", tmp_path / "file" / "run")
    refused("must be writable", pathlib.Path("/proc/jaxdist"))
    assert (tmp_path / "file").read_text() == "a file"


@pytest.mark.parametrize("name", ["metrics.jsonl", "checkpoints/3/x", "tensorboard/events"])
def test_files_of_a_run_without_its_record_are_not_written_to(tmp_path, name):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text("precious")
    before = contents(tmp_path)
    refused(rf"{name.split('/')[0]}.* but no run\.json", tmp_path)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("text", ["{", "[]", "{}"])
def test_a_damaged_record_is_named(tmp_path, text):
    (tmp_path / "run.json").write_text(text)
    refused(r"run\.json", tmp_path, resume=True)
    assert (tmp_path / "run.json").read_text() == text


def test_a_damaged_checkpoint_is_named_and_nothing_is_overwritten(tmp_path):
    run(tmp_path / "run")
    for path in (tmp_path / "run" / "checkpoints" / "10" / "state").rglob("*"):
        if path.is_file() and path.stat().st_size > 20:
            path.write_bytes(bytes(path.stat().st_size))
    before = contents(tmp_path / "run")
    refused("Step 8 is intact", tmp_path / "run", "stop.max_steps=12", resume=True)
    assert contents(tmp_path / "run") == before


def test_a_resume_in_another_order_is_refused_and_changes_nothing(undisturbed):
    before = contents(undisturbed)
    refused("Restore shuffle, or the order", undisturbed, "stop.max_steps=12", "data.shuffle=False", resume=True)
    assert contents(undisturbed) == before


def test_wrong_settings_create_nothing(tmp_path):
    refused("14 or 16", tmp_path / "run", "global_batch_size=15")
    refused("no strategy 'magic'", tmp_path / "run", "strategy=magic")
    refused(r"stop\.max_steps must be positive", tmp_path / "run", "stop.max_steps=0")
    refused("needs a rule that ends it", tmp_path / "run", "stop.max_steps=None")
    refused("no effect on momentum", tmp_path / "run", "optimizer.beta1=0.5")
    refused("multiple of 6", tmp_path / "run", "reduction=canonical", "logical_shards=6")
    assert not (tmp_path / "run").exists()


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


def accuracies(values):
    """Let the evaluations of any run give these values, one after the other."""
    remaining = iter(values)
    return lambda parts, state: {"accuracy": next(remaining), "loss": 1.0}


def test_the_best_state_is_saved_when_it_is_found_kept_named_and_loadable(tmp_path, monkeypatch):
    """Evaluations after steps 2, 4, 6, 8 and 10; checkpoints every 100 steps."""
    monkeypatch.setattr(components.Parts, "evaluate", accuracies([0.5, 0.9, 0.7, 0.9, 0.1]))
    settings = ("eval.every_steps=2", "checkpoints.every_steps=100", "checkpoints.keep_last=1")
    run(tmp_path / "run", *settings, "checkpoints.best_metric=eval/accuracy")
    best = {"metric": "eval/accuracy", "value": 0.9, "step": 4}
    assert read_record(tmp_path / "run")["best"] == best
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["10", "4"]

    monkeypatch.setattr(components.Parts, "evaluate", accuracies([0.5, 0.9]))
    stopped = run(tmp_path / "other", *settings, "checkpoints.best_metric=eval/accuracy", "stop.max_steps=4")
    assert stopped.extra["best"] == best
    experiment = tiny_experiment.get_config()
    parts = components.put_together(experiment, devices=jax.devices()[:1])
    for run_dir in (tmp_path / "run", tmp_path / "other"):
        with directory.open_checkpoints(experiment, run_dir, parts.identity) as checkpointer:
            state, _ = checkpointer.restore(parts.abstract_state, 4)
        assert record.params_sha256(state.params) == stopped.params_sha256


def test_target_and_best_checkpoint_may_be_of_sets_with_names(tmp_path, monkeypatch):
    values = iter([(0.5, 3.0), (0.6, 1.0), (0.95, 2.0)])
    names = ("far/accuracy", "near/loss")
    monkeypatch.setattr(components.Parts, "evaluate", lambda parts, state: dict(zip(names, next(values), strict=True)))
    tiny = tiny_experiment.get_config()
    sets = {"near": tiny.data.eval, "far": tiny_experiment.make_source(13, 2)}
    best = ("checkpoints.best_metric=eval/near/loss", "checkpoints.best_mode=min", "checkpoints.keep_last=1")
    made = run(
        tmp_path / "run",
        *("eval.every_steps=2", "checkpoints.every_steps=100", *best),
        *("stop.target=0.9", "stop.target_metric=eval/far/accuracy"),
        experiment=dataclasses.replace(tiny, data=dataclasses.replace(tiny.data, eval=sets)),
    )
    assert (made.end_reason, made.step) == ("target_reached", 6)
    assert made.extra["best"] == {"metric": "eval/near/loss", "value": 1.0, "step": 4}
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["4", "6"]


def test_a_resumed_run_knows_the_best_of_the_attempts_before_it(tmp_path, monkeypatch):
    monkeypatch.setattr(components.Parts, "evaluate", accuracies([0.5, 0.9, 0.7, 0.8, 0.1]))
    settings = ("eval.every_steps=2", "checkpoints.every_steps=100", "checkpoints.best_metric=eval/accuracy")
    run(tmp_path / "run", *settings, preempt=5)
    made = run(tmp_path / "run", *settings, resume=True)
    assert made.extra["best"] == {"metric": "eval/accuracy", "value": 0.9, "step": 4}


def test_a_checkpoint_is_not_judged_by_the_evaluation_of_another_step(tmp_path, monkeypatch):
    """The checkpoint of step 3 must not be taken for the one whose accuracy was measured after step 2."""
    monkeypatch.setattr(components.Parts, "evaluate", accuracies([0.9, 0.1, 0.2]))
    settings = ("eval.every_steps=2", "checkpoints.every_steps=3", "checkpoints.keep_last=1", "stop.max_steps=6")
    run(tmp_path / "run", *settings, "checkpoints.best_metric=eval/accuracy")
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["2", "6"]


def test_a_resume_whose_checkpoints_are_gone_is_refused_and_changes_nothing(tmp_path):
    run(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    before = {name: (tmp_path / "run" / name).read_bytes() for name in ("run.json", "metrics.jsonl")}
    with pytest.raises(errors.UserError, match=r"a checkpoint of step 10, and .*checkpoints holds none"):
        run(tmp_path / "run", "stop.max_steps=20", resume=True)
    assert {name: (tmp_path / "run" / name).read_bytes() for name in before} == before
