"""What the pipeline must show: a run that stops on one process and goes on on two is the run that never stopped."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
import tiny_experiment

from jaxdist import ledger

EXPERIMENT = pathlib.Path(tiny_experiment.__file__)


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("xla")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    return {**os.environ, "JAX_PLATFORMS": "cpu", "NPROC": "2", **cache}


def train(environment, run_dir, max_steps, *arguments):
    """Run the command line in processes of its own; return the run record."""
    command = [sys.executable, "-m", "jaxdist.cli", "train", EXPERIMENT, "--run-dir", run_dir, "--devices", 1]
    command += ["--reduction", "canonical", "--max-steps", max_steps, "--json", *arguments]
    command += ["--set", "recovery.ledger=true", "data.num_threads=2"]
    done = subprocess.run(
        list(map(str, command)), env=environment, capture_output=True, text=True, timeout=110, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def metrics(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.timeout(240)
def test_one_process_stopped_at_step_10_and_two_that_go_on_are_one_process_that_never_stopped(environment, tmp_path):
    never, stopped = tmp_path / "never", tmp_path / "stopped"
    expected = train(environment, never, 20)
    assert train(environment, stopped, 10)["step"] == 10
    made = train(environment, stopped, 20, "--resume", "--processes", 2)
    assert (expected["num_processes"], made["num_processes"], made["restarts"]) == (1, 2, 1)
    for key in ("step", "examples_seen", "params_sha256", "metrics"):
        assert made[key] == expected[key]
    entries = ledger.read(stopped)
    assert entries == ledger.read(never)
    assert ledger.check(entries, num_examples=tiny_experiment.NUM_TRAIN) == 5  # 20 steps of 16, the fourth has 4
    # Equal losses of every step, bit for bit, say that each step saw the same examples.
    assert [row for row in metrics(stopped) if "train/loss" in row] == [
        row for row in metrics(never) if "train/loss" in row
    ]
