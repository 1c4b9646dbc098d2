"""Whole runs on streams: one that is stopped and continues on two processes ends in the bits of one that is not."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import pytest
import stream_experiment

from jaxdist.cli import main
from jaxdist.launch.joining import runtime
from jaxdist.rundir import ledger

EXPERIMENT = pathlib.Path(stream_experiment.__file__)


def command(run_dir, max_steps, *arguments):
    options = ["train", EXPERIMENT, "--run-dir", run_dir, "--devices", 1, "--reduction", "canonical"]
    options += ["--max-steps", max_steps, "--json", *arguments]
    return [*map(str, options), "--set", "recovery.ledger=true"]


@pytest.mark.parametrize(
    "kind", [pytest.param("sized", marks=pytest.mark.slow), pytest.param("endless", marks=pytest.mark.soak)]
)
@pytest.mark.timeout(240)
def test_a_stream_that_is_stopped_and_continues_on_two_processes_gives_the_same_bits(kind, tmp_path, monkeypatch):
    never, stopped = tmp_path / "never", tmp_path / "stopped"
    monkeypatch.setenv("STREAM_KIND", kind)
    monkeypatch.setattr(runtime, "start", lambda num_devices=None: jax.devices()[: num_devices or 1])
    assert main.run(command(never, 20)) == 0
    assert main.run(command(stopped, 10)) == 0

    two = [sys.executable, "-m", "jaxdist.cli", *command(stopped, 20, "--resume", "--processes", 2)]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "NPROC": "2"}
    done = subprocess.run(two, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    expected, made = json.loads((never / "run.json").read_text()), json.loads(done.stdout)
    assert (expected["num_processes"], made["num_processes"]) == (1, 2)
    for key in ("step", "examples_seen", "params_sha256", "metrics"):
        assert made[key] == expected[key]
    assert ledger.check(ledger.read(stopped), num_examples=52) == 5


def test_the_experiment_has_the_examples_of_the_tiny_one(monkeypatch):
    monkeypatch.setenv("STREAM_KIND", "sized")
    made = stream_experiment.get_config().data
    assert (len(made.train), len(made.eval)) == (52, 21)
    assert made.train[30]["label"] == stream_experiment.TRAIN[30]["label"]
