"""A secret given by --set is in no command line, no environment and no file of the run and its processes."""

import contextlib
import pathlib

import ending_jobs
import pytest

SECRET = "tell-no-one-7265"
EXPERIMENT = f"""
import dataclasses
import sys

sys.path.insert(0, {str(ending_jobs.EXPERIMENT.parent)!r})
import tiny_experiment
from jaxdist.models import mlp


class Model(mlp.MLP):
    hub_token: str = ""

    def __call__(self, x, *, train):
        assert sum(map(ord, self.hub_token)) == {sum(map(ord, SECRET))}, "the processes get the value"
        return super().__call__(x, train=train)


def get_config():
    model = Model(num_classes=2, width=8, num_layers=1)
    return dataclasses.replace(tiny_experiment.get_config(), model=model)
"""
PARAMETER_SERVER = ("--strategy", "parameter-server", "--set", "ps.workers=1", "ps.servers=1")


@pytest.mark.soak
@pytest.mark.parametrize(("arguments", "processes"), [((), 2), (PARAMETER_SERVER, 0)], ids=["all-reduce", "servers"])
def test_a_secret_is_on_no_command_line_and_in_no_file(tmp_path, arguments, processes):
    experiment = tmp_path / "secretive.py"
    experiment.write_text(EXPERIMENT)
    arguments = [*arguments, "--set", f"model.hub_token={SECRET}"]
    with ending_jobs.starting(tmp_path) as start:
        job = start(*arguments, experiment=experiment, processes=processes, save_every=100)
        metrics = job.run_dir / "metrics.jsonl"
        seen = job.wait_for(lambda: metrics.exists() and metrics.read_text() and commands(job), "a step")
        assert len(seen) > 3
        assert not [text for text in seen.values() if SECRET in text]
        job.process.terminate()
        assert job.end() == 75, job.text()
    holding = [path for path in job.run_dir.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]
    assert not holding
    assert SECRET not in job.text()


def commands(job):
    """Return the command lines and environments of a job's processes, by process: the job and what descends from it."""
    ours = ending_jobs.descendants(job.process.pid)
    with contextlib.suppress(OSError):
        return {n: "".join(pathlib.Path(f"/proc/{n}/{f}").read_text() for f in ("cmdline", "environ")) for n in ours}
    return {}
