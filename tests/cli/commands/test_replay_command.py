"""How `jaxdist replay` and `jaxdist diff` show their results; what they compare is tested with `run.replay`."""

import json
import pathlib
import types

import jax
import pytest

from jaxdist.cli import main
from jaxdist.cli.commands import replay_command
from jaxdist.launch.joining import runtime


class Result(types.SimpleNamespace):
    def to_json(self):
        return {"equal": self.equal}

    def __str__(self):
        return "a sentence"


@pytest.mark.parametrize("as_json", [False, True])
@pytest.mark.parametrize(("equal", "status"), [(True, 0), (False, 1)])
def test_the_status_of_diff_says_whether_the_runs_are_equal(monkeypatch, capsys, equal, status, as_json):
    asked = []

    def compare(first, second):
        asked.extend([first, second])
        return Result(equal=equal)

    monkeypatch.setattr(replay_command.comparison, "compare", compare)
    assert main.run(["diff", "runs/a", "runs/b", *(["--json"] if as_json else [])]) == status
    out = capsys.readouterr().out
    assert json.loads(out) == {"equal": equal} if as_json else out == "a sentence\n"
    assert asked == [pathlib.Path("runs/a"), pathlib.Path("runs/b")]


@pytest.mark.parametrize(("equal", "status"), [(True, 0), (False, 1)])
def test_the_status_of_replay_says_whether_all_steps_are_identical(monkeypatch, capsys, equal, status):
    asked = {}

    def replay(run_dir, step, *, devices, experiment):
        asked.update(run_dir=run_dir, step=step, devices=len(devices), experiment=experiment)
        return Result(equal=equal, differences=[] if equal else ["one"])

    def start(num_devices, threads):
        asked["threads"] = threads()
        return jax.devices()[:num_devices]

    monkeypatch.setattr(runtime, "start", start)
    made = types.SimpleNamespace(extra={"cpu_threads": 64})
    monkeypatch.setattr(replay_command.comparison, "chain_of", lambda run_dir: (made, None))
    monkeypatch.setattr(replay_command.replaying, "replay", replay)
    assert main.run(["replay", "runs/a", "--step", "5", "--devices", "3", "--experiment", "e.py"]) == status
    assert capsys.readouterr().out == "a sentence\n"
    assert asked == {"run_dir": pathlib.Path("runs/a"), "step": 5, "devices": 3, "experiment": "e.py", "threads": 64}


def test_a_directory_without_a_run_is_the_users_mistake(tmp_path, capsys):
    assert main.run(["diff", str(tmp_path), str(tmp_path)]) == 2
    assert "holds run.json" in capsys.readouterr().err
