"""Real processes: workers that join and leave a parameter server, and a lost machine, leave the bits as they are.

The experiment is held open (see held_experiment.py) until a test has seen all its changes, and `finish` lets it go.
"""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import changing_experiment
import held_experiment
import pytest
import step_lines
import tiny_experiment

from jaxdist.launch.supervising import local_job
from jaxdist.paramserver.wire.security import CERTIFICATE, KEY, ROOT, TOKEN
from jaxdist.rundir import record

COMMAND = (sys.executable, "-m", "jaxdist.cli")
STEPS = changing_experiment.STEPS
TESTS = pathlib.Path(tiny_experiment.__file__).parent
CERTIFICATES = TESTS / "paramserver" / "certificates"
TLS = {CERTIFICATE: "node.pem", KEY: "key.pem", ROOT: "root.pem"}
TLS = {name: str(CERTIFICATES / file) for name, file in TLS.items()}
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


class Commands:
    """Runs commands whose output is in files, and ends those that still run."""

    def __init__(self, folder):
        self.folder, self.running, self.go = folder, [], folder / "go"

    def start(self, *arguments, token="secret", tls=False):
        environment = {**os.environ, TOKEN: token, **(TLS if tls else {}), held_experiment.GO: str(self.go)}
        environment["PYTHONPATH"] = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
        with (self.folder / f"output-{len(self.running)}.txt").open("wb") as output:
            made = subprocess.Popen(arguments, stdout=output, stderr=output, env=environment, cwd=self.folder)
        self.running.append(made)
        return made

    def said(self, process):
        return (self.folder / f"output-{self.running.index(process)}.txt").read_text()

    def train(self, run_dir, *settings, **environment):
        fixed = ["ps.workers=2", "eval.every_steps=5000", "reduction=mean"]
        return self.start(
            *COMMAND, "train", changing_experiment.__file__, "--strategy", "parameter-server", "--run-dir",
            str(run_dir), "--set", *fixed, *settings, **environment,
        )  # fmt: skip

    def until_said(self, text, process):
        self.until(lambda: text in self.said(process), process)

    def until(self, condition, process):
        """Wait, as long as the test may take, for something that happens while the process runs."""
        while not condition():
            assert process.poll() is None, f"it ended too early: {self.said(process)}"
            time.sleep(0.05)

    def until_it_trains(self, run_dir, process):
        self.until(lambda: step_lines.last_step(run_dir) >= 2, process)

    def finish(self, run_dir, process):
        """Let the run go; return its record, of the end."""
        self.go.touch()
        assert process.wait() == 0, self.said(process)
        return record.RunRecord.read(run_dir)

    def undisturbed(self):
        """Return the hash of the params of a run of the same experiment that nothing happens to."""
        run_dir = self.folder / "undisturbed"
        return self.finish(run_dir, self.train(run_dir)).params_sha256


@pytest.fixture
def commands(tmp_path):
    made = Commands(tmp_path)
    yield made
    for process in made.running:
        process.kill()
        process.wait()


def in_mode(mode):
    settings = [f"ps.mode={mode}", f"recovery.ledger={mode == 'sync'}"]
    return [*settings, *(["ps.max_staleness=2"] if mode == "bounded" else [])]


def check(commands, mode, found):
    """Check that no example was lost, and no bit where the workers wait for each other."""
    assert found.step == STEPS
    if mode == "sync":
        assert found.params_sha256 == commands.undisturbed()
    else:
        assert found.examples_seen == STEPS // 4 * tiny_experiment.NUM_TRAIN


@pytest.mark.parametrize("mode", ["sync", "bounded", "async"])
def test_workers_join_and_leave_in_every_way(tmp_path, commands, mode):
    run_dir = tmp_path / "run"
    train = commands.train(run_dir, *in_mode(mode))
    commands.until_it_trains(run_dir, train)
    first = commands.start(*COMMAND, "join", str(run_dir))
    commands.until_said("Worker 2 joins", train)
    second = commands.start(*COMMAND, "join", str(run_dir), "--processes", "2")
    commands.until_said("Worker 4 joins", train)
    assert commands.start(*COMMAND, "leave", str(run_dir)).wait() == 0
    commands.until_said("Worker 4 is gone", train)
    first.send_signal(signal.SIGTERM)
    assert first.wait() == 0
    second.kill()
    commands.until_said("Worker 3 is gone", train)
    found = commands.finish(run_dir, train)
    assert [row["kind"] for row in found.extra["changes"]] == ["join", "join", "join", "leave", "leave", "leave"]
    assert sum(found.extra["ps"]["staleness"].values()) == STEPS
    check(commands, mode, found)


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


def test_the_processes_of_a_machine_that_is_lost_run_on_the_other(tmp_path, commands):
    run_dir = tmp_path / "run"
    [port] = local_job.quiet_ports(1)
    train = commands.train(run_dir, "ps.hosts=127.0.0.1,127.0.0.2", f"ps.port={port}", "ps.durability=replicated")
    module = "jaxdist.paramserver.processes.machines"
    machine = commands.start(sys.executable, "-m", module, str(run_dir), "127.0.0.2")
    commands.until_it_trains(run_dir, train)
    machine.kill()
    commands.until_said("The machine 127.0.0.2 is lost. Its processes run on the others", train)
    check(commands, "sync", commands.finish(run_dir, train))
    assert len(list((run_dir / "ps" / "addresses").glob("*.address"))) == 2


def test_another_machine_joins_by_address_and_token(tmp_path, commands):
    run_dir = tmp_path / "run"
    [port] = local_job.quiet_ports(1)
    train = commands.train(run_dir, "ps.hosts=127.0.0.1", f"ps.port={port}")
    commands.until_it_trains(run_dir, train)
    address = commands.said(train).split("jaxdist join ")[1].split()[0]
    wrong = commands.start(*COMMAND, "join", address, token="wrong")
    assert wrong.wait() == 2
    assert "did not accept the token" in commands.said(wrong)
    copy = tmp_path / "copied.py"
    copy.write_text(pathlib.Path(changing_experiment.__file__).read_text() + "\n# changed\n")
    other = commands.start(*COMMAND, "join", address, "--experiment", str(copy))
    assert other.wait() == 2
    assert "experiment file is" in commands.said(other)
    copy.write_text(pathlib.Path(changing_experiment.__file__).read_text())
    joined = commands.start(*COMMAND, "join", address, "--experiment", str(copy))
    commands.until_said("Worker 2 joins", train)
    found = commands.finish(run_dir, train)
    assert joined.wait() == 0
    check(commands, "sync", found)
    late = commands.start(*COMMAND, "join", address)
    assert late.wait() == 2
    assert "cannot be reached" in commands.said(late)


@pytest.mark.parametrize("mode", ["sync", "bounded", "async"])
def test_machines_join_with_certificates_alone(tmp_path, commands, mode):
    """By the address with their own certificates, and by the directory with those of the run."""
    run_dir = tmp_path / "run"
    [port] = local_job.quiet_ports(1)
    hosts = ["ps.hosts=127.0.0.1", f"ps.port={port}"]
    train = commands.train(run_dir, *hosts, *in_mode(mode), token="", tls=True)
    commands.until_it_trains(run_dir, train)
    address = commands.said(train).split("jaxdist join ")[1].split()[0]
    plain = commands.start(*COMMAND, "join", address, token="secret")
    there = commands.start(*COMMAND, "join", address, token="", tls=True)
    here = commands.start(*COMMAND, "join", str(run_dir), token="")
    assert plain.wait() == 2
    assert "or certificates where it has some" in commands.said(plain)
    for number in (2, 3):
        commands.until_said(f"Worker {number} joins", train)
    there.send_signal(signal.SIGTERM)
    assert there.wait() == 0
    found = commands.finish(run_dir, train)
    assert here.wait() == 0
    check(commands, mode, found)
