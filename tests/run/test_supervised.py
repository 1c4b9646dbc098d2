"""What the supervisor of an experiment is told; the supervisor itself is tested in test_supervisor."""

import sys

import pytest
import run_records
import tiny_experiment

from jaxdist import errors
from jaxdist.checkpoint import checkpoints
from jaxdist.launch.supervising import hosts, supervisor
from jaxdist.run import attempt, components, supervised
from jaxdist.rundir import record


@pytest.fixture
def started(monkeypatch):
    """What the supervisor was started with."""
    found = {}

    def run(job, *, num_processes, settings):
        found.update(
            job=job, num_processes=num_processes, settings=settings, saved_step=job.saved_step(job.run_dir / "m")
        )
        job.begin()
        return 75

    monkeypatch.setattr(supervisor, "run", run)
    return found


def supervise(run_dir, **settings):
    experiment = tiny_experiment.get_config()
    return supervised.supervise(experiment, ["train", "x.py"], run_dir=run_dir, num_processes=3, **settings)


def test_the_processes_run_the_command_line(started, tmp_path):
    assert supervise(tmp_path / "run") == 75
    assert started["num_processes"] == 3
    assert started["job"].command == [sys.executable, "-m", "jaxdist.cli", "train", "x.py"]
    assert started["settings"].max_fruitless == tiny_experiment.get_config().recovery.max_fruitless
    assert started["saved_step"] == 0
    assert not started["job"].save_left


def test_what_is_left_in_memory_is_saved_only_for_the_same_experiment(started, tmp_path):
    identity = components.identity(tiny_experiment.get_config()).to_json()
    for found, expected in ((identity, True), (identity | {next(iter(identity)): "another"}, False)):
        made = record.RunRecord(**run_records.EMPTY, extra={"identity": found})
        (tmp_path / "run").mkdir(exist_ok=True)
        made.write(tmp_path / "run")
        supervise(tmp_path / "run")
        assert started["job"].save_left is expected


def test_a_checkpoint_that_is_named_becomes_the_newest_once(started, tmp_path):
    options = attempt.RunOptions(run_dir=tmp_path / "run", silent=True)
    attempt.train(tiny_experiment.get_config(), options, devices=components.jax.devices()[:1])
    supervise(tmp_path / "run", checkpoint=8)
    assert started["saved_step"] == 10  # what there was before the job began
    directory = tmp_path / "run" / "checkpoints"
    with checkpoints.Checkpointer(directory, identity=started["job"].save.__self__.identity) as checkpointer:
        assert checkpointer.steps() == [8]


def test_a_host_is_told_its_place_and_the_same_command(monkeypatch, tmp_path):
    told = {}
    monkeypatch.setattr(hosts, "run", lambda *arguments, **settings: told.update(settings, arguments=arguments) or 0)
    host = hosts.Host(index=1, count=2, coordinator="a:1", num_processes=2)
    experiment = tiny_experiment.get_config()
    assert supervised.supervise_host(experiment, ["train", "x.py"], host, run_dir=tmp_path / "run") == 0
    assert told["arguments"] == (host, [sys.executable, "-m", "jaxdist.cli", "train", "x.py"])
    assert told["run_dir"] == tmp_path / "run"


@pytest.mark.parametrize("name", ["run.json", "restarts.jsonl", "lock"])
def test_a_folder_that_has_the_name_of_a_file_of_a_run_is_named_before_a_process_starts(started, tmp_path, name):
    (tmp_path / "run" / name).mkdir(parents=True)
    with pytest.raises(errors.ConfigError, match=f"{name} is a folder"):
        supervise(tmp_path / "run")
    assert not started
