"""How `jaxdist verify` shows its result; the comparison is tested with `run.use.verify`."""

import json
import types

import jax
import pytest
import tiny_experiment

from jaxdist.cli import main
from jaxdist.cli.commands import verify_command
from jaxdist.launch.joining import runtime


class Report(types.SimpleNamespace):
    def to_json(self):
        return {"kept": self.kept}

    def __str__(self):
        return "a table"


@pytest.mark.parametrize("as_json", [False, True])
@pytest.mark.parametrize(("kept", "status"), [(True, 0), (False, 1)])
def test_the_status_says_whether_the_promise_is_kept(monkeypatch, capsys, kept, status, as_json):
    asked = {}

    def verify(experiment, *, devices, num_steps):
        asked.update(devices=devices, num_steps=num_steps, seed=experiment.seed)
        print("what an experiment prints")
        return Report(kept=kept)

    monkeypatch.setattr(runtime, "start", lambda num_devices=None, threads=None: jax.devices()[: num_devices or 1])
    monkeypatch.setattr(verify_command.verification, "verify", verify)
    arguments = ["verify", tiny_experiment.__file__, "--steps", "3", "--set", "seed=9"]
    assert main.run([*arguments, *(["--json"] if as_json else ["--devices", "2"])]) == status
    out = capsys.readouterr().out
    assert json.loads(out) == {"kept": kept} if as_json else out == "what an experiment prints\na table\n"
    assert asked == {"devices": jax.devices()[: 8 if as_json else 2], "num_steps": 3, "seed": 9}
