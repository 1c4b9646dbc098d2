"""A trained run in use: the numbers that plain Flax gives, from any directory, without the training data."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_experiment
from trained_tiny import TINY, held_out, train

import jaxdist
from jaxdist import adapters, errors
from jaxdist.config import overrides
from jaxdist.run import components
from jaxdist.rundir import record

pytestmark = pytest.mark.usefixtures("shared_compilations")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run that watches eval/loss, which here is best at the end; its params are averaged for use."""
    run_dir = tmp_path_factory.mktemp("trained") / "run"
    changes = ("checkpoints.best_metric=eval/loss", "checkpoints.best_mode=min", "optimizer.ema_decay=0.9")
    train(run_dir, *changes, "model.width=16")
    return run_dir


def test_what_is_loaded_is_what_was_trained_with_its_overrides_and_its_averaged_params(trained, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    run = jaxdist.load(trained, devices=jax.devices()[:1])
    made = record.RunRecord.read(trained)
    assert (run.step, run.model_state) == (made.extra["best"]["step"], None)
    assert run.experiment.model.width == 16
    assert record.params_sha256(run.params) != made.params_sha256  # the average, which evaluations use
    assert run.evaluate()["loss"] == pytest.approx(made.extra["best"]["value"], rel=1e-6)
    last = jaxdist.load(trained, "last", devices=jax.devices()[:4])
    assert (last.step, last.evaluate()["accuracy"]) == (10, pytest.approx(made.metrics["eval/accuracy"], abs=0))


@pytest.mark.parametrize(("num_devices", "sizes"), [(1, (1, 16, 21)), (3, (17, 18, 19, 40))])
def test_predictions_are_those_of_the_plain_model_a_row_an_example(trained, num_devices, sizes):
    """Batches of 16 or, on 3 devices, of 18."""
    run = jaxdist.load(trained, devices=jax.devices()[:num_devices])
    for num_examples in sizes:
        inputs = held_out(num_examples)["image"]
        expected = run.experiment.model.apply({"params": jax.device_get(run.params)}, inputs, train=False)
        predicted = run.predict(inputs)
        np.testing.assert_allclose(predicted, expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(predicted, run.predict({"image": inputs}))


ROWS = 16  # of a batch


@pytest.mark.parametrize("rows_of_others", [(), (3,), (ROWS,), (1,)], ids=str)
def test_outputs_without_a_row_for_each_example_are_refused_by_name(trained, rows_of_others):
    """A scalar, and tables with fewer rows, as many as a batch, and one: no row of theirs is an example's."""
    run = jaxdist.load(trained, devices=jax.devices()[:1])

    def predict_fn(params, batch):
        return {"logits": batch["image"] * 2, "table": jnp.ones(rows_of_others)}

    broken = dataclasses.replace(run, functions=run.functions._replace(predict_fn=predict_fn))
    with pytest.raises(errors.UserError, match="a row for each example, but the output table has shape"):
        broken.predict(held_out(21)["image"])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda image: (255 * image).astype(np.uint8), r"has image as uint8 of shape .*trained on float32"),
        (lambda image: image > 0.5, r"has image as bool"),
        (lambda image: image[:, None], r"of shape \(1, \d+\); the model was trained on"),
    ],
)
def test_a_field_of_another_kind_than_in_training_is_told_once(trained, change, says):
    run = jaxdist.load(trained, devices=jax.devices()[:1])
    images = held_out(21)["image"]
    rows = run.functions._replace(predict_fn=lambda params, batch: batch["image"].reshape(len(batch["image"]), -1) * 2)
    run = dataclasses.replace(run, functions=rows)
    with pytest.warns(UserWarning, match=says) as told:
        run.predict(change(images))
    assert len(told) == 1
    run.predict(images.astype(np.float64))  # devices hold it as float32


def test_outputs_that_are_nan_are_counted(trained):
    run, images = jaxdist.load(trained, devices=jax.devices()[:1]), held_out(21)["image"].copy()
    images[[3, 20]] = np.nan
    with pytest.warns(UserWarning, match=r"outputs of 2 of 21 examples are NaN, first those of example 3 "):
        found = run.predict(images)
    np.testing.assert_array_equal(np.isnan(found).any(1), np.isin(np.arange(21), [3, 20]))


def test_an_evaluation_of_other_data_counts_each_example_once(trained):
    run, arrays = jaxdist.load(trained, devices=jax.devices()[:2]), held_out(37)
    outputs = run.experiment.model.apply({"params": jax.device_get(run.params)}, arrays["image"], train=False)
    found = run.evaluate(arrays)
    loss = optax.softmax_cross_entropy_with_integer_labels(outputs, arrays["label"]).mean()
    assert found["loss"] == pytest.approx(float(loss), rel=1e-5)
    assert found["accuracy"] == pytest.approx(float((outputs.argmax(1) == arrays["label"]).mean()), abs=1e-7)


def test_neither_the_training_data_nor_their_fingerprint_are_looked_at(trained):
    class Gone(jaxdist.ArraySource):
        def __getitem__(self, index):
            raise FileNotFoundError("the training data are gone")

        __getitems__ = fingerprint = __getitem__

    found = overrides.override(tiny_experiment.get_config(), ["model.width=16", "optimizer.ema_decay=0.9"])
    gone = dataclasses.replace(found.data, train=Gone(found.data.train.arrays))
    run = jaxdist.load(trained, experiment=dataclasses.replace(found, data=gone), devices=jax.devices()[:1])
    assert run.predict(held_out()["image"]).shape == (tiny_experiment.NUM_HELD_OUT, 2)


def test_a_moved_experiment_and_run_directory_are_named_and_found(trained, tmp_path):
    moved = shutil.copytree(trained, tmp_path / "moved")
    content = json.loads((moved / "run.json").read_text())
    content["experiment"]["file"] = "/nowhere/tiny_experiment.py"
    (moved / "run.json").write_text(json.dumps(content))
    with pytest.raises(errors.UserError, match=r"/nowhere/tiny_experiment\.py, which is not there.*experiment="):
        jaxdist.load(moved)
    again = jaxdist.load(moved, experiment=shutil.copy(TINY, tmp_path / "elsewhere.py"), devices=jax.devices()[:1])
    assert record.params_sha256(again.params) == record.params_sha256(jaxdist.load(trained).params)


def test_an_experiment_that_changed_since_is_refused_with_what_differs(trained):
    changed = overrides.override(tiny_experiment.get_config(), ["model.width=32", "optimizer.ema_decay=0.9"])
    with pytest.raises(errors.UserError, match=r"trained: model\.width 16 -> 32\."):
        jaxdist.load(trained, experiment=changed)


def test_what_does_not_change_the_model_may_change(trained):
    other = overrides.override(
        tiny_experiment.get_config(), ["model.width=16", "optimizer.ema_decay=0.9", "stop.max_steps=99", "seed=7"]
    )
    assert jaxdist.load(trained, experiment=other, devices=jax.devices()[:1]).step == jaxdist.load(trained).step


def test_directories_without_a_trained_model_are_refused(trained, tmp_path):
    with pytest.raises(errors.UserError, match=r"holds run\.json; .*empty does not"):
        jaxdist.load(tmp_path / "empty")
    unsaved = shutil.copytree(trained, tmp_path / "unsaved", ignore=shutil.ignore_patterns("checkpoints"))
    with pytest.raises(errors.UserError, match="has no checkpoint: the run ended before it saved one"):
        jaxdist.load(unsaved)
    with pytest.raises(errors.UserError, match=r"no checkpoint 3 \(step 3\); it has those of the steps"):
        jaxdist.load(trained, 3)


def test_a_run_trained_from_python_needs_its_experiment_named(tmp_path):
    train(tmp_path / "run", file=None)
    with pytest.raises(errors.UserError, match="names no experiment file"):
        jaxdist.load(tmp_path / "run")
    run = jaxdist.load(tmp_path / "run", experiment=tiny_experiment.get_config())
    assert record.params_sha256(run.params) == run.record.params_sha256


def test_plain_functions_need_a_predict_fn(tmp_path):
    found = tiny_experiment.get_config()
    shapes = {"image": jax.ShapeDtypeStruct((16, 6), np.float32), "label": jax.ShapeDtypeStruct((16,), np.int32)}
    functions = adapters.from_model(found.model, found.loss, shapes)
    experiment = dataclasses.replace(found, model=functions._replace(predict_fn=None), loss=None)
    train(tmp_path / "run", file=None, experiment=experiment)
    run = jaxdist.load(tmp_path / "run", experiment=experiment, devices=jax.devices()[:1])
    with pytest.raises(errors.UserError, match="predict_fn"):
        run.predict(held_out()["image"])
    assert 0 <= run.evaluate()["accuracy"] <= 1
    predicting = dataclasses.replace(experiment, model=functions)
    assert components.identity(predicting) == components.identity(experiment)
    again = jaxdist.load(tmp_path / "run", experiment=predicting, devices=jax.devices()[:1])
    assert again.predict(held_out()["image"]).shape == (tiny_experiment.NUM_HELD_OUT, 2)
