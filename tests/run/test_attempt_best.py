"""The best state of a run: when it is saved, what it is named after, and that it is kept."""

import dataclasses

import jax
import pytest
import tiny_experiment
from tiny_runs import read_record, run

from jaxdist.run import components, directory
from jaxdist.rundir import record

pytestmark = pytest.mark.usefixtures("shared_compilations")


def accuracies(values):
    """Let the evaluations of any run give these values, one after the other."""
    remaining = iter(values)
    return lambda parts, state: {"accuracy": next(remaining), "loss": 1.0}


def test_the_best_state_is_saved_when_it_is_found_kept_named_and_loadable(tmp_path, monkeypatch):
    """Evaluations after steps 2, 4, 6, 8 and 10; checkpoints every 100 steps."""
    monkeypatch.setattr(components.Parts, "evaluate", accuracies([0.5, 0.9, 0.7, 0.9, 0.1]))
    settings = ("eval.every_steps=2", "checkpoints.every_steps=100", "checkpoints.keep_last=1")
    run(tmp_path / "run", *settings, "checkpoints.best_metric=eval/accuracy")
    best = {"metric": "eval/accuracy", "value": 0.9, "step": 4}
    assert read_record(tmp_path / "run")["best"] == best
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["10", "4"]

    monkeypatch.setattr(components.Parts, "evaluate", accuracies([0.5, 0.9]))
    stopped = run(tmp_path / "other", *settings, "checkpoints.best_metric=eval/accuracy", "stop.max_steps=4")
    assert stopped.extra["best"] == best
    experiment = tiny_experiment.get_config()
    parts = components.put_together(experiment, devices=jax.devices()[:1])
    for run_dir in (tmp_path / "run", tmp_path / "other"):
        with directory.open_checkpoints(experiment, run_dir, parts.identity) as checkpointer:
            state, _ = checkpointer.restore(parts.abstract_state, 4)
        assert record.params_sha256(state.params) == stopped.params_sha256


def test_target_and_best_checkpoint_may_be_of_sets_with_names(tmp_path, monkeypatch):
    values = iter([(0.5, 3.0), (0.6, 1.0), (0.95, 2.0)])
    names = ("far/accuracy", "near/loss")
    monkeypatch.setattr(components.Parts, "evaluate", lambda parts, state: dict(zip(names, next(values), strict=True)))
    tiny = tiny_experiment.get_config()
    sets = {"near": tiny.data.eval, "far": tiny_experiment.make_source(13, 2)}
    best = ("checkpoints.best_metric=eval/near/loss", "checkpoints.best_mode=min", "checkpoints.keep_last=1")
    made = run(
        tmp_path / "run",
        *("eval.every_steps=2", "checkpoints.every_steps=100", *best),
        *("stop.target=0.9", "stop.target_metric=eval/far/accuracy"),
        experiment=dataclasses.replace(tiny, data=dataclasses.replace(tiny.data, eval=sets)),
    )
    assert (made.end_reason, made.step) == ("target_reached", 6)
    assert made.extra["best"] == {"metric": "eval/near/loss", "value": 1.0, "step": 4}
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["4", "6"]


def test_a_resumed_run_knows_the_best_of_the_attempts_before_it(tmp_path, monkeypatch):
    monkeypatch.setattr(components.Parts, "evaluate", accuracies([0.5, 0.9, 0.7, 0.8, 0.1]))
    settings = ("eval.every_steps=2", "checkpoints.every_steps=100", "checkpoints.best_metric=eval/accuracy")
    run(tmp_path / "run", *settings, preempt=5)
    made = run(tmp_path / "run", *settings, resume=True)
    assert made.extra["best"] == {"metric": "eval/accuracy", "value": 0.9, "step": 4}


def test_a_checkpoint_is_not_judged_by_the_evaluation_of_another_step(tmp_path, monkeypatch):
    """The checkpoint of step 3 must not be taken for the one whose accuracy was measured after step 2."""
    monkeypatch.setattr(components.Parts, "evaluate", accuracies([0.9, 0.1, 0.2]))
    settings = ("eval.every_steps=2", "checkpoints.every_steps=3", "checkpoints.keep_last=1", "stop.max_steps=6")
    run(tmp_path / "run", *settings, "checkpoints.best_metric=eval/accuracy")
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["2", "6"]
