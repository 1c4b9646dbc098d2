"""Runs of real processes that are stopped, killed whole and resumed."""

import json
import pathlib
import signal
import subprocess
import sys
import time

import held_experiment
import jax
import numpy as np
import optax
import pytest
import step_lines
import tiny_experiment

from jaxdist.config import overrides
from jaxdist.paramserver.run import start
from jaxdist.run import components
from jaxdist.run.use import trained

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


@pytest.mark.parametrize("name", ["sgd", "momentum"])
def test_servers_then_all_reduce_then_servers_train_as_a_loop_of_plain_optax(tmp_path, name):
    """Each part continues from the checkpoint of the one before, in the middle of an epoch and at the end of one."""
    settings = ["model.dropout_rate=0.0", f"optimizer.name={name}", "optimizer.learning_rate=0.3"]
    alone = [sys.executable, "-m", "jaxdist.cli", "train", held_experiment.__file__, "--devices", "2", "--resume"]
    run_dir = tmp_path / "run"
    subprocess.run(command(run_dir, *settings, "ps.servers=2", steps=3), check=True)
    subprocess.run([*alone, "--run-dir", str(run_dir), "--max-steps", "8", "--set", *settings], check=True)
    subprocess.run(command(run_dir, *settings, "ps.servers=1", steps=11, flags=["--resume"]), check=True)
    made = record_of(run_dir)
    assert (made["step"], made["examples_seen"]) == (11, 2 * 52 + 3 * 16)
    experiment = overrides.override(tiny_experiment.get_config(), settings)
    parts = components.put_together(experiment, devices=jax.devices()[:1])
    params = parts.create_state().params
    optimizer = optax.sgd(0.3, momentum=0.9 if name == "momentum" else None)
    state = optimizer.init(params)

    def mean_loss(params, images, labels):
        logits = experiment.model.apply({"params": params}, images, train=False)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    for _, found in zip(range(11), parts.loader):
        rows = found.batch["mask"] > 0
        grads = jax.grad(mean_loss)(params, found.batch["image"][rows], found.batch["label"][rows])
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    served = trained.load(run_dir, "last", experiment=experiment).params
    for got, want in zip(jax.tree.leaves(served), jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=2e-6)


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
