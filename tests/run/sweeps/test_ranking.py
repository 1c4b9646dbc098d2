"""The ranking: by the value and direction of the metric, and a table that fits."""

import dataclasses

import pytest
import tiny_experiment
from hypothesis import given, settings
from hypothesis import strategies as st
from reported_runs import write_run

import jaxdist
from jaxdist.errors import ConfigError
from jaxdist.run.sweeps import ranking, sweep_record

BASE = tiny_experiment.get_config()


def make_sweep(count, mode="max", metric="eval/accuracy", over=("a.rate=1,2", "model.width=1,2")):
    paths = [each.partition("=")[0] for each in over]
    trials = [sweep_record.Trial.make(n, {path: str(n) for path in paths}) for n in range(count)]
    return sweep_record.Sweep("tiny", [], list(over), "grid", count, 0, metric, mode, trials)


@pytest.mark.parametrize(
    ("changes", "asked", "found"),
    [
        ({}, (), ("eval/loss", "min")),
        ({}, ("eval/accuracy", "max"), ("eval/accuracy", "max")),
        ({}, ("train/loss",), ("train/loss", "min")),
        ({"data": dataclasses.replace(BASE.data, eval=None)}, (), ("train/loss", "min")),
        ({"data": dataclasses.replace(BASE.data, eval={"day": BASE.data.eval})}, (), ("eval/day/loss", "min")),
        ({"stop": jaxdist.Stop(target=0.9)}, (), ("eval/accuracy", "max")),
        ({"stop": jaxdist.Stop(target=0.9)}, (None, "min"), ("eval/accuracy", "min")),
        (
            {"checkpoints": jaxdist.Checkpoints(best_metric="eval/f1", best_mode="max")},
            ("eval/f1",),
            ("eval/f1", "max"),
        ),
    ],
)
def test_the_metric_is_the_one_asked_for_or_the_experiments(changes, asked, found):
    assert ranking.choose_metric(dataclasses.replace(BASE, **changes), *asked) == found


@pytest.mark.parametrize(
    ("changes", "asked", "message"),
    [
        ({"data": dataclasses.replace(BASE.data, eval=None)}, ("eval/loss",), "has no data.eval"),
        ({}, ("eval/accuracy",), "Add --mode max or min"),
        ({}, (None, "max"), "there is no --metric"),
    ],
)
def test_a_metric_that_cannot_rank_is_refused(changes, asked, message):
    with pytest.raises(ConfigError, match=message):
        ranking.choose_metric(dataclasses.replace(BASE, **changes), *asked)


def test_trials_are_ranked_by_value_then_by_the_step_it_was_reached_at(tmp_path):
    sweep = make_sweep(6)
    best = {"metric": "eval/accuracy", "value": 0.9, "step": 2}
    write_run(tmp_path / sweep.trials[0].name, metrics={"eval/accuracy": 0.8})
    write_run(tmp_path / sweep.trials[1].name, metrics={"eval/accuracy": 0.7}, extra={"best": best | {"step": 3}})
    write_run(tmp_path / sweep.trials[2].name, metrics={"eval/accuracy": 0.1}, extra={"best": best})
    write_run(tmp_path / sweep.trials[3].name, metrics={"eval/accuracy": 0.99}, end_reason="nonfinite")
    write_run(tmp_path / sweep.trials[4].name, metrics={"eval/accuracy": None})
    sweep.trials[5].refused = "width is odd"
    found = ranking.rank(tmp_path, sweep)
    assert [each.trial.number for each in found][:3] == [2, 1, 0]
    assert [each.works for each in found] == [True] * 3 + [False] * 3
    assert {each.trial.number: each.ended for each in found[3:]} == {3: "nonfinite", 4: "max_steps", 5: "refused"}
    lowest = ranking.rank(tmp_path, dataclasses.replace(sweep, mode="min"))
    assert [each.trial.number for each in lowest][:3] == [0, 2, 1]


def test_of_another_metric_the_last_value_counts(tmp_path):
    sweep = make_sweep(1, metric="train/loss")
    best = {"metric": "eval/accuracy", "value": 0.9, "step": 2}
    run_dir = write_run(tmp_path / sweep.trials[0].name, metrics={"train/loss": 0.25}, extra={"best": best}, rows=7)
    assert run_dir.exists()
    [found] = ranking.rank(tmp_path, sweep)
    assert (found.value, found.step) == (0.25, 7)


@settings(max_examples=25)
@given(
    paths=st.lists(st.from_regex(r"[a-z_]{1,14}(\.[a-z_]{1,20}){0,2}", fullmatch=True), min_size=1, max_size=7),
    values=st.lists(st.text("0123456789abc(),", min_size=1, max_size=30), min_size=1, max_size=4),
)
def test_a_table_fits_and_has_a_line_for_each_trial(paths, values):
    sweep = make_sweep(len(values), over=[f"{path}=x" for path in dict.fromkeys(paths)])
    found = [
        ranking.Ranked(
            dataclasses.replace(trial, settings=dict.fromkeys(trial.settings, value)),
            "max_steps",
            0.123456,
            1000,
            1.0,
            0.5,
            1,
        )
        for trial, value in zip(sweep.trials, values, strict=True)
    ]
    lines = ranking.table(sweep, found, width=80).splitlines()
    assert len(lines) == len(values) + 1
    assert max(map(len, lines)) <= 80


def test_columns_are_named_shortly_where_that_says_which():
    sweep = make_sweep(1, over=["optimizer.learning_rate=1", "model.width=1", "other.width=1"])
    assert list(ranking.columns(sweep).values()) == ["learning_rate", "model.width", "other.width"]
