"""`jaxdist train --dry-run`: prints, writes nothing, and refuses what has no effect on it."""

import json

import jax
import pytest
import tiny_experiment

from jaxdist.cli import main
from jaxdist.launch.joining import runtime


def test_a_dry_run_prints_sizes_and_leaves_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(runtime, "start", lambda num_devices, threads=None: jax.devices()[:num_devices])
    monkeypatch.chdir(tmp_path)
    assert main.run(["train", tiny_experiment.__file__, "--devices", "2", "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["title"] == "tiny: 2 devices (data 2), data-parallel, mean"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--run-dir", "x"], "so --run-dir has no effect"),
        (["--resume"], "so --resume has no effect"),
        (["--processes", "2"], "so --processes has no effect"),
        (["--strategy", "parameter-server"], "a parameter server's run has several"),
        (["--set", "writers=mlfow"], "mlfow"),
    ],
)
def test_what_has_no_effect_is_refused(capsys, monkeypatch, more, message):
    monkeypatch.setattr(runtime, "start", lambda num_devices, threads=None: jax.devices()[:1])
    assert main.run(["train", tiny_experiment.__file__, "--dry-run", *more]) == 2
    assert message in capsys.readouterr().err
