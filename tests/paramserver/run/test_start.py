"""Runs of real processes that are stopped, killed whole and resumed."""

import json
import pathlib
import signal
import subprocess
import sys
import time

import held_experiment
import pytest
import step_lines
import tiny_experiment

from jaxdist.paramserver.run import start

pytestmark = [pytest.mark.soak, pytest.mark.timeout(600)]


def command(run_dir, *settings, steps=40, flags=()):
    start = [sys.executable, "-m", "jaxdist.cli", "train", held_experiment.__file__, "--strategy", "parameter-server"]
    start += ["--run-dir", str(run_dir), "--max-steps", str(steps), "--json", *flags]
    return [*start, "--set", "eval.every_steps=1000", "checkpoints.every_steps=4", "ps.workers=2", *settings]


def record_of(run_dir):
    return json.loads((pathlib.Path(run_dir) / "run.json").read_text())


def wait_for_steps(process, run_dir, count):
    while step_lines.last_step(run_dir) < count:
        assert process.poll() is None, "the run was over before the mischief was"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def calm(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("calm") / "run"
    subprocess.run(command(run_dir), check=True)
    return record_of(run_dir)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGKILL, -9), (signal.SIGINT, 75), (signal.SIGTERM, 75)])
def test_a_run_that_was_stopped_resumes_on_other_servers_with_the_same_bits(
    tmp_path, monkeypatch, calm, number, status
):
    run_dir, go = tmp_path / "run", tmp_path / "go"
    monkeypatch.setenv(held_experiment.GO, str(go))
    process = subprocess.Popen(command(run_dir, "ps.servers=1", steps=40))
    wait_for_steps(process, run_dir, 6)
    process.send_signal(number)
    assert process.wait() == status
    go.touch()
    assert record_of(run_dir)["end_reason"] == (None if number == signal.SIGKILL else "preempted")
    subprocess.run(command(run_dir, "ps.servers=3", flags=["--resume"]), check=True)
    resumed = record_of(run_dir)
    assert (resumed["params_sha256"], resumed["step"]) == (calm["params_sha256"], 40)
    assert resumed["examples_seen"] == calm["examples_seen"]


def test_a_run_that_begins_with_weights_has_the_bits_of_one_device(tmp_path):
    alone = [sys.executable, "-m", "jaxdist.cli", "train", tiny_experiment.__file__, "--devices", "1", "--json"]
    subprocess.run([*alone, "--run-dir", str(tmp_path / "first"), "--max-steps", "5"], check=True)
    settings = [f"init_from={tmp_path / 'first'}", "model.dropout_rate=0.0", "optimizer.name=sgd"]
    subprocess.run([*alone, "--run-dir", str(tmp_path / "one"), "--max-steps", "4", "--set", *settings], check=True)
    subprocess.run(command(tmp_path / "served", *settings, "ps.workers=1", "ps.servers=2", steps=4), check=True)
    one, served = record_of(tmp_path / "one"), record_of(tmp_path / "served")
    assert served["params_sha256"] == one["params_sha256"]
    assert served["init_from"] == one["init_from"]
    assert served["init_from"]["source"] == f"{tmp_path / 'first'}, step 5"


@pytest.mark.parametrize(
    ("setting", "message"),
    [("ps.hosts=10.1.2.3", "needs authentication, got 10.1.2.3"), ("ps.port=65534", "The last port is 65535")],
)
def test_hosts_that_cannot_be_are_refused_before_there_is_a_run_directory(tmp_path, monkeypatch, setting, message):
    monkeypatch.delenv(start.TOKEN, raising=False)
    assignments = ["ps.hosts=127.0.0.1", setting]
    with pytest.raises(ValueError, match=message):
        start.train(
            start.Options(experiment=tiny_experiment.__file__, run_dir=tmp_path / "run", assignments=assignments)
        )
    assert not (tmp_path / "run").exists()
