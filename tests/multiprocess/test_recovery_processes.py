"""With real processes: a run that is killed or stopped continues, and ends with the same bits."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from jaxdist.launch.supervising import restart_events
from jaxdist.rundir import record

EXPERIMENT = pathlib.Path(__file__).parents[1] / "tiny_experiment.py"


def jaxdist(*arguments):
    command = [sys.executable, "-m", "jaxdist.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=580, check=False)


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "strikes",
    [
        {"kills": 2},
        pytest.param({"stops": 1}, marks=pytest.mark.soak),
        pytest.param({"starves": 1}, marks=pytest.mark.soak),
    ],
)
def test_a_run_with_faults_makes_the_model_of_an_undisturbed_run(tmp_path, strikes):
    wanted = {"kills": 0, "stops": 0, "starves": 0} | strikes
    flags = [text for name, count in wanted.items() for text in (f"--{name}", count)]
    done = jaxdist(
        "chaos", EXPERIMENT, "--processes", 2, "--devices", 1, "--seed", 3, "--directory", tmp_path, "--json", *flags,
        "--max-steps", 800, "--set", "recovery.hang_seconds=4", "checkpoints.every_steps=80",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert report["identical"]
    # The run may be over before the moment of the last strike.
    assert report["restarts"] >= sum(report["strikes"].values()) >= 1
    assert record.RunRecord.read(tmp_path / "disturbed").restarts == report["restarts"]
    if "stops" in strikes:
        output = (tmp_path / "disturbed" / "output.txt").read_text()
        logs = "".join(path.read_text() for path in tmp_path.glob("disturbed/logs/*/*.log"))
        assert "The job hangs: process" in output + logs
        assert "no report for" in output + logs


@pytest.mark.timeout(300)
@pytest.mark.parametrize("strategy", ["data-parallel", "zero1"])
def test_a_restart_runs_the_programs_that_the_attempt_before_has_traced(tmp_path, monkeypatch, strategy):
    notes, run_dir = tmp_path / "traced.txt", tmp_path / "run"
    monkeypatch.setenv("JAXDIST_TEST_TRACED", str(notes))
    tests = pathlib.Path(__file__).parents[1]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tests), os.environ.get("PYTHONPATH", "")]))
    done = jaxdist(
        "train", pathlib.Path(__file__).with_name("traced_experiment.py"), "--processes", 2, "--devices", 1,
        "--strategy", strategy, "--run-dir", run_dir,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    started = [event for event in restart_events.read_events(run_dir) if event["event"] == "start"]
    traced = set(map(int, notes.read_text().split()))
    assert len(started) == 2
    assert traced & set(started[0]["process_ids"])
    assert not traced & set(started[1]["process_ids"])
