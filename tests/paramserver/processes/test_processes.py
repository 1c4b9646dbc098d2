"""Real processes on this machine: killed, stopped and restarted, they end in the bits of the undisturbed run."""

import contextlib
import dataclasses
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
import time

import held_experiment
import jax
import pytest
import root_experiment
import step_lines
import tiny_experiment

from jaxdist.config import overrides
from jaxdist.paramserver.processes import crew, faults, run_folder
from jaxdist.paramserver.run import start as run
from jaxdist.run import attempt
from jaxdist.rundir import record

EXPERIMENT = tiny_experiment.__file__
LIMIT_SECONDS = 600
ENGINE = "JAXDIST_TEST_ENGINE"
"""Environment variable: what places the processes; see test_ray_crew.py."""
REPLICATED = {"steps": 60, "workers": 2, "servers": 1, "durability": "replicated"}


def options(run_dir, *, steps, assignments=(), resume=False, **chosen):
    settings = [f"ps.{name}={value}" for name, value in {"dead_after_seconds": 2.0, **chosen}.items()]
    return run.Options(
        experiment=EXPERIMENT,
        run_dir=run_dir,
        assignments=[
            f"stop.max_steps={steps}",
            "eval.every_steps=1000",
            "checkpoints.every_steps=1000",
            f"ps.engine={os.environ.get(ENGINE, 'processes')}",
            *settings,
            *assignments,
        ],
        resume=resume,
        silent=True,
    )


class Mischief(threading.Thread):
    """Acts on a running job once it has finished a number of steps, and lets it go after that, if it is held."""

    def __init__(self, run_dir, deeds):
        super().__init__(daemon=True)
        self.directory, self.deeds, self.done = pathlib.Path(run_dir) / "ps", deeds, []
        self.go = pathlib.Path(run_dir) / "go"

    def steps(self):
        return step_lines.last_step(self.directory.parent)

    def run(self):
        for after, deed in self.deeds:
            while self.steps() < after:
                time.sleep(0.02)
            deed(self)
            self.done.append(after)
        self.go.touch()


def pid_of(name, directory):
    """Return the newest process that plays the part `name` in the run whose own folder is `directory`."""
    spec = str(directory / run_folder.SPEC_NAME).encode()
    for entry in sorted(pathlib.Path("/proc").glob("[0-9]*"), key=lambda path: -int(path.name)):
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if name.encode() in words and spec in words:
            return int(entry.name)
    raise AssertionError(f"no process plays {name}")


def kill(name):
    return lambda mischief: os.kill(pid_of(name, mischief.directory), signal.SIGKILL)


def signal_if_there(pid, number):
    with contextlib.suppress(ProcessLookupError):  # the run may be over
        os.kill(pid, number)


def freeze(name, seconds):
    def deed(mischief):
        pid = pid_of(name, mischief.directory)
        os.kill(pid, signal.SIGSTOP)
        threading.Timer(seconds, signal_if_there, (pid, signal.SIGCONT)).start()

    return deed


def stop(name):
    return lambda mischief: os.kill(pid_of(name, mischief.directory), signal.SIGSTOP)


def held(tmp_path, monkeypatch, deeds):
    """Hold the runs of this test until the deeds are done; return who does them."""
    mischief = Mischief(tmp_path, deeds)
    monkeypatch.setenv(held_experiment.GO, str(mischief.go))
    mischief.start()
    return mischief


def train_held(tmp_path, **chosen):
    return run.train(dataclasses.replace(options(tmp_path, **chosen), experiment=held_experiment.__file__))


def disturbed(tmp_path, monkeypatch, deeds, **chosen):
    """Train while the deeds are done; the run is held until then. Its bits are those of the tiny experiment."""
    mischief = held(tmp_path, monkeypatch, deeds)
    made = train_held(tmp_path, **chosen)
    mischief.join()
    assert len(mischief.done) == len(deeds), "the run was over before the mischief was"
    return made


@pytest.fixture(scope="module")
def calm(tmp_path_factory):
    # A process that is not heard for a minute is dead: no busy machine makes this run restart one.
    chosen = {"steps": 60, "workers": 2, "servers": 1, "dead_after_seconds": 60.0}
    return run.train(options(tmp_path_factory.mktemp("calm"), **chosen))


@pytest.mark.timeout(LIMIT_SECONDS)
def test_a_calm_run_leaves_the_record_every_run_leaves(calm):
    assert (calm.end_reason, calm.step, calm.strategy) == ("max_steps", 60, "parameter-server")
    assert calm.examples_seen == 15 * tiny_experiment.NUM_TRAIN
    assert {"train/loss", "eval/accuracy"} <= set(calm.metrics)
    assert calm.metrics["train/learning_rate"] == pytest.approx(0.1)
    assert calm.restarts == 0
    assert calm.extra["ps"]["updates"] == 60
    assert calm.extra["ps"]["staleness"] == {0: 60}


@pytest.mark.timeout(LIMIT_SECONDS)
def test_a_gradient_that_is_not_finite_is_explained_as_in_every_run(tmp_path, capsys):
    """The loss is finite, so nothing but the gradient's own check ends the run."""
    chosen = options(tmp_path / "served", steps=10, workers=2, servers=1, assignments=["model.dropout_rate=0.0"])
    made = run.train(dataclasses.replace(chosen, experiment=root_experiment.__file__))
    assert made.end_reason == "nonfinite"
    report = (tmp_path / "served" / "nonfinite.txt").read_text()
    assert report in capsys.readouterr().err
    experiment = overrides.override(root_experiment.get_config(), ["model.dropout_rate=0.0"])
    attempt.train(experiment, attempt.RunOptions(run_dir=tmp_path / "one", silent=True), devices=jax.devices()[:1])
    specification = (tmp_path / "one" / "nonfinite.txt").read_text()
    # The same step, leaf, rows and labels; the loss is that of the worker's rows.
    without_loss = [
        re.sub(r"^(worker/\d\. )?Step (\d+): the loss is .*", r"step \2", text) for text in (report, specification)
    ]
    assert without_loss[0] == without_loss[1], report


@pytest.mark.timeout(LIMIT_SECONDS)
def test_the_end_of_a_run_is_shown_as_that_of_every_run(tmp_path, capsys):
    run.train(dataclasses.replace(options(tmp_path, steps=3, workers=1, servers=1), silent=False))
    shown = capsys.readouterr()
    for line in (
        r"end reason +max_steps",
        r"eval/accuracy +0\.\d+",
        r"run record .*run\.json",
        r"checkpoint .*\(step 3\)",
    ):
        assert re.search(line, shown.out + shown.err), shown


def struck(tmp_path, monkeypatch, *lines, **chosen):
    """Train with faults, all of which must occur; return the record."""
    monkeypatch.setenv(faults.FAULTS, "\n".join(lines))
    made = run.train(options(tmp_path, **{**REPLICATED, **chosen}))
    happened = list((tmp_path / "ps" / "faults").glob("*"))
    assert len(happened) == sum(float(line.split()[3]) >= 1 for line in lines), happened
    return made


@pytest.mark.soak
@pytest.mark.timeout(LIMIT_SECONDS)
def test_killed_after_a_decision_and_before_an_answer(tmp_path, monkeypatch, calm):
    made = struck(
        tmp_path,
        monkeypatch,
        "worker/0 send Done 4 kill",
        "scheduler did CommitRecord 20 kill",
        "server/0/a send CommitAck 35 kill",
    )
    assert made.params_sha256 == calm.params_sha256
    assert made.examples_seen == calm.examples_seen
    assert made.restarts >= 3
    assert made.extra["ps"]["failovers"] >= 1


@pytest.mark.soak
@pytest.mark.timeout(LIMIT_SECONDS)
@pytest.mark.parametrize("name", ["worker/1", "server/0/a", "scheduler"])
def test_a_process_that_stood_still_comes_back_as_a_stranger(tmp_path, monkeypatch, calm, name):
    deeds = [(3, freeze(name, 6.0))]
    made = disturbed(tmp_path, monkeypatch, deeds, steps=60, workers=2, servers=1, durability="replicated")
    assert made.params_sha256 == calm.params_sha256


@pytest.mark.soak
@pytest.mark.timeout(LIMIT_SECONDS)
@pytest.mark.parametrize("name", ["worker/0", "scheduler"])
def test_a_process_that_is_stopped_for_good_is_started_again(tmp_path, monkeypatch, name):
    """Without the only worker, or without the scheduler, the run would wait forever."""
    monkeypatch.setattr(crew, "STOPPED_SECONDS", 1.0)
    made = disturbed(tmp_path, monkeypatch, [(3, stop(name))], steps=60, workers=1, servers=1)
    assert made.step == 60
    assert made.restarts == 1


@pytest.mark.soak
@pytest.mark.timeout(LIMIT_SECONDS)
def test_a_lost_shard_goes_back_to_the_snapshot_and_ends_in_the_same_bits(tmp_path, monkeypatch, calm):
    chosen = {"steps": 60, "workers": 2, "servers": 1, "durability": "snapshot", "snapshot_every": 4}
    made = disturbed(tmp_path, monkeypatch, [(6, kill("server/0/a"))], **chosen)
    assert made.params_sha256 == calm.params_sha256
    assert made.extra["ps"]["rollbacks"] == 1


@pytest.mark.soak
@pytest.mark.timeout(LIMIT_SECONDS)
def test_a_run_is_resumed_from_its_snapshot(tmp_path, calm):
    chosen = {"workers": 2, "servers": 1, "durability": "snapshot", "snapshot_every": 15}
    run.train(options(tmp_path, steps=30, **chosen))
    resumed = run.train(options(tmp_path, steps=60, resume=True, **chosen))
    assert resumed.step == 60
    assert resumed.params_sha256 == calm.params_sha256


@pytest.mark.soak
@pytest.mark.timeout(LIMIT_SECONDS)
@pytest.mark.parametrize("chosen", [{"mode": "async"}, {"mode": "bounded", "max_staleness": 2}])
def test_stale_modes_train_and_tell_their_staleness(tmp_path, chosen):
    made = run.train(options(tmp_path, steps=60, workers=3, servers=2, **chosen))
    assert made.step == 60
    assert sum(made.extra["ps"]["staleness"].values()) == 120
    assert made.metrics["eval/accuracy"] > 0.7


@pytest.mark.soak
@pytest.mark.timeout(LIMIT_SECONDS)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_no_process_outlives_its_parent(tmp_path, number):
    command = [sys.executable, "-m", "jaxdist.cli", "train", EXPERIMENT, "--run-dir", str(tmp_path), "--json"]
    command += ["--strategy", "parameter-server", "--max-steps", "100000"]
    parent = subprocess.Popen(command, start_new_session=True)
    while step_lines.last_step(tmp_path) < 5:
        assert parent.poll() is None
        time.sleep(0.1)
    spec = str(tmp_path / "ps" / "spec.json")
    parent.send_signal(number)
    parent.wait(200)
    deadline = time.monotonic() + 200
    while left := [p for p in pathlib.Path("/proc").glob("[0-9]*") if spec in command_line(p)]:
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


def command_line(entry):
    try:
        return (entry / "cmdline").read_text()
    except OSError:
        return ""


def test_the_record_can_be_read_again(calm, tmp_path):
    calm.write(tmp_path)
    assert json.loads((tmp_path / record.FILE_NAME).read_text())["ps"]["updates"] == 60
