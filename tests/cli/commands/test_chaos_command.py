"""What `jaxdist chaos` runs, and how its result is shown; the strikes themselves are tested in test_chaos."""

import json
import signal
import types

import pytest
import tiny_experiment

from jaxdist.cli import main
from jaxdist.cli.commands import chaos_command

TINY = tiny_experiment.__file__


@pytest.fixture
def asked(monkeypatch):
    """What the chaos_runs was asked for, and a result that is as `identical` says."""
    found = {"identical": True}

    def run(command, directory, **settings):
        found.update(command=command, directory=directory, **settings)
        identical = found["identical"]
        return types.SimpleNamespace(proves=identical, to_json=lambda: {"identical": identical})

    monkeypatch.setattr(chaos_command.chaos_runs, "run", run)
    before = signal.getsignal(signal.SIGTERM)
    yield found
    signal.signal(signal.SIGTERM, before)


def test_both_runs_are_canonical_and_keep_a_ledger(asked, tmp_path):
    arguments = ["--processes", "3", "--kills", "4", "--seed", "7", "--directory", str(tmp_path), "--set", "seed=2"]
    assert main.run(["chaos", TINY, *arguments]) == 0
    command = asked["command"]
    assert command[1:7] == ["-m", "jaxdist.cli", "train", TINY, "--reduction", "canonical"]
    assert command[-2:] == ["--processes", "3"]
    settings = command[command.index("--set") + 1 : -2]
    assert settings == [
        "recovery.hang_seconds=10", "seed=2", "recovery.ledger=true", "recovery.max_fruitless=1000000",
    ]  # fmt: skip
    wanted = ("directory", "seed", "num_processes", "num_examples")
    assert [asked[name] for name in wanted] == [tmp_path, 7, 3, tiny_experiment.NUM_TRAIN]
    assert asked["counts"] == {"kills": 4, "stops": 1, "starves": 1, "joins": 0, "leaves": 0}


@pytest.mark.parametrize(("identical", "status"), [(True, 0), (False, 1)])
def test_the_status_says_whether_the_runs_are_identical(asked, tmp_path, capsys, identical, status):
    asked["identical"] = identical
    assert main.run(["chaos", TINY, "--directory", str(tmp_path), "--json"]) == status
    assert json.loads(capsys.readouterr().out) == {"identical": identical}


def test_a_parameter_server_survives_every_death_by_default(asked, tmp_path):
    arguments = ["--strategy", "parameter-server", "--directory", str(tmp_path), "--set", "ps.snapshot_every=9"]
    assert main.run(["chaos", TINY, *arguments]) == 0
    assert "--processes" not in asked["command"]
    settings = asked["command"][asked["command"].index("--set") + 1 :]
    assert settings[:3] == ["ps.durability=replicated", "ps.dead_after_seconds=2", "ps.snapshot_every=9"]
    assert (asked["num_processes"], asked["num_changing"]) == (5, 2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["ps.mode=async"], "which only sync mode keeps; got ps.mode=async"),
        (["ps.snapshot_every=0"], "Chaos may kill both copies of a shard"),
        (["ps.hosts=10.0.0.1"], "Chaos kills processes of this machine"),
        (["ps.workers=0"], "workers must be at least 1"),
    ],
)
def test_a_parameter_server_that_cannot_be_compared_is_refused(asked, tmp_path, capsys, settings, message):
    arguments = ["--strategy", "parameter-server", "--directory", str(tmp_path / "new"), "--set", *settings]
    assert main.run(["chaos", TINY, *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_processes_of_a_parameter_server_are_counted_by_role(asked, capsys):
    assert main.run(["chaos", TINY, "--strategy", "parameter-server", "--processes", "2"]) == 2
    assert "leave --processes out" in capsys.readouterr().err
