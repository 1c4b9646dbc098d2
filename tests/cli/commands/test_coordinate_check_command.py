"""`jaxdist coordinate-check`: what it prints and draws, and its exit status."""

import json

import jax
import pytest
import tiny_experiment

from jaxdist.cli import main
from jaxdist.launch.joining import runtime
from jaxdist.run.diagnosis import coordinate_check

COMMAND = ["coordinate-check", tiny_experiment.__file__]


@pytest.mark.parametrize(("last", "status"), [(1.0, 0), (4.0, 1)])
def test_sizes_are_printed_and_drawn_and_growth_is_a_failure(tmp_path, capsys, monkeypatch, last, status):
    sizes = {"Dense_0": [[1.0, 1.0], [1.0, last]]}
    found = coordinate_check.Coordinates([16, 32], sizes, {"Dense_0": [[0.0, 0.0], [0.5, 0.5]]})
    asked = []
    monkeypatch.setattr(runtime, "start", lambda num_devices, threads=None: jax.devices()[:1])
    monkeypatch.setattr(coordinate_check, "check", lambda experiment, devices, **more: asked.append(more) or found)
    out = tmp_path / "check.html"
    assert main.run([*COMMAND, "--widths", "16,32", "--steps", "2", "--plot", str(out)]) == status
    assert asked == [{"widths": [16, 32], "num_steps": 2}]
    assert "Dense_0" in capsys.readouterr().out
    assert "<h2>After 1 steps</h2>" in out.read_text()
    assert main.run([*COMMAND, "--json"]) == status
    assert json.loads(capsys.readouterr().out)["slopes"]["Dense_0"][0] == pytest.approx(status * 2)


def test_widths_are_whole_numbers(capsys):
    assert main.run([*COMMAND, "--widths", "16,a"]) == 2
    assert "whole numbers between commas" in capsys.readouterr().err
