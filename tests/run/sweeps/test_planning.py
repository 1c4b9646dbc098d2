"""A sweep before its first trial: what is wrong is said, and nothing is written."""

import pathlib

import pytest
import tiny_experiment

from jaxdist.config.overrides import override
from jaxdist.errors import ConfigError
from jaxdist.run.sweeps import planning, space

BASE = tiny_experiment.get_config()


def plan(over, *, experiment=BASE, assignments=(), method="grid", **more):
    return planning.plan(experiment, space.parse(over), over=over, assignments=assignments, method=method, **more)


def test_a_grid_is_planned_with_rates_changing_fastest():
    found = plan(["optimizer.learning_rate=1e-3,1e-2", "model.width=4,8"], assignments=["seed=3"])
    assert [trial.assignments for trial in found.trials][:2] == [
        ["optimizer.learning_rate=1e-3", "model.width=4"],
        ["optimizer.learning_rate=1e-2", "model.width=4"],
    ]
    assert (found.num_trials, found.metric, found.mode, found.assignments) == (4, "eval/loss", "min", ["seed=3"])


def test_drawn_trials_are_planned_and_those_of_optuna_are_not():
    over = ["optimizer.learning_rate=1e-3:1e-1:log"]
    assert len(plan(over, method="random", num_trials=3).trials) == 3
    later = plan(over, method="optuna", num_trials=3)
    assert (later.trials, later.num_trials) == ([], 3)


@pytest.mark.parametrize(
    ("over", "more", "message"),
    [
        (["model.widht=1"], {}, "Did you mean 'width'"),
        (["model.width=1.5"], {}, "model.width takes a whole number; got '1.5'"),
        (["model.width=a,b"], {}, "model.width takes a whole number"),
        (["model.width=1.5:3"], {"method": "random", "num_trials": 2}, "model.width takes a whole number"),
        (["model.width=4,4"], {}, "4 and 4 are the same model.width"),
        (["optimizer.learning_rate=1e-3,0.001"], {}, "1e-3 and 0.001 are the same"),
        (["optimizer.learning_rate=-1,1"], {}, "at least 0"),
        (["optimizer.learning_rate=1:2"], {}, "A grid needs the values themselves"),
        (["global_batch_size=0,8"], {}, "global_batch_size must be at least 1"),
        (["model.width=4"], {"method": "random"}, "Add --trials N"),
        (["model.width=4,8"], {"num_trials": 3}, "The grid has 2 trials, and --trials says 3"),
        (["model.width=4,8"], {"assignments": ["model.width=2"]}, "Leave one out"),
        (["strategy=fsdp,parameter-server"], {}, "trained by one process"),
        (["model.width=4,8"], {"experiment": override(BASE, ["strategy=parameter-server"])}, "trained by one process"),
        (["model=1"], {}, "is a group of settings"),
    ],
)
def test_a_mistake_is_found_before_the_first_trial(over, more, message):
    with pytest.raises(ConfigError, match=message):
        plan(over, **more)


def test_a_directory_is_new_or_has_this_sweep(tmp_path):
    sweep, new = plan(["model.width=4,8"]), tmp_path / "new"
    assert planning.begin(sweep, new, resume=False, experiment=BASE) is sweep
    assert not new.exists()
    with pytest.raises(ConfigError, match="needs a sweep to continue"):
        planning.begin(sweep, new, resume=True, experiment=BASE)
    (tmp_path / "file").write_text("mine")
    for taken in (tmp_path, tmp_path / "file"):
        with pytest.raises(ConfigError, match="begins in a new directory"):
            planning.begin(sweep, taken, resume=False, experiment=BASE)


def test_a_sweep_is_continued_when_asked_for(tmp_path):
    def drawn(count, over="model.width=4:999"):
        return plan([over], method="random", num_trials=count)

    first = drawn(2)
    first.trials[1].refused = "why"
    first.write(tmp_path)
    with pytest.raises(ConfigError, match="already holds this sweep"):
        planning.begin(drawn(2), tmp_path, resume=False, experiment=BASE)
    with pytest.raises(ConfigError, match="another sweep: over was"):
        planning.begin(drawn(2, "model.width=4:99"), tmp_path, resume=True, experiment=BASE)
    more = planning.begin(drawn(4), tmp_path, resume=True, experiment=BASE)
    assert more.trials == [*first.trials, *drawn(4).trials[2:]]
    assert more.num_trials == 4
    assert pathlib.Path(tmp_path / "sweep.json").exists()
