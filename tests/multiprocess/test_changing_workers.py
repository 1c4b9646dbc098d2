"""Real processes: workers that join and leave a parameter server, and a lost machine, leave the bits as they are."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
import step_lines
import tiny_experiment

from jaxdist.launch.supervising import local_job
from jaxdist.paramserver.wire.security import CERTIFICATE, KEY, ROOT, TOKEN
from jaxdist.rundir import record

COMMAND = (sys.executable, "-m", "jaxdist.cli")
STEPS = 1500
CERTIFICATES = pathlib.Path(__file__).parents[1] / "paramserver" / "certificates"
TLS = {CERTIFICATE: "node.pem", KEY: "key.pem", ROOT: "root.pem"}
TLS = {name: str(CERTIFICATES / file) for name, file in TLS.items()}
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


class Commands:
    """Runs commands whose output is in files, and ends those that still run."""

    def __init__(self, folder):
        self.folder, self.running = folder, []

    def start(self, *arguments, token="secret", tls=False):
        environment = {**os.environ, TOKEN: token, **(TLS if tls else {})}
        with (self.folder / f"output-{len(self.running)}.txt").open("wb") as output:
            made = subprocess.Popen(arguments, stdout=output, stderr=output, env=environment, cwd=self.folder)
        self.running.append(made)
        return made

    def said(self, process):
        return (self.folder / f"output-{self.running.index(process)}.txt").read_text()

    def train(self, run_dir, *settings, steps=STEPS, **environment):
        fixed = [f"stop.max_steps={steps}", "eval.every_steps=5000", "checkpoints.every_steps=5000", "log_every=500"]
        fixed += ["ps.dead_after_seconds=2"]
        return self.start(
            *COMMAND, "train", tiny_experiment.__file__, "--strategy", "parameter-server", "--run-dir", str(run_dir),
            "--set", *fixed, *settings, **environment,
        )  # fmt: skip


@pytest.fixture
def commands(tmp_path):
    made = Commands(tmp_path)
    yield made
    for process in made.running:
        process.kill()
        process.wait()


def until(condition, process):
    deadline = time.monotonic() + 240
    while not condition():
        assert process.poll() is None, "the run was over too early"
        assert time.monotonic() < deadline
        time.sleep(0.05)


def made_to(run_dir, step):
    return lambda: step_lines.last_step(run_dir) >= step


@pytest.fixture
def calm(tmp_path, commands):
    assert commands.train(tmp_path / "calm", "ps.workers=2").wait() == 0
    return record.RunRecord.read(tmp_path / "calm")


@pytest.mark.parametrize("mode", ["sync", "bounded", "async"])
def test_workers_join_and_leave_in_every_way(request, tmp_path, commands, mode):
    run_dir = tmp_path / "run"
    steps = STEPS if mode == "sync" else 8 * STEPS  # workers that do not wait for each other make many more a second
    staleness = ["ps.max_staleness=2"] if mode == "bounded" else []
    train = commands.train(run_dir, "ps.workers=2", f"ps.mode={mode}", *staleness, steps=steps)
    until(made_to(run_dir, 20), train)
    first = commands.start(*COMMAND, "join", str(run_dir))
    until(lambda: "Worker 2 joins" in commands.said(train), train)
    second = commands.start(*COMMAND, "join", str(run_dir), "--processes", "2")
    until(lambda: "Worker 4 joins" in commands.said(train), train)
    assert commands.start(*COMMAND, "leave", str(run_dir)).wait() == 0
    until(lambda: "Worker 4 is gone" in commands.said(train), train)
    first.send_signal(signal.SIGTERM)
    assert first.wait() == 0
    second.kill()
    until(lambda: "Worker 3 is gone" in commands.said(train), train)
    assert train.wait() == 0
    found = record.RunRecord.read(run_dir)
    assert [row["kind"] for row in found.extra["changes"]] == ["join", "join", "join", "leave", "leave", "leave"]
    assert found.step == steps
    assert sum(found.extra["ps"]["staleness"].values()) == steps
    if mode == "sync":
        assert found.params_sha256 == request.getfixturevalue("calm").params_sha256
    else:
        assert found.examples_seen == steps // 4 * tiny_experiment.NUM_TRAIN


def test_processes_of_every_role_are_struck_and_workers_change(tmp_path, commands):
    counts = ["--kills", "4", "--stops", "1", "--starves", "0", "--joins", "1", "--leaves", "1", "--seed", "2"]
    chaos = commands.start(
        *COMMAND, "chaos", tiny_experiment.__file__, "--strategy", "parameter-server", *counts, "--json", "--directory",
        str(tmp_path / "both"), "--max-steps", str(STEPS), "--set", "eval.every_steps=50000",
        "checkpoints.every_steps=500", "log_every=500",
    )  # fmt: skip
    assert chaos.wait() == 0, commands.said(chaos)
    report = json.loads(commands.said(chaos))
    assert report["identical"]
    assert report["ledger"] == "exact"
    assert {"worker/0", "worker/1", "server/0/a", "server/0/b"} & set(report["struck"]), report
    assert report["restarts"] >= report["strikes"]["kill"]
    assert "timeline.svg" in os.listdir(tmp_path / "both" / "disturbed")


def test_the_processes_of_a_machine_that_is_lost_run_on_the_other(tmp_path, commands, calm):
    run_dir = tmp_path / "run"
    [port] = local_job.quiet_ports(1)
    hosts = ["ps.hosts=127.0.0.1,127.0.0.2", f"ps.port={port}", "ps.workers=2", "ps.durability=replicated"]
    train = commands.train(run_dir, *hosts, steps=STEPS)
    module = "jaxdist.paramserver.processes.machines"
    machine = commands.start(sys.executable, "-m", module, str(run_dir), "127.0.0.2")
    until(made_to(run_dir, 20), train)
    machine.kill()
    until(lambda: "The machine 127.0.0.2 is lost. Its processes run on the others" in commands.said(train), train)
    assert train.wait() == 0
    found = record.RunRecord.read(run_dir)
    assert found.params_sha256 == calm.params_sha256
    assert len(list((run_dir / "ps" / "addresses").glob("*.address"))) == 2


def test_another_machine_joins_by_address_and_token(tmp_path, commands, calm):
    run_dir = tmp_path / "run"
    [port] = local_job.quiet_ports(1)
    train = commands.train(run_dir, "ps.hosts=127.0.0.1", f"ps.port={port}", "ps.workers=2")
    until(made_to(run_dir, 20), train)
    address = commands.said(train).split("jaxdist join ")[1].split()[0]
    wrong = commands.start(*COMMAND, "join", address, token="wrong")
    assert wrong.wait() == 2
    assert "did not accept the token" in commands.said(wrong)
    copy = tmp_path / "copied.py"
    copy.write_text(pathlib.Path(tiny_experiment.__file__).read_text() + "\n# changed\n")
    other = commands.start(*COMMAND, "join", address, "--experiment", str(copy))
    assert other.wait() == 2
    assert "experiment file is" in commands.said(other)
    copy.write_text(pathlib.Path(tiny_experiment.__file__).read_text())
    joined = commands.start(*COMMAND, "join", address, "--experiment", str(copy))
    until(lambda: "Worker 2 joins" in commands.said(train), train)
    assert train.wait() == 0
    assert joined.wait() == 0
    assert record.RunRecord.read(run_dir).params_sha256 == calm.params_sha256
    late = commands.start(*COMMAND, "join", address)
    assert late.wait() == 2
    assert "cannot be reached" in commands.said(late)


@pytest.mark.parametrize("mode", ["sync", "bounded", "async"])
def test_machines_join_with_certificates_alone(request, tmp_path, commands, mode):
    """By the address with their own certificates, and by the directory with those of the run."""
    run_dir = tmp_path / "run"
    [port] = local_job.quiet_ports(1)
    steps = STEPS if mode == "sync" else 4 * STEPS
    chosen = ["ps.hosts=127.0.0.1", f"ps.port={port}", "ps.workers=2", f"ps.mode={mode}"]
    chosen += ["ps.max_staleness=2"] if mode == "bounded" else []
    train = commands.train(run_dir, *chosen, steps=steps, token="", tls=True)
    until(made_to(run_dir, 20), train)
    address = commands.said(train).split("jaxdist join ")[1].split()[0]
    plain = commands.start(*COMMAND, "join", address, token="secret")
    there = commands.start(*COMMAND, "join", address, token="", tls=True)
    here = commands.start(*COMMAND, "join", str(run_dir), token="")
    assert plain.wait() == 2
    assert "or certificates where it has some" in commands.said(plain)
    until(lambda: all(f"Worker {number} joins" in commands.said(train) for number in (2, 3)), train)
    there.send_signal(signal.SIGTERM)
    assert there.wait() == 0
    assert train.wait() == 0
    assert here.wait() == 0
    found = record.RunRecord.read(run_dir)
    assert found.step == steps
    if mode == "sync":
        assert found.params_sha256 == request.getfixturevalue("calm").params_sha256
    else:
        assert found.examples_seen == steps // 4 * tiny_experiment.NUM_TRAIN
