"""The record of a sweep: what a killed sweep continues from, and what is another sweep."""

import dataclasses
import json
import pathlib

import pytest
from reported_runs import write_run

from jaxdist.errors import ConfigError
from jaxdist.run.sweeps import sweep_record

SWEEP = sweep_record.Sweep(
    experiment="tiny",
    assignments=["seed=1"],
    over=["optimizer.learning_rate=1e-3,1e-2"],
    method="grid",
    num_trials=2,
    seed=0,
    metric="eval/loss",
    mode="min",
    trials=[sweep_record.Trial.make(n, {"optimizer.learning_rate": rate}) for n, rate in enumerate(("1e-3", "1e-2"))],
)


def test_a_record_is_read_as_it_was_written(tmp_path):
    SWEEP.write(tmp_path)
    assert sweep_record.Sweep.read(tmp_path) == SWEEP
    assert sweep_record.is_sweep(tmp_path)
    assert SWEEP.trials[1].assignments == ["optimizer.learning_rate=1e-2"]


def test_a_directory_is_named_after_its_trial_whatever_the_values_are():
    assert sweep_record.Trial.make(7, {"a.rate": "1e-3", "m.width": "32"}).name == "007-rate=1e-3-width=32"
    hostile = sweep_record.Trial.make(1, {"init_from": "../../etc/x y", "w": "(1,2)" * 40}).name
    assert pathlib.PurePath(hostile).name == hostile
    assert len(hostile) <= 60


WRONG = json.dumps(dataclasses.asdict(SWEEP) | {"over": "optimizer.learning_rate=1"})


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"trials": [{"number": 0}]}', '{"trials": []}', WRONG])
def test_a_damaged_record_is_named(tmp_path, content):
    (tmp_path / "sweep.json").write_text(content)
    with pytest.raises(ConfigError, match="is not the record of a sweep"):
        sweep_record.Sweep.read(tmp_path)


def test_without_a_record_there_is_nothing_to_resume(tmp_path):
    with pytest.raises(ConfigError, match=r"has none"):
        sweep_record.Sweep.read(tmp_path)


@pytest.mark.parametrize(
    ("change", "differs"),
    [
        ({}, None),
        ({"over": ["seed=1,2"]}, "over"),
        ({"assignments": []}, "assignments"),
        ({"metric": "eval/accuracy"}, "metric"),
        ({"num_trials": 3}, "num_trials"),  # a grid says how many there are
        ({"experiment": "other"}, "experiment"),
    ],
)
def test_a_sweep_continues_what_it_is(change, differs):
    changed = dataclasses.replace(SWEEP, **change)
    if differs is None:
        changed.check_continues(SWEEP, pathlib.Path("s"))
        return
    with pytest.raises(ConfigError, match=f"another sweep: {differs} was"):
        changed.check_continues(SWEEP, pathlib.Path("s"))


def test_a_sweep_of_drawn_trials_may_get_more_and_not_fewer():
    drawn = dataclasses.replace(SWEEP, method="random", num_trials=4)
    dataclasses.replace(drawn, num_trials=6).check_continues(drawn, pathlib.Path("s"))
    with pytest.raises(ConfigError, match="num_trials was 4 there, and is 2 now"):
        dataclasses.replace(drawn, num_trials=2).check_continues(drawn, pathlib.Path("s"))


@pytest.mark.parametrize(
    ("end_reason", "refused", "failed", "over"),
    [
        ("max_steps", None, None, True),
        ("nonfinite", None, None, True),
        ("preempted", None, None, False),
        ("error", None, None, False),
        ("max_steps", None, "killed while it was closed", False),
        (None, "width must be even", None, True),
        (None, None, "out of memory", False),
        (None, None, None, False),
    ],
)
def test_a_trial_is_over_that_ended_by_itself_or_was_refused(tmp_path, end_reason, refused, failed, over):
    trial = dataclasses.replace(SWEEP.trials[0], refused=refused, failed=failed)
    assert sweep_record.is_over(tmp_path, trial) is (refused is not None)
    write_run(tmp_path / trial.name, end_reason=end_reason)
    assert sweep_record.is_over(tmp_path, trial) is over


def test_a_sweep_stands_for_its_runs(tmp_path):
    SWEEP.write(tmp_path)
    assert sweep_record.expand([tmp_path]) == []
    run_dir = write_run(tmp_path / SWEEP.trials[1].name)
    assert sweep_record.expand([tmp_path, tmp_path / "other"]) == [run_dir, tmp_path / "other"]
