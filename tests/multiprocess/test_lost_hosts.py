"""Several hosts, each a supervisor and its processes on the loopback interface; one is killed with all that is its."""

import contextlib
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import changing_experiment
import held_experiment
import jax
import pytest

from jaxdist.launch.supervising import job_memory, local_job, restart_events
from jaxdist.run import attempt
from jaxdist.rundir import ledger, record

EXPERIMENT = pathlib.Path(changing_experiment.__file__)
SECONDS = 600.0


class Job:
    """A job on simulated hosts: each has processes, a directory in memory and an address of its own."""

    def __init__(self, stack, folder, count, *arguments):
        self.run_dir, self._stack, self._folder, self._count, self._arguments = folder / "run", stack, folder, count, []
        self._arguments = list(map(str, arguments))
        [self._port] = local_job.quiet_ports(1)
        self.supervisors = {}
        stack.callback(self.forget)
        for host in range(count):
            self.start(host)

    def start(self, host):
        command = [sys.executable, "-m", "jaxdist.cli", "launch", str(EXPERIMENT), "--hosts", str(self._count)]
        command += ["--host-index", str(host), "--coordinator", f"127.0.0.1:{self._port}", "--processes", "1"]
        command += ["--run-dir", str(self.run_dir), *self._arguments]
        with open(self._folder / f"host-{host}.log", "ab") as log:
            self.supervisors[host] = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        self._stack.callback(self.kill, host)

    def events(self, host):
        return restart_events.read_events(self.run_dir if host == 0 else self.run_dir / f"host-{host}")

    def kill(self, host):
        """Kill the supervisor of a host and all its processes at once, and wait until they are gone."""
        children = [number for event in self.events(host)[-1:] for number in event.get("process_ids", [])]
        self.supervisors[host].kill()
        for number in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
        self.supervisors[host].wait(60)

    def forget(self):
        """Remove the snapshots in memory that killed hosts have left."""
        for memory in job_memory.left_behind(self.run_dir):
            shutil.rmtree(memory)

    def log(self):
        return "\n".join(path.read_text() for path in sorted(self._folder.glob("host-*.log")))

    def await_step(self, step):
        """Return the newest step, once it is `step` or a later one."""
        return self.await_that(lambda: (found := self.newest_step()) >= step and found)

    def newest_step(self):
        with contextlib.suppress(OSError, ValueError, IndexError):
            lines = (self.run_dir / "metrics.jsonl").read_text().splitlines()
            return json.loads(lines[-1])["step"]
        return 0

    def hosts(self):
        """Return the hosts of the running attempt, by what one of them has noted."""
        starts = [event for host in self.supervisors for event in self.events(host) if event["event"] == "start"]
        return sorted(max(starts, key=lambda event: event["time"])["hosts"]) if starts else []

    def await_that(self, found):
        end = time.monotonic() + SECONDS
        while not (result := found()):
            assert time.monotonic() < end, self.log()
            time.sleep(0.05)
        return result

    def finish(self, hosts):
        assert [self.supervisors[host].wait(SECONDS) for host in hosts] == [0] * len(hosts), self.log()
        return record.RunRecord.read(self.run_dir)


@pytest.fixture
def go(tmp_path, monkeypatch):
    monkeypatch.setenv(held_experiment.GO, str(tmp_path / "go"))
    monkeypatch.setenv("PYTHONPATH", str(EXPERIMENT.parents[1]), prepend=":")
    return tmp_path / "go"


def params_of_one_device(folder):
    options = attempt.RunOptions(run_dir=folder, silent=True)
    return attempt.train(changing_experiment.get_config(), options, devices=jax.devices()[:1]).params_sha256


def check(job, made, tmp_path):
    assert (made.end_reason, made.step) == ("max_steps", changing_experiment.STEPS)
    ledger.check(ledger.read(job.run_dir), num_examples=52)
    assert [path.name for path in (job.run_dir / "checkpoints").glob("[0-9]*")] == [str(changing_experiment.STEPS)], (
        "from memory alone"
    )
    assert made.params_sha256 == params_of_one_device(tmp_path / "alone")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("strategy", ["data-parallel", "fsdp"])
@pytest.mark.parametrize("lost", [0, 1])
def test_a_host_that_is_lost_takes_nothing_along_and_the_other_goes_on(tmp_path, go, lost, strategy):
    left = 1 - lost
    with contextlib.ExitStack() as stack:
        job = Job(stack, tmp_path, 2, "--strategy", strategy, "--set", "log_every=1", "recovery.snapshot_every=1")
        reached = job.await_step(5)
        job.kill(lost)
        job.await_that(lambda: job.hosts() == [left])
        starts = [event for event in job.events(left) if event["event"] == "end"]
        assert starts[-1]["saved"] >= reached - 3, "both hosts had the state of a few steps ago"
        go.touch()
        made = job.finish([left])
    check(job, made, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_of_three_hosts_two_are_lost_one_after_the_other_and_one_comes_back(tmp_path, go):
    with contextlib.ExitStack() as stack:
        job = Job(stack, tmp_path, 3, "--set", "log_every=1", "recovery.snapshot_every=1")
        job.kill(job.await_step(5) and 2)
        job.await_that(lambda: job.hosts() == [0, 1])
        job.kill(job.await_step(job.newest_step() + 3) and 0)
        job.await_that(lambda: job.hosts() == [1])
        job.await_step(job.newest_step() + 3)
        job.start(2)
        job.await_that(lambda: job.hosts() == [1, 2])
        go.touch()
        made = job.finish([1, 2])
    check(job, made, tmp_path)
