import dataclasses
import pathlib
import subprocess
import sys

import optax
import pytest
import tiny_experiment

from jaxdist.config import overrides
from jaxdist.errors import ConfigError


@pytest.fixture
def experiment():
    return tiny_experiment.get_config()


def get(experiment, path):
    for name in path.split("."):
        experiment = getattr(experiment, name)
    return experiment


@pytest.mark.parametrize(
    ("path", "text", "value"),
    [
        ("seed", "7", 7),
        ("global_batch_size", "0x20", 32),
        ("optimizer.learning_rate", "3e-4", 3e-4),
        ("optimizer.learning_rate", "1", 1.0),
        ("optimizer.schedule.name", "cosine", "cosine"),
        ("optimizer.clip_norm", "1.5", 1.5),
        ("stop.max_steps", "none", None),
        ("stop.max_steps", "None", None),
        ("stop.max_epochs", "3", 3),
        ("name", "none", "none"),
        ("data.shuffle", "false", False),
        ("reduction", "canonical", "canonical"),
        ("writers", "jsonl,csv", ("jsonl", "csv")),
        ("writers", "('csv',)", ("csv",)),
        ("writers", "()", ()),
        ("inputs", "image", "image"),
        ("inputs", "('image', 'label')", ("image", "label")),
        ("inputs", "image,label", ("image", "label")),
        ("mesh", "{'data': 2}", {"data": 2}),
        ("model.width", "24", 24),
        ("model.dropout_rate", "0.5", 0.5),
        ("checkpoints.best_metric", "eval/accuracy", "eval/accuracy"),
    ],
)
def test_an_override_is_parsed_by_the_type_of_its_field(experiment, path, text, value):
    found = get(overrides.override(experiment, [f"{path}={text}"]), path)
    assert found == value
    assert type(found) is type(value)


def test_an_override_changes_its_field_alone_and_leaves_the_experiment_as_it_was(experiment):
    changed = overrides.override(experiment, ["optimizer.schedule.warmup=5", "model.width=24", "seed=3"])
    assert experiment.model.width == 8
    assert experiment.optimizer.schedule.warmup is None
    assert dataclasses.replace(changed, seed=0, model=experiment.model, optimizer=experiment.optimizer) == experiment
    assert changed.optimizer == dataclasses.replace(
        experiment.optimizer, schedule=dataclasses.replace(experiment.optimizer.schedule, warmup=5)
    )


def test_the_last_of_two_overrides_counts(experiment):
    assert overrides.override(experiment, ["seed=1", "seed=2"]).seed == 2


REFUSED = {
    "optimizer.learnig_rate=1": r"Optimizer has no field 'learnig_rate'\. Did you mean 'learning_rate'\?",
    "optimiser.learning_rate=1": r"Experiment has no field 'optimiser'\. Did you mean 'optimizer'\?",
    "model.widht=3": r"MLP has no field 'widht'\. Did you mean 'width'\?",
    "stop.max_step=3": r"Stop has no field 'max_step'\. Did you mean 'max_steps'\?",
    "learning_rate=3": r"no field 'learning_rate'\. Did you mean 'optimizer\.learning_rate'\?",
    "max_steps=3": r"Did you mean 'stop\.max_steps'\?",
    "zzz=1": r"no field 'zzz'\. It has: name, model,",
    "model.name=x": r"MLP has no field 'name'",
    "model.parent=None": r"MLP has no field 'parent'",
    "seed.value=1": r"'seed\.value': int has no settings of its own",
    "stop.max_steps.x=1": r"int has no settings",
    "global_batch_size=many": r"global_batch_size takes a whole number; got 'many'",
    "global_batch_size=2.5": r"takes a whole number; got '2\.5'",
    "global_batch_size=": r"takes a whole number; got ''",
    "optimizer.learning_rate=fast": r"takes a number or a function; got 'fast'",
    "optimizer.learning_rate=-1": r"is refused: optimizer\.learning_rate must be at least 0; got -1\.0",
    "optimizer.schedule.name=cosin": r"takes one of constant, cosine, linear, .*; got 'cosin'",
    "precision=float8": r"takes one of float32, bfloat16, float16; got 'float8'",
    "data.shuffle=perhaps": r"data\.shuffle takes True or False",
    "writers=jsonl,xml": r"A writer is one of console, jsonl, .*got 'xml'",
    "data.train=digits": r"data\.train takes a Source",
    "data.example_fn=flip": r"data\.example_fn takes",
    "loss=classification": r"loss takes a function or None",
    "optimizer=adam": r"optimizer is a group of settings; set one of its fields: name, learning_rate,",
    "optimizer.schedule=cosine": r"optimizer\.schedule is a group of settings; set one of its fields: name, warmup",
    "model=mlp": r"model is a group of settings; set one of its fields: num_classes, width, num_layers, dropout_rate, ",
    "seed": r"NAME=VALUE.*got 'seed'",
    "=3": r"NAME=VALUE",
    "optimizer..name=sgd": r"no field ''",
}


@pytest.mark.parametrize("assignment", REFUSED)
def test_what_cannot_be_set_is_refused_with_the_way_out(experiment, assignment):
    with pytest.raises(ConfigError, match=REFUSED[assignment]) as raised:
        overrides.override(experiment, [assignment])
    assert "\n" not in str(raised.value)


def test_an_optimizer_of_optax_has_no_settings(experiment):
    ready = dataclasses.replace(experiment, optimizer=optax.sgd(0.1))
    with pytest.raises(ConfigError, match="no settings of its own"):
        overrides.override(ready, ["optimizer.learning_rate=1"])
    with pytest.raises(ConfigError, match="optimizer cannot be set on the command line; edit the experiment file"):
        overrides.override(ready, ["optimizer=adam"])


def test_a_process_that_was_prepared_does_not_look_for_plugins_again():
    code = """
from importlib import metadata
import tiny_experiment
from jaxdist.config import overrides
overrides.prepare()
metadata.distributions = lambda *_: 1 / 0
print(overrides.override(tiny_experiment.get_config(), ["seed=7"]).seed)
"""
    folder = str(pathlib.Path(tiny_experiment.__file__).parent)
    code = f"import sys; sys.path.insert(0, {folder!r}){code}"
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert made.stdout == "7\n"
