"""`jaxdist lr-range`: what it prints and draws, and what it refuses before it computes."""

import json

import jax
import pytest
import tiny_experiment

from jaxdist.cli import main
from jaxdist.launch.joining import runtime
from jaxdist.run.diagnosis import rate_range

COMMAND = ["lr-range", tiny_experiment.__file__]
FOUND = rate_range.judge([10.0**-k for k in range(12, 0, -1)], [4.0 - number / 3 for number in range(12)])


@pytest.fixture
def asked(monkeypatch):
    given = []
    monkeypatch.setattr(runtime, "start", lambda num_devices, threads=None: jax.devices()[:1])
    monkeypatch.setattr(rate_range, "run", lambda experiment, devices, **more: given.append(more) or FOUND)
    return given


def test_the_curve_and_the_suggestion_are_printed_and_drawn(tmp_path, capsys, asked):
    out = tmp_path / "lr.html"
    assert main.run([*COMMAND, "--range", "1e-5:2", "--steps", "30", "--plot", str(out)]) == 0
    assert asked == [{"low": 1e-5, "high": 2.0, "num_steps": 30}]
    assert f"--set optimizer.learning_rate={FOUND.setting:.2g}" in capsys.readouterr().out
    assert "<title>tiny: learning-rate range</title>" in out.read_text()
    assert main.run([*COMMAND, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["setting"] == FOUND.setting


def test_mistakes_come_before_the_work(tmp_path, capsys, asked):
    (tmp_path / "mine.html").write_text("mine")
    assert main.run([*COMMAND, "--range", "3:1"]) == 2
    assert main.run([*COMMAND, "--plot", str(tmp_path / "mine.html")]) == 2
    assert "is not replaced" in capsys.readouterr().err
    assert asked == []
