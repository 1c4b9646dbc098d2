"""A trial as a run: what it leaves, what it refuses without a trace, and what it continues."""

import dataclasses

import jax
import pytest
import tiny_experiment

from jaxdist.run import attempt, bookkeeping
from jaxdist.run.sweeps import sweep_record, trial_runs
from jaxdist.rundir import record


def make_runs(sweep_dir, stopped=lambda: False):
    experiment = tiny_experiment.get_config()
    stop = dataclasses.replace(experiment.stop, max_steps=2)
    return trial_runs.TrialRuns(
        experiment=dataclasses.replace(experiment, stop=stop),
        sweep_dir=sweep_dir,
        devices=jax.devices()[:1],
        command=lambda trial: f"jaxdist train x.py --set {' '.join(trial.assignments)}",
        source=bookkeeping.ExperimentSource("x.py", ("seed=0",)),
        stop_requested=stopped,
    )


def make(number, **settings):
    return sweep_record.Trial.make(number, {name.replace("__", "."): value for name, value in settings.items()})


@pytest.mark.usefixtures("shared_compilations")
def test_a_trial_is_a_run_that_says_how_to_repeat_it_and_goes_on_where_it_was_stopped(tmp_path):
    first = make(0, optimizer__learning_rate="0.02")
    assert make_runs(tmp_path, lambda: True).train(first).end_reason == trial_runs.PREEMPTED
    assert record.RunRecord.read(tmp_path / first.name).step == 1
    assert make_runs(tmp_path).train(first) == trial_runs.TrialOutcome(0, end_reason="max_steps")
    made = record.RunRecord.read(tmp_path / first.name)
    assert (made.step, made.restarts) == (2, 1)
    assert made.command == "jaxdist train x.py --set optimizer.learning_rate=0.02"
    settings = {"file": "x.py", "assignments": ["seed=0", "optimizer.learning_rate=0.02"]}
    assert made.extra["experiment"] == {**settings, "hashes": {}}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"model__width": "wide"}, "takes a whole number"),
        ({"optimizer__momentum": "0.9", "optimizer__name": "sgd"}, "momentum has no effect"),
    ],
)
def test_settings_that_cannot_be_used_leave_no_directory(tmp_path, settings, said):
    outcome = make_runs(tmp_path).train(make(3, **settings))
    assert said in outcome.refused
    assert list(tmp_path.iterdir()) == []


def test_whatever_a_trial_dies_of_is_its_outcome(tmp_path, monkeypatch):
    def fail(*arguments, **options):
        raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")

    monkeypatch.setattr(attempt, "train", fail)
    outcome = make_runs(tmp_path).train(make(1, seed="1"))
    assert (outcome.refused, "out of memory" in outcome.failed) == (None, True)
