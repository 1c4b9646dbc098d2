"""Every experiment of the repository, run very small, as the README says."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import cifar10_builder
import jax
import pytest

from jaxdist.cli import main, selected_experiment
from jaxdist.launch.joining import runtime

ROOT = pathlib.Path(__file__).parents[1]
EXPERIMENTS = ROOT / "experiments"

TINY = {
    "bpe_gpt": ["model.num_layers=1", "model.width=16", "model.num_heads=2", "optimizer.schedule.warmup=1"],
    "breast_cancer": ["model.width=4"],
    "diabetes": ["model.width=4"],
    "bytes_gpt": ["model.num_layers=1", "model.width=16", "model.num_heads=2", "optimizer.schedule.warmup=1"],
    "digits_cnn": ["model.width=4", "model.num_stages=1"],
    "digits_mlp": ["model.width=16", "model.num_layers=1"],
    "digits_resnet": ["model.width=4", "model.stage_sizes=(1,)"],
    "digits_tfds": ["model.width=4", "model.num_stages=1"],
    "tones_cnn": ["model.width=2", "model.num_stages=1"],
}
TEXT = dict.fromkeys(("bpe_gpt", "bytes_gpt"), "bits_per_byte")
METRICS = dict.fromkeys(TINY, "accuracy") | TEXT | {"diabetes": "absolute_error"}


def names():
    """Return the files that are experiments: those with a get_config."""
    return {path.stem for path in EXPERIMENTS.glob("*.py") if "def get_config" in path.read_text()}


class FirstExamples:
    """A source's first examples: evaluating all that is held out would take longer than the training here."""

    def __init__(self, source):
        self.source = source

    def __len__(self):
        return 20

    def __getitem__(self, index):
        return self.source[index]

    def fingerprint(self):
        return self.source.fingerprint()


def with_little_held_out(experiment):
    few = dataclasses.replace(experiment.data, eval=FirstExamples(experiment.data.eval))
    return dataclasses.replace(experiment, data=few)


def test_every_experiment_is_run_here():
    assert names() == {*TINY, "cifar10_resnet"}, "add the experiment to TINY, with settings that make it tiny"


FAST = ("breast_cancer", "bytes_gpt", "digits_cnn")


@pytest.mark.parametrize(
    "name", [*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in sorted(TINY.keys() - FAST))]
)
def test_an_experiment_trains_tiny(name, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(runtime, "start", lambda num_devices=None, threads=None: jax.devices()[: num_devices or 1])
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    load = selected_experiment.load
    monkeypatch.setattr(selected_experiment, "load", lambda options: with_little_held_out(load(options)))
    arguments = ["--devices", "2", "--max-steps", "2", "--set", *TINY[name], "global_batch_size=16"]
    run_dir = ["--run-dir", str(tmp_path / "run"), "--json"]
    assert main.run(["train", str(EXPERIMENTS / f"{name}.py"), *arguments, *run_dir]) == 0
    made = json.loads(capsys.readouterr().out)
    assert (made["end_reason"], made["step"], made["examples_seen"]) == ("max_steps", 2, 32)
    for metric in ("loss", METRICS[name]):
        assert made["metrics"][f"train/{metric}"] > 0 or metric == "accuracy"
        assert f"eval/{metric}" in made["metrics"]


def run_script(tmp_path, name, *arguments, **environment):
    return subprocess.run(
        [sys.executable, str(EXPERIMENTS / f"{name}.py"), *arguments, "--run-dir", str(tmp_path / "run"), "--json"],
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
        env={**os.environ, "JAX_PLATFORMS": "cpu", **environment},
        cwd=tmp_path,
    )


@pytest.mark.slow
def test_cifar10_is_trained_on_where_it_is_prepared_and_asked_for_where_it_is_not(tmp_path):
    arguments = ["--max-steps", "2", "--set", "model.width=4", "model.stage_sizes=(1,)", "global_batch_size=16"]
    absent = run_script(tmp_path, "cifar10_resnet", *arguments, TFDS_DATA_DIR=str(tmp_path / "tfds"))
    assert (absent.returncode, absent.stdout) == (2, "")
    assert "tfds build cifar10 --file_format=array_record" in absent.stderr
    assert "Traceback" not in absent.stderr
    assert not (tmp_path / "run").exists()
    cifar10_builder.prepare(tmp_path / "tfds")
    present = run_script(tmp_path, "cifar10_resnet", *arguments, TFDS_DATA_DIR=str(tmp_path / "tfds"))
    assert present.returncode == 0, present.stderr
    made = json.loads(present.stdout)
    assert (made["step"], made["examples_seen"]) == (2, 32)
    assert "eval/accuracy" in made["metrics"]


@pytest.mark.slow
def test_an_experiment_runs_as_a_script_and_resumes(tmp_path):
    """From any directory, and `python X.py` does what `jaxdist train X.py` does: one resumes the other's run."""
    first = run_script(tmp_path, "digits_mlp", "--devices", "2", "--max-steps", "2")
    assert first.returncode == 0, first.stderr
    made = json.loads(first.stdout)
    assert (made["step"], made["num_devices"], made["config"]["name"]) == (2, 2, "digits_mlp")
    script = str(EXPERIMENTS / "digits_mlp.py")
    arguments = ["--max-steps", "3", "--resume", "--json", "--run-dir", str(tmp_path / "run")]
    again = subprocess.run(
        [sys.executable, "-m", "jaxdist.cli", "train", script, *arguments],
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    assert again.returncode == 0, again.stderr
    assert (json.loads(again.stdout)["step"], json.loads(again.stdout)["restarts"]) == (3, 1)


@pytest.mark.soak
def test_the_demo_reaches_its_target(tmp_path):
    done = run_script(tmp_path, "digits_cnn", "--devices", "8")
    made = json.loads(done.stdout)
    assert (done.returncode, made["end_reason"]) == (0, "target_reached")
    assert made["metrics"]["eval/accuracy"] >= 0.985
