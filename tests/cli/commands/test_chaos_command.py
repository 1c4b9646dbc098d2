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
    """What the comparison was asked for, and a result that is as `identical` says."""
    found = {"identical": True}

    def run(command, directory, **settings):
        found.update(command=command, directory=directory, **settings)
        identical = found["identical"]
        return types.SimpleNamespace(identical=identical, to_json=lambda: {"identical": identical})

    monkeypatch.setattr(chaos_command.experiment_under_fire, "run", run)
    before = signal.getsignal(signal.SIGTERM)
    yield found
    signal.signal(signal.SIGTERM, before)


def test_both_runs_are_canonical_and_keep_a_ledger(asked, tmp_path):
    arguments = ["--processes", "3", "--kills", "4", "--seed", "7", "--directory", str(tmp_path), "--set", "seed=2"]
    assert main.run(["chaos", TINY, *arguments]) == 0
    command = asked["command"]
    assert command[1:8] == ["-m", "jaxdist.cli", "train", TINY, "--processes", "3", "--reduction"]
    assert command[8] == "canonical"
    settings = command[command.index("--set") + 1 :]
    assert settings == [
        "recovery.hang_seconds=10", "seed=2", "recovery.ledger=true", "recovery.max_fruitless=1000000",
    ]  # fmt: skip
    wanted = ("directory", "seed", "num_processes", "num_examples", "kills", "stops", "starves")
    assert [asked[name] for name in wanted] == [tmp_path, 7, 3, tiny_experiment.NUM_TRAIN, 4, 1, 1]


@pytest.mark.parametrize(("identical", "status"), [(True, 0), (False, 1)])
def test_the_status_says_whether_the_runs_are_identical(asked, tmp_path, capsys, identical, status):
    asked["identical"] = identical
    assert main.run(["chaos", TINY, "--directory", str(tmp_path), "--json"]) == status
    assert json.loads(capsys.readouterr().out) == {"identical": identical}
