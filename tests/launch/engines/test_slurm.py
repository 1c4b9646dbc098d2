"""The batch script; and, marked `cluster`, a SLURM of one node that runs it."""

import json
import os
import pathlib
import re
import shlex
import subprocess
import sys
import tempfile
import time

import held_experiment
import pytest
import slurm_cluster

from jaxdist.cli import main
from jaxdist.errors import UserError
from jaxdist.launch.engines import slurm
from jaxdist.launch.engines.request import Request, settings_of

EXPERIMENT = pathlib.Path(__file__).parents[2] / "tiny_experiment.py"


def request(**changes):
    values = {
        "name": "tiny",
        "experiment": pathlib.Path("/shared/my experiments/x.py"),
        "arguments": ["--devices", "2", "--set", "name=a b"],
        "run_dir": pathlib.Path("/shared/run dir"),
        "hosts": 2,
        "processes": 4,
    }
    return Request(**values | changes)


def directives(text):
    found = re.findall(r"^#SBATCH --([a-z-]+)(?:=(.*))?$", text, re.MULTILINE)
    return {name: shlex.split(value)[0] if value else "" for name, value in found}


def test_the_script_asks_for_hosts_processes_requeue_and_a_warning():
    found = directives(slurm.script(request(), directory="/shared"))
    assert (found["nodes"], found["ntasks-per-node"], found["requeue"]) == ("2", "4", "")
    assert found["signal"] == "USR1@120"  # to the tasks, not to the script


def test_what_the_processes_run_survives_quoting():
    text = slurm.script(request(), directory="/shared", python="/venv/bin/python")
    (line,) = [line for line in text.splitlines() if line.startswith("srun ")]
    assert shlex.split(line)[2:] == [
        *("/venv/bin/python", "-m", "jaxdist.cli", "train", "/shared/my experiments/x.py"),
        *("--devices", "2", "--set", "name=a b", "--run-dir", "/shared/run dir", "--restartable"),
    ]


def test_the_users_options_are_added_and_come_after_the_defaults():
    settings = settings_of(["partition=gpu", "signal=USR1@600", "comment=a; rm -rf b", "exclusive="])
    found = directives(slurm.script(request(settings=settings), directory="/"))
    assert (found["partition"], found["signal"], found["exclusive"]) == ("gpu", "USR1@600", "")
    assert found["comment"] == "a; rm -rf b"


@pytest.mark.parametrize("name", ["nodes", "output", "Partition", "-p", "x y", "a\n#SBATCH --b"])
def test_an_option_that_is_none_or_is_decided_here_is_refused(name):
    with pytest.raises(UserError, match="long options of sbatch"):
        slurm.script(request(settings={name: "1"}), directory="/")


def test_bash_can_read_the_script():
    text = slurm.script(request(), directory="/shared")
    assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0


@pytest.mark.parametrize(
    ("status", "reason", "count", "requeued"),
    [
        (75, "preempted", 0, True),
        (75, "preempted", slurm.MOST_REQUEUES, False),
        (137, "hang", 0, True),
        (1, None, 0, False),
        (2, None, 0, False),
        (0, "max_steps", 0, False),
    ],
)
def test_the_script_requeues_after_75_and_after_a_hang_and_nothing_else(tmp_path, status, reason, count, requeued):
    for name, body in {"srun": f"exit {status}", "scontrol": f'echo "$@" > {tmp_path}/asked'}.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "run.json").write_text(json.dumps({"end_reason": reason}, indent=2))
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": str(count)}
    text = slurm.script(request(run_dir=tmp_path), directory="/")
    done = subprocess.run(["bash", "-c", text], env=environment, check=False)
    assert done.returncode == status
    asked = (tmp_path / "asked").read_text() if (tmp_path / "asked").exists() else None
    assert asked == ("requeue 7\n" if requeued else None)


def test_a_machine_without_slurm_is_told_so_and_shown_the_script(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    arguments = ["launch", str(EXPERIMENT), "--engine", "slurm", "--run-dir", str(tmp_path / "run")]
    assert main.run(arguments) == 2
    assert "needs the program sbatch; this machine does not have it" in capsys.readouterr().err
    assert main.run([*arguments, "--dry-run"]) == 0
    assert capsys.readouterr().out.startswith("#!/bin/bash\n#SBATCH ")
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def cluster():
    missing = slurm_cluster.missing()
    assert not missing, f"this test needs {', '.join(missing)} (Debian: apt-get install slurm-wlm munge; run as root)"
    with (
        tempfile.TemporaryDirectory(prefix="jaxdist-slurm-") as folder,
        slurm_cluster.running(pathlib.Path(folder)) as e,
    ):
        yield {**e, "JAX_PLATFORMS": "cpu"}


TWO_PROCESSES = ("--processes", "2", "--devices", "2", "--reduction", "canonical")


def launch(environment, run_dir, *arguments, experiment=EXPERIMENT):
    command = [sys.executable, "-m", "jaxdist.cli", "launch", str(experiment), "--engine", "slurm"]
    command += ["--run-dir", str(run_dir), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def train_here(environment, run_dir, *arguments):
    """Train without SLURM; return the run record."""
    command = [sys.executable, "-m", "jaxdist.cli", "train", str(EXPERIMENT), "--run-dir", str(run_dir), "--json"]
    done = subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def job_field(environment, number, name):
    done = subprocess.run(["scontrol", "show", "job", number], env=environment, capture_output=True, text=True)
    return re.search(rf"\b{name}=(\S+)", done.stdout).group(1)


def node_state(environment):
    done = subprocess.run(["sinfo", "--noheader", "--format=%T"], env=environment, capture_output=True, text=True)
    return done.stdout.strip()


def wait_for_end(environment, number, run_dir):
    """Wait until the job is over; fails with its output if it failed."""
    # SLURM forgets a job some minutes after its end, so whatever its end is it must be seen at once.
    wait_until(lambda: job_field(environment, number, "JobState") in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT"))
    output = "\n".join(path.read_text() for path in run_dir.glob("slurm-*.log"))
    assert job_field(environment, number, "JobState") == "COMPLETED", output


def wait_until(condition, seconds=900.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "this never came true"
        time.sleep(0.2)


@pytest.mark.cluster
@pytest.mark.timeout(2000)
def test_slurm_itself_accepts_the_script(cluster, tmp_path):
    path = tmp_path / "script"
    path.write_text(launch(cluster, tmp_path / "run", *TWO_PROCESSES, "--dry-run", "--with", "time=10", "comment=a b"))
    tested = subprocess.run(["sbatch", "--test-only", path], env=cluster, capture_output=True, text=True, check=False)
    assert tested.returncode == 0, tested.stderr


@pytest.mark.cluster
@pytest.mark.timeout(2000)
def test_a_job_that_is_preempted_is_requeued_and_ends_in_the_bits_of_one_process(cluster, tmp_path):
    steps = ["--max-steps", "40"]
    run_dir, go = tmp_path / "run", tmp_path / "go"
    held = held_experiment.written(tmp_path / "held.py", go)
    launched = launch(cluster, run_dir, *TWO_PROCESSES, *steps, "--with", "time=20", experiment=held)
    number = re.match(r"SLURM job (\d+);", launched).group(1)
    metrics = run_dir / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and metrics.read_text().count("\n") >= 3)
    subprocess.run(["scancel", "--signal=USR1", number], env=cluster, check=True)
    wait_until(lambda: job_field(cluster, number, "Restarts") == "1")
    go.touch()
    # SLURM would wait two minutes. As soon as it has cleaned up it may start the job, and not before: it would fail.
    wait_until(lambda: node_state(cluster) == "idle")
    subprocess.run(["scontrol", "update", f"JobId={number}", "StartTime=now"], env=cluster, check=False)
    wait_for_end(cluster, number, run_dir)
    made = json.loads((run_dir / "run.json").read_text())
    assert (made["end_reason"], made["step"], made["restarts"]) == ("max_steps", 40, 1)
    assert (made["num_processes"], made["num_devices"]) == (2, 4)
    alone = train_here(cluster, tmp_path / "alone", "--devices", "4", "--reduction", "canonical", *steps)
    assert made["params_sha256"] == alone["params_sha256"]


@pytest.mark.cluster
@pytest.mark.timeout(2000)
def test_slurm_starts_a_parameter_server(cluster, tmp_path):
    settings = ["--strategy", "parameter-server", "--max-steps", "20", "--set", "ps.workers=2", "ps.servers=2"]
    number = re.match(r"SLURM job (\d+);", launch(cluster, tmp_path / "run", *settings, "--with", "time=20")).group(1)
    wait_for_end(cluster, number, tmp_path / "run")
    made = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (made["end_reason"], made["step"]) == ("max_steps", 20)
    assert made["params_sha256"] == train_here(cluster, tmp_path / "alone", *settings)["params_sha256"]


def test_a_directory_or_an_interpreter_of_two_lines_is_refused():
    for place in ({"directory": "/a\ntouch b"}, {"directory": "/a", "python": "python\ntouch b"}):
        with pytest.raises(UserError, match="one line of printable characters"):
            slurm.script(request(), **place)
