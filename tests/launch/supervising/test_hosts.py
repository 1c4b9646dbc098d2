"""The part of one host; and, marked `root`, two hosts: network namespaces joined by a cable that can be cut.

python -m pytest -m root tests/launch/supervising/test_hosts.py        # as root, with iproute2
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import held_experiment
import pytest

from jaxdist.config.experiment import Recovery
from jaxdist.errors import UserError
from jaxdist.launch.joining import places
from jaxdist.launch.supervising import hosts as supervising_hosts
from jaxdist.launch.supervising import restart_events, restart_policy
from jaxdist.launch.supervising.several_hosts import taking_part

EXPERIMENT = pathlib.Path(__file__).parents[2] / "tiny_experiment.py"
ADDRESSES = ("10.213.7.1", "10.213.7.2")
PORT = 7640


def test_each_host_numbers_its_processes_after_those_of_the_hosts_before():
    host = supervising_hosts.Host(index=2, count=3, coordinator="first:1", num_processes=4)
    members = taking_part.Members(4, {1: "b:2", 0: "a:1", 2: "c:3"}, "second:7")
    assert host.environment(members) == {
        places.MEETING: "second:7",
        places.FIRST: "8",
        places.ALL: "12",
        supervising_hosts.NEIGHBOUR: "b:2",
    }
    left = dataclasses.replace(members, hosts={2: "c:3"})
    assert host.environment(left) == {places.MEETING: "second:7", places.FIRST: "0", places.ALL: "4"}
    for index in (-1, 3):
        with pytest.raises(UserError, match=f"from 0; got {index} of 3"):
            supervising_hosts.Host(index=index, count=3, coordinator="first:1", num_processes=4)


ONE_HOST = """
import json, os, pathlib, sys
run_dir = pathlib.Path(sys.argv[1])
with open(run_dir / "seen", "a") as file:
    file.write(os.environ["JAXDIST_PROCESS_ID"] + "\\n")
sys.exit(9 if (run_dir / "seen").read_text().count("\\n") < 3 else 0)
"""


def test_the_processes_of_a_host_are_restarted_until_they_end_well(tmp_path, capfd, monkeypatch):
    host = supervising_hosts.Host(index=0, count=1, coordinator="127.0.0.1:1", num_processes=1)
    monkeypatch.setattr(restart_policy, "FIRST_DELAY_SECONDS", 0.01)
    command = [sys.executable, "-c", ONE_HOST, str(tmp_path)]
    settings = Recovery(min_processes=None)
    saved = supervising_hosts.Saved(identity="a", newest_step=lambda memory: 0)
    assert supervising_hosts.run(host, command, run_dir=tmp_path, saved=saved, settings=settings) == 0
    ends = [event["status"] for event in restart_events.read_events(tmp_path) if event["event"] == "end"]
    assert ends == [9, 9, 0]
    assert "The job ended with status 9; it continues from step 0 in 0.01 s." in capfd.readouterr().err


def ip(*arguments):
    return subprocess.run(["ip", *arguments], capture_output=True, text=True, check=True).stdout


@pytest.fixture
def hosts():
    """Yield the names of two namespaces; the cable's ends are called eth0."""
    assert os.geteuid() == 0, "this test makes network namespaces; run it as root"
    assert shutil.which("ip"), "this test needs the program ip (Debian: apt-get install iproute2)"
    names = [f"jaxdist-{os.getpid()}-{number}" for number in range(2)]
    with contextlib.ExitStack() as stack:
        for name in names:
            ip("netns", "add", name)
            stack.callback(ip, "netns", "delete", name)
        ip("link", "add", "eth0", "netns", names[0], "type", "veth", "peer", "name", "eth0", "netns", names[1])
        for name, address in zip(names, ADDRESSES):
            ip("-n", name, "address", "add", f"{address}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", "eth0", "up")
        yield names


def start(hosts, index, run_dir, *arguments, experiment=EXPERIMENT):
    command = ["ip", "netns", "exec", hosts[index], sys.executable, "-m", "jaxdist.cli", "launch", str(experiment)]
    command += ["--hosts", "2", "--host-index", str(index), "--coordinator", f"{ADDRESSES[0]}:{PORT}"]
    command += ["--devices", "2", "--reduction", "canonical", "--run-dir", str(run_dir), *arguments]
    log = open(run_dir.parent / f"host-{index}.log", "w")  # noqa: SIM115 - the process keeps it
    with log:
        return subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, "JAX_PLATFORMS": "cpu"}
        )


def finish(process, seconds=600):
    try:
        return process.wait(timeout=seconds)
    finally:
        process.kill()


def wait_for_lines(path, count, seconds=300.0):
    deadline = time.monotonic() + seconds
    while not path.exists() or path.read_text().count("\n") < count:
        assert time.monotonic() < deadline, f"{path} does not grow to {count} lines"
        time.sleep(0.1)


def listeners(host):
    """Return the addresses, without ports, at which processes in a namespace listen."""
    lines = ip("netns", "exec", host, "ss", "-ltnH").splitlines()
    return {line.split()[3].rpartition(":")[0].strip("[]").removeprefix("::ffff:") for line in lines}


def logs(run_dir):
    return "\n".join(path.read_text() for path in sorted(run_dir.parent.glob("host-*.log")))


def alone(run_dir, *arguments):
    command = [sys.executable, "-m", "jaxdist.cli", "train", str(EXPERIMENT), "--devices", "4", "--json"]
    command += ["--reduction", "canonical", "--run-dir", str(run_dir), *arguments]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    return json.loads(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)


@pytest.mark.root
@pytest.mark.timeout(1500)
def test_a_job_goes_on_after_the_cable_between_its_hosts_was_cut_and_mended(hosts, tmp_path):
    run_dir, go = tmp_path / "run", tmp_path / "go"
    held = held_experiment.written(tmp_path / "held.py", go)
    settings = ["--max-steps", "40", "--set", "recovery.hang_seconds=10", "recovery.max_fruitless=20"]
    both = [start(hosts, index, run_dir, *settings, experiment=held) for index in range(2)]
    try:
        wait_for_lines(run_dir / "metrics.jsonl", 3)
        assert [listeners(host) for host in hosts] == [{ADDRESSES[0]}, {ADDRESSES[1]}]
        ip("-n", hosts[1], "link", "set", "eth0", "down")
        wait_for_lines(run_dir / "restarts.jsonl", 2)  # the attempt has ended on host 0
        wait_for_lines(run_dir / "host-1" / "restarts.jsonl", 2)
        ip("-n", hosts[1], "link", "set", "eth0", "up")
        go.touch()
        assert [finish(process) for process in both] == [0, 0], logs(run_dir)
    finally:
        for process in both:
            process.kill()
    made = json.loads((run_dir / "run.json").read_text())
    assert (made["end_reason"], made["step"], made["num_processes"]) == ("max_steps", 40, 2)
    assert made["restarts"] >= 1
    assert made["params_sha256"] == alone(tmp_path / "alone", "--max-steps", "40")["params_sha256"]


@pytest.mark.root
@pytest.mark.timeout(900)
def test_a_host_that_is_asked_to_stop_stops_the_job_on_all(hosts, tmp_path):
    run_dir = tmp_path / "run"
    both = [start(hosts, index, run_dir, "--max-steps", "100000") for index in range(2)]
    try:
        wait_for_lines(run_dir / "metrics.jsonl", 20)
        both[1].send_signal(signal.SIGTERM)
        assert [finish(process, 120) for process in both] == [75, 75], logs(run_dir)
    finally:
        for process in both:
            process.kill()
    assert json.loads((run_dir / "run.json").read_text())["end_reason"] == "preempted"


@pytest.mark.root
@pytest.mark.timeout(300)
def test_a_host_that_cannot_be_reached_is_named_in_bounded_time(hosts, tmp_path):
    ip("-n", hosts[1], "link", "set", "eth0", "down")
    place = {"JAX_COORDINATOR_ADDRESS": f"{ADDRESSES[0]}:{PORT}", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}
    command = ["ip", "netns", "exec", hosts[1], sys.executable, "-m", "jaxdist.cli", "train", str(EXPERIMENT)]
    environment = {**os.environ, **place, "JAX_PLATFORMS": "cpu", "JAXDIST_CONNECT_SECONDS": "5"}
    done = subprocess.run(
        [*command, "--run-dir", str(tmp_path / "run")], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 75, done.stderr
    assert f"could not reach the coordinator at {ADDRESSES[0]}:{PORT}" in done.stderr
    assert "Network is unreachable" in done.stderr
