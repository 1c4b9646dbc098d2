"""A run that stops on one process and continues on two reads what a run that never stopped reads."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import pytest
import tiny_experiment

from jaxdist.cli import main
from jaxdist.launch.joining import runtime
from jaxdist.rundir import ledger

EXPERIMENT = pathlib.Path(tiny_experiment.__file__)


def command(run_dir, max_steps, *arguments):
    options = ["train", EXPERIMENT, "--run-dir", run_dir, "--devices", 1, "--reduction", "canonical"]
    options += ["--max-steps", max_steps, "--json", *arguments]
    return [*map(str, options), "--set", "recovery.ledger=true", "data.num_threads=2"]


def losses(run_dir):
    rows = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return {row["step"]: row["train/loss"] for row in rows if "train/loss" in row}


@pytest.mark.timeout(240)
@pytest.mark.slow
def test_one_process_stopped_at_step_10_and_two_that_go_on_are_one_process_that_never_stopped(tmp_path, monkeypatch):
    never, stopped = tmp_path / "never", tmp_path / "stopped"
    monkeypatch.setattr(runtime, "start", lambda num_devices=None, threads=None: jax.devices()[: num_devices or 1])
    assert main.run(command(never, 20)) == 0
    assert main.run(command(stopped, 10)) == 0
    assert list(losses(stopped)) == list(range(1, 11))

    two = [sys.executable, "-m", "jaxdist.cli", *command(stopped, 20, "--resume", "--processes", 2)]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "NPROC": "2"}
    done = subprocess.run(two, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    expected, made = json.loads((never / "run.json").read_text()), json.loads(done.stdout)
    assert (expected["num_processes"], made["num_processes"], made["restarts"]) == (1, 2, 1)
    for key in ("step", "examples_seen", "params_sha256", "metrics"):
        assert made[key] == expected[key]
    entries = ledger.read(stopped)
    assert entries == ledger.read(never)
    assert ledger.check(entries, num_examples=tiny_experiment.NUM_TRAIN) == 5  # 20 steps of 16, the fourth has 4
    # Equal losses of every step, bit for bit, say that each step saw the same examples.
    assert losses(stopped) == losses(never)
    assert list(losses(never)) == list(range(1, 21))
