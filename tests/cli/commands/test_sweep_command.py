"""`jaxdist sweep`: what it prints, its exit status, and, slowly, real trials, workers and a sweep that is killed."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time

import jax
import pytest
import tiny_experiment
from reported_runs import write_run

from jaxdist import errors
from jaxdist.cli import main
from jaxdist.launch.joining import runtime
from jaxdist.run import attempt
from jaxdist.run.sweeps import sweep_record
from jaxdist.rundir import record

OVER = ["--over", "optimizer.learning_rate=0.3,0.1", "model.width=8,4"]
COMMAND = ["sweep", tiny_experiment.__file__, "--metric", "eval/accuracy", "--mode", "max"]


@pytest.fixture
def recorded(monkeypatch):
    """Trials write a run at once; their accuracy is the learning rate over the width."""
    trained = []

    def train(experiment, options, *, devices):
        trained.append(options.run_dir.name)
        assert options.source.hashes[os.path.basename(tiny_experiment.__file__)]  # as of a run of `train`
        if experiment.model.width == 7:
            raise errors.UserError("7 is no width.")
        value = experiment.optimizer.learning_rate / experiment.model.width
        write_run(options.run_dir, metrics={"eval/accuracy": value}, command=options.command)
        return record.RunRecord.read(options.run_dir)

    monkeypatch.setattr(attempt, "train", train)
    monkeypatch.setattr(runtime, "start", lambda num_devices, threads=None: jax.devices()[: num_devices or 1])
    return trained


def test_a_sweep_prints_a_ranking_and_the_command_of_the_best(tmp_path, capsys, recorded):
    sweep_dir = tmp_path / "sweep"
    command = [*COMMAND, *OVER, "--set", "seed=3", "--devices", "2", "--sweep-dir", str(sweep_dir)]
    assert main.run(command) == 0
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert lines[0].split() == ["rank", "learning_rate", "width", "eval/accuracy", "step", "ended", "seconds", "trial"]
    assert lines[1].split()[:4] == ["1", "0.3", "4", "0.075"]
    assert max(map(len, lines[:5])) <= 80
    again = (
        f"jaxdist train {tiny_experiment.__file__} --devices 2 --set seed=3 optimizer.learning_rate=0.3 model.width=4"
    )
    assert f"The best again:  {again}" in lines
    assert printed.err.count("jaxdist: trial ") == 4
    assert len(recorded) == 4
    assert main.run(command) == 2
    assert "Continue it with --resume" in capsys.readouterr().err
    assert main.run([*command, "--resume", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [trial["rank"] if "rank" in trial else trial["number"] for trial in found["trials"]] == [2, 0, 3, 1]
    assert found["best"]["command"] == again
    assert found["best"]["run_dir"] == str(sweep_dir / recorded[2])
    assert len(recorded) == 4  # none of them again


def test_a_refused_trial_does_not_end_a_sweep_and_nothing_stays_where_all_are_refused(tmp_path, capsys, recorded):
    def sweep(*values, to):
        return main.run([*COMMAND, "--over", f"model.width={','.join(values)}", "--sweep-dir", str(tmp_path / to)])

    assert sweep("7", "8", to="some") == 0
    assert "width=7: refused. 7 is no width." in capsys.readouterr().err
    assert sweep("7", to="none") == 2
    assert not (tmp_path / "none").exists()


def test_a_mistake_is_one_message_and_leaves_nothing(tmp_path, capsys, recorded):
    assert main.run([*COMMAND, "--over", "model.width=4,4", "--sweep-dir", str(tmp_path / "s")]) == 2
    assert (
        capsys.readouterr().err
        == "jaxdist: --over names each value once; 4 and 4 are the same model.width. Remove one.\n"
    )
    assert list(tmp_path.iterdir()) == []
    assert recorded == []


@contextlib.contextmanager
def started(sweep_dir, *more):
    command = [sys.executable, "-m", "jaxdist.cli", *COMMAND, *OVER, "--max-steps", "40", "--sweep-dir", str(sweep_dir)]
    with subprocess.Popen([*command, *more], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            yield process
        finally:
            process.kill()


def ended(sweep_dir):
    trials = sweep_record.Sweep.read(sweep_dir).trials if sweep_record.is_sweep(sweep_dir) else []
    return {trial.name for trial in trials if sweep_record.is_over(sweep_dir, trial)}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The params of each trial of a sweep that nothing disturbed."""
    sweep_dir = tmp_path_factory.mktemp("sweep") / "whole"
    with started(sweep_dir) as process:
        assert process.wait(200) == 0
    return {path.name: record.RunRecord.read(path).params_sha256 for path in sweep_record.run_dirs(sweep_dir)}


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["1", "2"])
def test_a_killed_sweep_goes_on_with_what_is_left_in_the_same_bits(tmp_path, undisturbed, parallel):
    with started(tmp_path / "s", "--parallel", parallel) as first:
        deadline = time.monotonic() + 200
        while not ended(tmp_path / "s") and time.monotonic() < deadline:
            time.sleep(0.05)  # looks at files of a process that says nothing
        os.kill(first.pid, signal.SIGKILL)

    def written():
        return {name: (tmp_path / "s" / name / record.FILE_NAME).stat().st_mtime_ns for name in before}

    before = ended(tmp_path / "s")
    times = written()
    with started(tmp_path / "s", "--parallel", parallel, "--resume", "--json") as second:
        out, err = second.communicate(timeout=200)
        assert second.returncode == 0, err
    assert len(json.loads(out)["trials"]) == 4
    assert written() == times
    for name, sha256 in undisturbed.items():
        assert record.RunRecord.read(tmp_path / "s" / name).params_sha256 == sha256
