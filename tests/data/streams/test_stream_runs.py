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
@pytest.mark.timeout(900)
def test_a_stream_that_is_stopped_and_continues_on_two_processes_gives_the_same_bits(kind, tmp_path, monkeypatch):
    never, stopped = tmp_path / "never", tmp_path / "stopped"
    monkeypatch.setenv("STREAM_KIND", kind)
    monkeypatch.setattr(runtime, "start", lambda num_devices=None, threads=None: jax.devices()[: num_devices or 1])
    assert main.run(command(never, 20)) == 0
    assert main.run(command(stopped, 10)) == 0

    two = [sys.executable, "-m", "jaxdist.cli", *command(stopped, 20, "--resume", "--processes", 2)]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "NPROC": "2"}
    done = subprocess.run(two, env=environment, capture_output=True, text=True, timeout=400, check=False)
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


def losses_of(run_dir):
    rows = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return {row["step"]: row["train/loss"] for row in rows if "train/loss" in row}


@pytest.mark.soak
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("kind", ["sized", "endless"])
def test_a_parameter_server_trains_on_the_examples_of_a_stream_also_after_a_stop(kind, tmp_path, monkeypatch):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "NPROC": "2", "STREAM_KIND": kind}

    def train(name, max_steps, *arguments):
        options = ["--run-dir", str(tmp_path / name), "--devices", "1", "--max-steps", str(max_steps), "--json"]
        options += ["--set", "model.dropout_rate=0.0", "guards.check_replicas_every=0", *arguments]
        command = [sys.executable, "-m", "jaxdist.cli", "train", str(EXPERIMENT), *options]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    servers = (
        "--strategy",
        "parameter-server",
        "--set",
        "ps.workers=2",
        "ps.servers=2",
        "ps.durability=snapshot",
        "ps.snapshot_every=2",
    )
    whole, served = train("whole", 11), train("served", 11, *servers)
    train("stopped", 6, *servers)
    resumed = train("stopped", 11, *servers, "--resume")
    assert whole["examples_seen"] == served["examples_seen"] == resumed["examples_seen"] == 2 * 52 + 3 * 16
    expected = losses_of(tmp_path / "whole")
    for name in ("served", "stopped"):
        found = losses_of(tmp_path / name)
        assert found.keys() == expected.keys()
        assert all(abs(found[step] - expected[step]) < 1e-4 for step in expected), (found, expected)


@pytest.mark.soak
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("kind", ["sized", "endless"])
def test_kills_stops_joins_and_leaves_at_random_change_nothing_of_a_run_on_a_stream(kind, tmp_path):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "NPROC": "2", "STREAM_KIND": kind}
    plan = ["--kills", "2", "--stops", "1", "--starves", "0", "--joins", "1", "--leaves", "1", "--seed", "3"]
    command = [
        sys.executable,
        "-m",
        "jaxdist.cli",
        "chaos",
        str(EXPERIMENT),
        *plan,
        "--max-steps",
        "120",
        "--devices",
        "1",
    ]
    done = subprocess.run(
        [*command, "--directory", str(tmp_path), "--json"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=2300,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
