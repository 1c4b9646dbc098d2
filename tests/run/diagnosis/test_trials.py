import dataclasses
import itertools
import json
import tempfile

import jax
import numpy as np
import pytest
import tiny_experiment

import jaxdist
from jaxdist.cli import main
from jaxdist.launch.joining import runtime
from jaxdist.run import components
from jaxdist.run.diagnosis import trials


def first_batch(experiment):
    loader = components.make_loader(experiment)
    [batch] = [batch for (batch, _), _ in zip(loader, range(1))]
    return batch


@pytest.mark.parametrize("order", [None, jaxdist.data.BlockShuffled(8), jaxdist.data.Resampled((1.0,) * 52)])
def test_one_batch_is_the_first_of_the_first_epoch_in_every_step(order):
    experiment = tiny_experiment.get_config()
    experiment = dataclasses.replace(experiment, data=dataclasses.replace(experiment.data, order=order))
    wanted = first_batch(experiment)
    loader = components.make_loader(trials.one_batch(experiment))
    assert loader.steps_per_epoch == 1
    for (batch, _), _ in zip(loader, range(3)):
        for name, values in wanted.items():
            np.testing.assert_array_equal(batch[name], values)
    [held_out] = components.make_eval_loaders(trials.one_batch(experiment)).values()
    np.testing.assert_array_equal(next(iter(held_out)).batch["label"], wanted["label"])


def noisy(example, random):
    return {**example, "image": example["image"] + random.normal(size=example["image"].shape).astype(np.float32)}


def test_one_batch_is_the_same_in_every_step_whatever_its_transform_draws():
    experiment = tiny_experiment.get_config()
    data = dataclasses.replace(experiment.data, example_fn=noisy, eval_example_fn=noisy, num_workers=2)
    experiment = dataclasses.replace(experiment, data=data)
    one = trials.one_batch(experiment)
    wanted = first_batch(dataclasses.replace(experiment, data=dataclasses.replace(data, num_workers=0)))
    [held_out] = components.make_eval_loaders(one).values()
    for batch, _ in [*itertools.islice(components.make_loader(one), 3), *held_out]:
        np.testing.assert_array_equal(batch["image"], wanted["image"])


def test_one_batch_is_one_without_padding(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(runtime, "start", lambda num_devices, threads=None: jax.devices()[:num_devices])
    tiny = tiny_experiment.get_config()
    lengths = np.array([1] * 3 + [2] * 49)  # the first bucket holds less than a batch
    source = jaxdist.data.Bucketed(tiny.data.train, lengths, boundaries=(1, 2), fields=())
    data = dataclasses.replace(tiny.data, train=source, order=source.order())
    for seed in range(20):
        experiment = dataclasses.replace(tiny, data=data, seed=seed)
        assert len(trials.one_batch(experiment).data.train) == experiment.global_batch_size
    short = dataclasses.replace(experiment, global_batch_size=50)
    with pytest.raises(ValueError, match="without padding"):
        trials.one_batch(short)
    command = ["train", tiny_experiment.__file__, "--overfit-batch", "--set", "global_batch_size=64", "--devices", "2"]
    assert main.run([*command, "--run-dir", str(tmp_path / "run")]) == 2
    assert "Lower global_batch_size to 52 or less" in capsys.readouterr().err


def test_a_trial_makes_no_more_steps_than_it_is_told_to():
    experiment = dataclasses.replace(tiny_experiment.get_config(), stop=jaxdist.Stop(max_steps=1))
    short = trials.few_steps(experiment)
    assert (short.stop.max_steps, short.eval.every_steps, short.checkpoints.every_steps) == (1, 1, 1)


def test_a_trial_is_short_whatever_the_experiment_says():
    experiment = tiny_experiment.get_config()
    sets = {"one": experiment.data.eval, "two": experiment.data.eval}
    data = dataclasses.replace(experiment.data, eval=sets)
    stop = jaxdist.Stop(target=0.9, target_metric="eval/one/accuracy", max_epochs=1000)
    short = trials.few_steps(dataclasses.replace(experiment, data=data, stop=stop, writers=("jsonl", "tensorboard")))
    assert (short.stop.max_steps, short.stop.target, short.eval.every_steps) == (3, None, 3)
    assert [len(part) for part in short.data.eval.values()] == [min(16, len(experiment.data.eval))] * 2
    small = trials.few_steps(dataclasses.replace(short, global_batch_size=4))
    assert small.data.eval["one"].ids.tolist() == [0, 1, 2, 3]
    assert short.writers == ("jsonl",)
    without = dataclasses.replace(experiment, data=dataclasses.replace(experiment.data, eval=None))
    assert trials.few_steps(without).data.eval is None


def test_a_trial_trains_evaluates_saves_and_leaves_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(runtime, "start", lambda num_devices, threads=None: jax.devices()[:num_devices])
    assert main.run(["train", tiny_experiment.__file__, "--devices", "2", "--fast-dev-run", "--json"]) == 0
    printed = capsys.readouterr()
    made = json.loads(printed.out)
    assert (made["step"], made["end_reason"], made["checkpoint"]) == (3, "max_steps", 3)
    assert "eval/accuracy" in made["metrics"]
    assert "The trial ended well" in printed.err
    assert not list(tmp_path.glob("jaxdist-trial-*"))


@pytest.mark.parametrize("flag", ["--fast-dev-run", "--overfit-batch"])
def test_a_trial_with_a_parameter_server_is_refused(tmp_path, capsys, flag):
    command = ["train", tiny_experiment.__file__, "--run-dir", str(tmp_path / "run"), flag]
    assert main.run([*command, "--strategy", "parameter-server"]) == 2
    assert f"{flag} is for runs whose steps are made by this command's processes" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_one_batch_is_learned_at_a_constant_rate_until_the_steps_are_over():
    experiment = tiny_experiment.get_config()
    cosine = dataclasses.replace(
        experiment.optimizer, schedule=jaxdist.Schedule(name="cosine", length=2, unit="epochs")
    )
    found = trials.one_batch(dataclasses.replace(experiment, optimizer=cosine, stop=jaxdist.Stop(max_epochs=2)))
    assert (found.stop.max_steps, found.stop.max_epochs, found.optimizer.schedule.name) == (200, None, "constant")
    assert trials.one_batch(dataclasses.replace(experiment, stop=jaxdist.Stop(max_steps=7))).stop.max_steps == 7


def test_a_trial_of_a_run_that_continues_is_refused(tmp_path, capsys):
    command = ["train", tiny_experiment.__file__, "--run-dir", str(tmp_path / "run"), "--fast-dev-run", "--resume"]
    assert main.run(command) == 2
    assert "takes no --resume" in capsys.readouterr().err
