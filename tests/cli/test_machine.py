"""The machines of a parameter server that an engine started: who each is; two that a batch script starts."""

import contextlib
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import held_experiment
import pytest
import step_lines

from jaxdist.cli import machine, main
from jaxdist.errors import TryAgain, UserError
from jaxdist.launch.engines import slurm
from jaxdist.launch.engines.request import Request
from jaxdist.launch.supervising import local_job

EXPERIMENT = pathlib.Path(held_experiment.__file__)
SECONDS = 200.0
SRUN = """#!/bin/bash
shift
for index in 0 1; do SLURM_NODEID=$index "$@" > "$OUTPUT.$index" 2>&1 & children+=($!); done
for child in ${children[@]}; do wait "$child" || status=$?; done
exit ${status:-0}
"""


@pytest.mark.parametrize("variable", ["SLURM_NODEID", "JOB_COMPLETION_INDEX"])
def test_the_engine_says_which_machine_this_is(variable):
    assert machine.place({"JAXDIST_PS_HOSTS": "a,b,c", variable: "2"}) == (["a", "b", "c"], 2)
    with pytest.raises(UserError, match="needs JAXDIST_PS_HOSTS"):
        machine.place({variable: "2"})
    with pytest.raises(UserError, match=variable):
        machine.place({"JAXDIST_PS_HOSTS": "a,b,c"})


@pytest.mark.parametrize("index", [0, 1])
def test_addresses_are_taken_as_they_are_and_names_as_others_see_them(index):
    given = ["127.0.0.1", "127.0.0.2"]
    assert machine.addresses(given, index) == given
    # A name that resolves to this machine only: the address that the other one is reached from.
    named = ["127.0.0.3", "127.0.0.3"]
    named[index] = "localhost"
    assert machine.addresses(named, index)[index] == "127.0.0.1"


def test_a_machine_without_an_address_is_worth_another_attempt(capsys, monkeypatch):
    def unknown(name):
        raise socket.gaierror("no such name")

    monkeypatch.setattr(socket, "gethostbyname", unknown)
    with pytest.raises(TryAgain, match="machine 'nowhere' has no address"):
        machine.addresses(["nowhere", "127.0.0.1"], 1, timeout_seconds=0.0)
    monkeypatch.delenv("JAXDIST_PS_HOSTS", raising=False)
    assert machine.main(["train", "x.py"]) == 2
    assert "needs JAXDIST_PS_HOSTS" in capsys.readouterr().err


@contextlib.contextmanager
def running(folder, run_dir, *arguments):
    """Run the batch script of two machines, 127.0.0.1 and 127.0.0.2, as SLURM would; yield its process."""
    request = Request(
        name="tiny",
        experiment=EXPERIMENT,
        arguments=["--set", *arguments],
        run_dir=run_dir,
        hosts=2,
        parameter_server=True,
    )
    programs = {"srun": SRUN, "scontrol": '#!/bin/bash\n[ $1 = show ] && printf "127.0.0.1\\n127.0.0.2\\n"\n'}
    for name, text in programs.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    environment = os.environ | {
        "PATH": f"{folder}:{os.environ['PATH']}",
        "OUTPUT": str(folder / "output"),
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_JOB_ID": "7",
        # What SLURM says besides: the workers are not to take it for a job of theirs.
        "SLURM_NTASKS": "2",
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_NODELIST": "node[1-2]",
        "JAX_PLATFORMS": "cpu",
    }
    environment.pop("JAXDIST_PS_TOKEN", None)
    text = slurm.script(request, directory=str(folder), python=sys.executable)
    job = subprocess.Popen(["bash", "-c", text], env=environment)
    try:
        yield job
    finally:
        for number in machines_of(run_dir):  # which take their processes with them
            os.kill(number, signal.SIGKILL)
        job.wait()


def read_record(run_dir):
    return json.loads((run_dir / "run.json").read_text())


def machines_of(run_dir):
    """Return the numbers of the processes that play the machines of a run."""
    found = []
    for entry in pathlib.Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (entry / "cmdline").read_bytes().decode().split("\0")
            ours = words[0] == sys.executable and {"jaxdist.cli.machine", str(run_dir)} <= set(words)
            found += [int(entry.name)] if ours else []
    return found


def said(folder):
    """Return what the machines and their processes had to say."""
    return {path.name: path.read_text() for path in [*folder.glob("output.*"), *folder.glob("*/ps/logs/*")]}


@pytest.mark.slow
def test_two_machines_that_are_preempted_and_requeued_give_the_bits_of_one(tmp_path, monkeypatch):
    monkeypatch.setenv(held_experiment.GO, str(tmp_path / "go"))
    chosen = ["ps.workers=2", "ps.servers=2", "stop.max_steps=120"]
    chosen += ["eval.every_steps=1000", "checkpoints.every_steps=1000"]
    [first_port] = local_job.quiet_ports(1)
    run_dir = tmp_path / "two"
    with running(tmp_path, run_dir, *chosen, f"ps.port={first_port}") as job:
        while step_lines.last_step(run_dir) < 3:
            assert job.poll() is None, said(tmp_path)
            time.sleep(0.05)
        machines = machines_of(run_dir)
        assert len(machines) == 2
        for number in machines:
            os.kill(number, signal.SIGUSR1)
        assert job.wait(SECONDS) == 75, said(tmp_path)
    (tmp_path / "go").touch()
    preempted = read_record(run_dir)
    assert preempted["end_reason"] == "preempted"
    logs = {path.stem for path in (run_dir / "ps" / "logs").iterdir()}
    assert logs == {"scheduler", "server-0-a", "server-1-a", "worker-0", "worker-1"}
    with running(tmp_path, run_dir, *chosen, f"ps.port={first_port}") as job:
        assert job.wait(SECONDS) == 0, said(tmp_path)
    one = tmp_path / "one"
    arguments = ["train", str(EXPERIMENT), "--strategy", "parameter-server", "--run-dir", str(one), "--json"]
    assert main.run([*arguments, "--set", *chosen]) == 0
    resumed, undisturbed = read_record(run_dir), read_record(one)
    assert (resumed["step"], resumed["restarts"]) == (120, 1)
    assert 3 <= preempted["step"] < 120
    assert resumed["params_sha256"] == undisturbed["params_sha256"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--processes", "2"], "leave --processes out"),
        (["--hosts", "2"], "ps.hosts=ADDRESS,ADDRESS. Leave --hosts out"),
        (["--engine", "ray", "--hosts", "2"], "Leave --hosts out"),
        (["--engine", "ray", "--with", "gpus=1"], "'gpus' is none of them"),
        (["--engine", "kubernetes", "--with", "image=a", "claim=b"], "secret is missing"),
    ],
)
def test_what_a_parameter_server_cannot_be_launched_with(capsys, arguments, message):
    assert main.run(["launch", str(EXPERIMENT), "--strategy", "parameter-server", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_dry_run_shows_what_is_started(capsys, tmp_path):
    common = ["launch", str(EXPERIMENT), "--strategy", "parameter-server", "--run-dir", str(tmp_path), "--dry-run"]
    assert main.run(common) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"jaxdist train {EXPERIMENT} --strategy parameter-server")
    assert "ps.engine" not in shown
    assert main.run([*common, "--engine", "ray"]) == 0
    assert capsys.readouterr().out.endswith("--set ps.engine=ray\n")
    assert main.run([*common, "--engine", "slurm", "--hosts", "2"]) == 0
    assert "-m jaxdist.cli.machine train" in capsys.readouterr().out
