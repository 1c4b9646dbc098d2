"""Which trial is next: those that are left, each once, and what a resumed sweep does with what it finds."""

import dataclasses
import itertools

from reported_runs import write_run

from jaxdist.errors import ExitStatus
from jaxdist.run.sweeps import conducting, sweep_record, trial_runs


def make_sweep(count, **more):
    trials = [sweep_record.Trial.make(number, {"model.width": str(number)}) for number in range(count)]
    over = ["model.width=0,1,2"]
    return sweep_record.Sweep("tiny", [], over, "grid", count, 0, "eval/accuracy", "max", trials, **more)


def runner(sweep_dir, outcomes):
    """Return what trains: a trial without an outcome of its own writes a run that ended well."""
    done = []

    def train(trial):
        done.append(trial.number)
        if trial.number in outcomes:
            return dataclasses.replace(outcomes[trial.number], number=trial.number)
        if not (sweep_dir / trial.name).exists():
            write_run(sweep_dir / trial.name, metrics={"eval/accuracy": trial.number / 10})
        return trial_runs.TrialOutcome(trial.number, end_reason="max_steps")

    return train, done


def never():
    return False


def test_each_trial_is_run_once_and_a_failing_one_ends_nothing(tmp_path, capsys):
    outcomes = {
        0: trial_runs.TrialOutcome(0, refused="0 is no width"),
        1: trial_runs.TrialOutcome(1, failed="out of memory"),
    }
    train, done = runner(tmp_path, outcomes)
    conductor = conducting.Conductor(make_sweep(3), tmp_path)
    conducting.run_here(conductor, train, never)
    assert done == [0, 1, 2]
    kept = sweep_record.Sweep.read(tmp_path)
    assert [(trial.refused, trial.failed) for trial in kept.trials] == [
        ("0 is no width", None), (None, "out of memory"), (None, None)
    ]  # fmt: skip
    told = capsys.readouterr().err.splitlines()
    assert told[0] == "jaxdist: trial 0, 1 of 3, width=0: refused. 0 is no width"
    assert told[2].startswith("jaxdist: trial 2, 3 of 3, width=2: eval/accuracy 0.2 at step 3, max_steps")


def test_a_killed_sweep_runs_what_is_left_and_what_failed(tmp_path):
    first = make_sweep(5)
    first.trials[0].refused, first.trials[1].failed = "0 is no width", "out of memory"
    first.write(tmp_path)
    write_run(tmp_path / first.trials[2].name)
    write_run(tmp_path / first.trials[3].name, end_reason=None)  # it was running
    train, done = runner(tmp_path, {})
    conductor = conducting.Conductor(sweep_record.Sweep.read(tmp_path), tmp_path)
    assert (conductor.num_finished_before, conductor.num_left()) == (2, 2)
    conducting.run_here(conductor, train, never)
    assert done == [1, 3, 4]
    assert sweep_record.Sweep.read(tmp_path).trials[1].failed is None


def test_a_sweep_that_is_stopped_begins_no_other_trial(tmp_path):
    train, done = runner(tmp_path, {})
    conductor = conducting.Conductor(make_sweep(3), tmp_path)
    conducting.run_here(conductor, train, iter([False, True]).__next__)
    assert done == [0]
    assert conductor.num_left() == 2


class Proposing:
    """Proposes numbers from 10 on, and keeps what it is told."""

    def __init__(self):
        self.numbers, self.told = itertools.count(10), []

    def propose(self):
        return {"model.width": str(next(self.numbers))}

    def tell(self, settings, value):
        self.told.append((settings["model.width"], value))


def test_proposals_are_asked_for_one_at_a_time_and_told_every_value_also_those_of_before(tmp_path):
    sweep = make_sweep(1)
    sweep.num_trials, sweep.method = 3, "optuna"
    write_run(tmp_path / sweep.trials[0].name, metrics={"eval/accuracy": 0.5})
    proposing = Proposing()
    train, done = runner(tmp_path, {2: trial_runs.TrialOutcome(2, failed="no")})
    conductor = conducting.Conductor(sweep, tmp_path, proposing)
    assert conductor.num_left() == 2
    conducting.run_here(conductor, train, never)
    assert done == [1, 2]
    assert proposing.told == [("0", 0.5), ("10", 0.1), ("11", None)]
    assert [trial.settings["model.width"] for trial in sweep_record.Sweep.read(tmp_path).trials] == ["0", "10", "11"]


def test_a_sweep_of_which_all_is_refused_leaves_no_directory(tmp_path):
    sweep_dir = tmp_path / "sweep"
    sweep_dir.mkdir()
    train, _ = runner(sweep_dir, dict.fromkeys(range(3), trial_runs.TrialOutcome(0, refused="no")))
    conductor = conducting.Conductor(make_sweep(3), sweep_dir)
    conducting.run_here(conductor, train, never)
    assert conductor.when_nothing_works() == ExitStatus.USER
    assert not sweep_dir.exists()


def test_a_sweep_of_which_all_failed_keeps_what_there_is(tmp_path):
    train, _ = runner(tmp_path, dict.fromkeys(range(3), trial_runs.TrialOutcome(0, failed="no")))
    conductor = conducting.Conductor(make_sweep(3), tmp_path)
    conducting.run_here(conductor, train, never)
    assert conductor.when_nothing_works() == ExitStatus.FAILED
    assert sweep_record.is_sweep(tmp_path)
