import json

import jax
import pytest
import tiny_experiment

from jaxdist.cli import main
from jaxdist.cli.commands import plan_command
from jaxdist.launch.joining import runtime
from jaxdist.plan import search, topology
from jaxdist.plan.calibrated import calibration
from jaxdist.plan.calibrated import operation_rates as rates

TINY = tiny_experiment.__file__


@pytest.fixture(autouse=True)
def devices_that_are_there(monkeypatch):
    monkeypatch.setattr(runtime, "start_by_itself", lambda count: jax.devices()[:count])


def test_a_plan_is_one_json_object(capsys):
    assert main.run(["plan", TINY, "--topology", "cpu:8", "--max-steps", "100", "--price-per-hour", "2", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["num_devices"] == 8
    assert content["steps"] == 100
    assert content["price"] == pytest.approx(2 * content["hours"])


def test_an_interrupted_search_prints_what_it_found_and_says_so(capsys, monkeypatch):
    registered = []
    monkeypatch.setattr(plan_command.atexit, "register", registered.append)
    monkeypatch.setattr(plan_command.search, "search", lambda *args, show: search.SearchResult([], interrupted=True))
    assert main.run(["plan", TINY, "--topology", "cpu:8", "--search"]) == 130
    assert "was interrupted after 0 of the ways to train" in capsys.readouterr().err
    assert len(registered) == 1


def test_the_best_command_of_a_search_trains_what_was_planned(capsys, monkeypatch):
    found = []

    def best(experiment, where, *, show):
        found.append(search._try(("strategy=zero1",), experiment, where))
        return search.SearchResult(found, interrupted=False)

    monkeypatch.setattr(plan_command.search, "search", best)
    command = ["plan", TINY, "--topology", "cpu:8", "--search", "--max-steps", "7"]
    assert main.run([*command, "--set", "global_batch_size=3", "seed=5"]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    settings = "global_batch_size=3 seed=5 stop.max_steps=7 global_batch_size=8 strategy=zero1"
    assert line == f"Best: jaxdist train {TINY} --set {settings}"
    assert found[0].estimate.global_batch_size == 8


def test_a_batch_that_does_not_divide_is_raised_and_said(capsys):
    assert main.run(["plan", TINY, "--topology", "cpu:8", "--set", "global_batch_size=3", "--json"]) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["global_batch_size"] == 8
    assert "planned with global_batch_size=8" in shown.err


def test_a_sweep_has_a_row_for_each_number_of_devices(capsys):
    assert main.run(["plan", TINY, "--topology", "cpu:8", "--sweep-devices", "8,2"]) == 0
    rows = capsys.readouterr().out.splitlines()[1:3]
    assert [row.split()[0] for row in rows] == ["2", "8"]


def test_more_devices_than_can_be_compiled_for_are_extrapolated_with_the_reason(capsys):
    assert main.run(["plan", TINY, "--topology", "cpu:2", "--sweep-devices", "2,1024"]) == 0
    shown = capsys.readouterr().out
    assert "1024*" in shown
    assert "* extrapolated: --sweep-devices takes up to 2 devices of cpu:2; got 1024." in shown


def test_a_calibrated_plan_predicts_the_step(capsys, monkeypatch):
    factors = {"matmul": 1.0, "convolution": 1.0, "": 1.0}
    found = rates.Rates({"": [1e-3] + [0.0] * 9}, factors, start_seconds=0.5, error=0.04)
    made = calibration.Calibration(found, "2026-11-29", dict.fromkeys("abcdefghij", 1.0))
    monkeypatch.setattr(topology.calibration, "find", lambda devices, show: made)
    assert main.run(["plan", TINY, "--topology", "cpu:8", "--calibrate", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["step_seconds"] == content["predicted_seconds"] > 0.5
    assert content["examples_per_second"] == pytest.approx(content["global_batch_size"] / content["step_seconds"])
    assert "10 programs they are from: median error 4%" in content["calibration"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--topology", "cpu:none"], "There is no topology"),
        (["--topology", "cpu:8", "--sweep-devices", "8,x"], "--sweep-devices takes numbers"),
        (["--topology", "cpu:8", "--sweep-devices", "16"], "Name a larger topology, cpu:16"),
        (["--topology", "cpu:8", "--devices", "4"], "Leave --devices out"),
        (["--topology", "cpu:8", "--sweep-devices", "8", "--calibrate"], "Leave one out"),
        (["--topology", "cpu:8", "--sweep-devices", "8", "--search"], "Leave one out"),
        (["--topology", "cpu:8", "--sweep-devices", "8", "--price-per-hour", "2"], "Leave one out"),
        (["--topology", "cpu:8", "--price-per-hour", "-3"], "a number of 0 or more; got -3"),
        (["--topology", "cpu:8", "--price-per-hour", "nan"], "a number of 0 or more; got nan"),
        (["--topology", "cpu:8", "--price-per-hour", "inf"], "a number of 0 or more; got inf"),
        (["--topology", "cpu:8", "--reduction", "canonical"], "--reduction mean"),
    ],
)
def test_mistakes_are_one_message_and_status_2(arguments, message, capsys):
    assert main.run(["plan", TINY, *arguments]) == 2
    assert message in capsys.readouterr().err
