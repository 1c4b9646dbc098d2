"""What is handed to Ray; and, marked `cluster`, a Ray of two nodes on this machine that runs it.

python -m pytest -m cluster tests/launch/engines/test_ray.py        # where ray is installed beside jaxdist
"""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import held_experiment
import pytest

from jaxdist.cli import main
from jaxdist.errors import UserError
from jaxdist.launch.engines import ray as launch_ray
from jaxdist.launch.engines.request import Request

EXPERIMENT = pathlib.Path(__file__).parents[2] / "tiny_experiment.py"


def request(**settings):
    path = pathlib.Path("/shared")
    return Request(
        name="tiny",
        experiment=path / "x.py",
        arguments=(),
        run_dir=path / "run",
        hosts=2,
        processes=3,
        settings=settings,
    )


def test_the_dry_run_says_what_each_node_must_have():
    text = launch_ray.describe(request(cpus="2", gpus="1"))
    assert "2 bundles (6 CPU, 3 GPU)" in text
    assert "jaxdist train /shared/x.py --run-dir /shared/run --restartable" in text


@pytest.mark.parametrize(("settings", "message"), [({"cpu": "1"}, "'cpu' is none of them"), ({"cpus": "x"}, "got 'x'")])
def test_settings_that_ray_does_not_have_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        launch_ray.describe(request(**settings))


def test_without_ray_or_a_cluster_the_message_says_what_to_do(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    arguments = ["launch", str(EXPERIMENT), "--engine", "ray", "--run-dir", str(tmp_path / "run")]
    assert main.run([*arguments, "--with", "address=127.0.0.1:9"]) == 2
    assert "--engine ray needs" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


CLUSTER = """
import sys
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
cluster.add_node(num_cpus=2)
print(cluster.address, flush=True)
sys.stdin.read()
cluster.shutdown()
"""


@pytest.fixture(scope="module")
def address():
    process = subprocess.Popen(
        [sys.executable, "-c", CLUSTER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    line = process.stdout.readline().strip()
    assert line, "this test needs ray beside jaxdist: pip install 'jaxdist[ray]'"
    yield line
    process.communicate(timeout=60)


def start(address, run_dir, *arguments, processes=1, experiment=EXPERIMENT):
    command = [sys.executable, "-m", "jaxdist.cli", "launch", str(experiment), "--engine", "ray", "--hosts", "2"]
    command += ["--processes", str(processes), "--devices", "2", "--reduction", "canonical", "--run-dir", str(run_dir)]
    command += [*arguments, "--with", f"address={address}"]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def ends(process):
    output, _ = process.communicate(timeout=500)
    return process.returncode, output


def alone(run_dir, *arguments):
    command = [sys.executable, "-m", "jaxdist.cli", "train", str(EXPERIMENT), "--devices", "4", "--json"]
    command += ["--reduction", "canonical", "--run-dir", str(run_dir), *arguments]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    return json.loads(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)


def wait_until(condition, seconds=400.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "this never came true"
        time.sleep(0.1)


def wait_for_lines(path, count):
    wait_until(lambda: path.exists() and path.read_text().count("\n") >= count)


def trainers(run_dir):
    """Return the numbers of the processes that train, which no launcher of the test's own has started."""
    commands = {path.parent.name: path.read_text().split("\0") for path in pathlib.Path("/proc").glob("[0-9]*/cmdline")}
    return [int(number) for number, words in commands.items() if words[1:2] == ["-c"] and str(run_dir) in words]


@pytest.mark.cluster
@pytest.mark.timeout(900)
def test_a_job_on_two_nodes_ends_in_the_bits_of_one_process(address, tmp_path):
    status, output = ends(start(address, tmp_path / "run"))
    assert status == 0, output
    made = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (made["num_processes"], made["num_devices"]) == (2, 4)
    assert made["params_sha256"] == alone(tmp_path / "alone")["params_sha256"]


@pytest.mark.cluster
@pytest.mark.timeout(900)
def test_a_process_that_is_preempted_has_the_job_started_again(address, tmp_path):
    steps, go = ["--max-steps", "40"], tmp_path / "go"
    held = held_experiment.written(tmp_path / "held.py", go)
    launched = start(address, tmp_path / "run", *steps, experiment=held)
    wait_for_lines(tmp_path / "run" / "metrics.jsonl", 3)
    first = trainers(tmp_path / "run")
    os.kill(first[0], signal.SIGUSR1)
    wait_until(lambda: (now := trainers(tmp_path / "run")) and not set(first) & set(now))
    go.touch()
    status, output = ends(launched)
    assert status == 0, output
    assert "status 75; it is restarted (attempt 2)" in output
    made = json.loads((tmp_path / "run" / "run.json").read_text())
    assert made["restarts"] == 1
    assert made["params_sha256"] == alone(tmp_path / "alone", *steps)["params_sha256"]


@pytest.mark.cluster
@pytest.mark.timeout(900)
def test_a_driver_that_is_asked_to_stop_stops_the_job(address, tmp_path):
    launched = start(address, tmp_path / "run", "--max-steps", "100000")
    wait_for_lines(tmp_path / "run" / "metrics.jsonl", 20)
    launched.send_signal(signal.SIGTERM)
    status, output = ends(launched)
    assert status == 75, output
    assert json.loads((tmp_path / "run" / "run.json").read_text())["end_reason"] == "preempted"


@pytest.mark.cluster
@pytest.mark.timeout(900)
def test_a_cluster_that_is_too_small_is_said(address, tmp_path):
    status, output = ends(start(address, tmp_path / "run", processes=50))
    assert status == 2, output
    assert "needs 2 nodes" in output
