import argparse
import dataclasses
import uuid

import jax
import pytest
import tiny_experiment

from jaxdist.cli import main, parser, remote_runs
from jaxdist.config.parameter_server import ParameterServer
from jaxdist.errors import ExitStatus, UserError
from jaxdist.launch.joining import runtime
from jaxdist.rundir.remote import working_copy
from jaxdist.rundir.remote.run_address import Address


@pytest.fixture(autouse=True)
def copies(tmp_path, monkeypatch):
    monkeypatch.setenv(working_copy.FOLDER_VARIABLE, str(tmp_path / "copies"))
    monkeypatch.setenv(working_copy.PATIENCE_VARIABLE, "60")


def options(run_dir, **more):
    given = {"resume": False, "command": "jaxdist train x.py", "engine": None, "hosts": 1, "host_index": None}
    return argparse.Namespace(run_dir=run_dir, **{**given, **more})


def address():
    return Address(f"memory://{uuid.uuid4().hex}/run")


def write_record(options):
    options.run_dir.mkdir(parents=True)
    (options.run_dir / "run.json").write_text("{}")


def test_training_gets_a_working_copy_where_the_directory_is_remote(tmp_path):
    seen = []

    def begin(given):
        write_record(given)
        seen.append(given.run_dir)
        return ExitStatus.RETRY

    assert remote_runs.train(options(address()), begin) == ExitStatus.RETRY
    assert remote_runs.train(options(tmp_path / "local"), begin) == ExitStatus.RETRY
    assert seen[0].is_relative_to(tmp_path / "copies")
    assert seen[1] == tmp_path / "local"


@pytest.mark.parametrize(("status", "then"), [(0, ExitStatus.FAILED), (75, ExitStatus.RETRY), (1, ExitStatus.FAILED)])
def test_a_run_that_is_not_uploaded_does_not_end_well(status, then, monkeypatch, capsys):
    monkeypatch.setattr("jaxdist.rundir.remote.mirror.Mirror.start", lambda self: None)
    monkeypatch.setattr("jaxdist.rundir.remote.mirror.Mirror.finish", lambda self, **_: False)

    def begin(given):
        write_record(given)
        return status

    assert remote_runs.train(options(address()), begin) == then
    assert "It is whole in" in capsys.readouterr().err


def test_processes_that_would_not_share_the_copy_are_refused(monkeypatch):
    tiny = tiny_experiment.get_config()
    for more in ({"engine": "slurm"}, {"hosts": 2}, {"host_index": 0}):
        with pytest.raises(UserError, match="share a run directory"):
            remote_runs.check_launch(options(address(), **more), tiny)
    remote_runs.check_launch(options(address()), tiny)
    with pytest.raises(UserError, match="share a run directory"):
        remote_runs.check_launch(options(address()), dataclasses.replace(tiny, strategy="parameter-server"))
    on_hosts = dataclasses.replace(tiny, ps=ParameterServer(hosts=("a", "b")))
    remote_runs.check_servers(on_hosts)
    monkeypatch.setenv(working_copy.ADDRESS_VARIABLE, str(address()))
    with pytest.raises(UserError, match="share a run directory"):
        remote_runs.check_servers(on_hosts)
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    monkeypatch.setenv("JAX_PROCESS_ID", "0")
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "127.0.0.1:1")
    with pytest.raises(UserError, match="share a run directory"):
        remote_runs.train(options(address()), write_record)


@pytest.mark.parametrize("words", [["leave", "s3://b/a"], ["join", "s3://b/a"]])
def test_commands_that_need_a_directory_on_this_machine_refuse_an_address(words, capsys):
    with pytest.raises(SystemExit):
        parser.make_parser().parse_args(words)
    assert "on this machine is needed; got 's3://b/a'" in capsys.readouterr().err


@pytest.mark.usefixtures("shared_compilations")
def test_steps_of_a_run_are_compared_and_computed_again_at_its_address(monkeypatch, capsys):
    monkeypatch.setattr(runtime, "start", lambda num_devices=None, threads=None: jax.devices()[: num_devices or 1])
    folder = f"memory://{uuid.uuid4().hex}"
    canonical = ["--reduction", "canonical", "--max-steps", "3", "--set", "logical_shards=4", "data.eval=None"]
    for name, seed in (("a", 1), ("same", 1), ("other", 2)):
        command = ["train", tiny_experiment.__file__, "--run-dir", f"{folder}/{name}", *canonical, f"seed={seed}"]
        assert main.run(command) == ExitStatus.OK
    capsys.readouterr()
    assert main.run(["diff", f"{folder}/a", f"{folder}/same"]) == ExitStatus.OK
    assert "Equal: the same bits in steps 1 to 3" in capsys.readouterr().out
    assert main.run(["diff", f"{folder}/a", f"{folder}/other"]) == ExitStatus.FAILED
    assert "step 1" in capsys.readouterr().out.lower()
    assert main.run(["replay", f"{folder}/a", "--step", "2", "--devices", "2"]) == ExitStatus.OK
    assert "Step 2 is identical" in capsys.readouterr().out
