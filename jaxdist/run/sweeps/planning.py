"""A sweep before its first trial: everything that can be known to be wrong is found here, and nothing is written."""

import functools
import pathlib
from collections.abc import Sequence
from typing import Any

from jaxdist import errors
from jaxdist.config.experiment import Experiment
from jaxdist.config.overrides import override
from jaxdist.errors import ConfigError
from jaxdist.run import preflight
from jaxdist.run.sweeps import ranking, shared_programs, space, sweep_record
from jaxdist.rundir import writers
from jaxdist.stop import Mode

DEFAULT_TRIALS_NEEDED = "--random and --optuna draw as many trials as --trials says. Add --trials N."
SERVER = "parameter-server"


def plan(
    experiment: Experiment,
    settings: Sequence[space.Setting],
    *,
    over: Sequence[str],
    assignments: Sequence[str],
    method: sweep_record.Method,
    num_trials: int | None = None,
    seed: int = 0,
    metric: str | None = None,
    mode: Mode | None = None,
) -> sweep_record.Sweep:
    """Return the sweep, with its trials where these are known beforehand.

    `over` is what `--over` said, and `settings` what it names, parsed; `assignments` are what the command line changes
    in every trial, without secrets. A grid says itself how many trials it has. `metric` and `mode` are those of the
    experiment where they are None.

    Raises:
      ConfigError: anything that is wrong with these, or with the experiment that a trial would be.
    """
    if experiment.strategy == SERVER or any(SERVER in setting.ends for setting in settings):
        raise ConfigError("A trial of a sweep is trained by one process; a parameter server has several. Leave it out.")
    _check_not_set_twice(settings, assignments)
    _check_values(experiment, settings)
    chosen, direction = ranking.choose_metric(experiment, metric, mode)
    if method == "grid":
        trials = space.grid(settings, last=shared_programs.SHARING)
        if num_trials is not None and num_trials != len(trials):
            raise ConfigError(
                f"The grid has {len(trials)} trials, and --trials says {num_trials}. Leave --trials out, or choose "
                "some of them: --random."
            )
    elif num_trials is None:
        raise ConfigError(DEFAULT_TRIALS_NEEDED)
    else:
        trials = space.draws(settings, num_trials, seed) if method == "random" else []
    for trial in trials:
        _check(experiment, [f"{path}={value}" for path, value in trial.items()])
    return sweep_record.Sweep(
        experiment=experiment.name,
        assignments=list(assignments),
        over=list(over),
        method=method,
        num_trials=num_trials or len(trials),
        seed=seed,
        metric=chosen,
        mode=direction,
        trials=[sweep_record.Trial.make(number, each) for number, each in enumerate(trials)],
    )


def _check_not_set_twice(settings: Sequence[space.Setting], assignments: Sequence[str]) -> None:
    given = {assignment.partition("=")[0] for assignment in assignments}
    for setting in settings:
        if setting.path in given:
            raise ConfigError(
                f"{setting.path} is given to every trial, by --set or an option of its own, and by --over. Leave one "
                "out."
            )


def _check_values(experiment: Experiment, settings: Sequence[space.Setting]) -> None:
    """Raise ConfigError where a value does not fit its setting, or two values are the same."""
    for setting in settings:
        known: dict[str, Any] = {}
        for text in setting.ends:
            changed = _check(experiment, [f"{setting.path}={text}"])
            value = functools.reduce(getattr, setting.path.split("."), changed)
            for other, same in known.items():
                if type(same) is type(value) and same == value:
                    raise ConfigError(
                        f"--over names each value once; {other} and {text} are the same {setting.path}. Remove one."
                    )
            known[text] = value


def _check(experiment: Experiment, assignments: Sequence[str]) -> Experiment:
    """Return the experiment of a trial; raise ConfigError where it makes no sense on any devices."""
    changed = override(experiment, assignments)
    with errors.as_user_error():
        preflight.check_settings(changed)
        changed.stop.rule()
    return changed


def begin(
    sweep: sweep_record.Sweep, sweep_dir: pathlib.Path, *, resume: bool, experiment: Experiment
) -> sweep_record.Sweep:
    """Return the sweep that `sweep_dir` continues, or this one for a new directory; nothing is written.

    Raises:
      ConfigError: the directory holds something else, or a sweep that `resume` does not ask for, or another one.
    """
    writers.check(experiment.writers)
    if not sweep_record.is_sweep(sweep_dir):
        if resume:
            raise ConfigError(f"--resume needs a sweep to continue; {sweep_dir} holds none. Leave it out to start one.")
        if sweep_dir.exists() and (not sweep_dir.is_dir() or any(sweep_dir.iterdir())):
            raise ConfigError(f"A sweep begins in a new directory; {sweep_dir} exists. Choose another --sweep-dir.")
        return sweep
    earlier = sweep_record.Sweep.read(sweep_dir)
    sweep.check_continues(earlier, sweep_dir)
    if not resume:
        raise ConfigError(f"{sweep_dir} already holds this sweep. Continue it with --resume, or choose another.")
    known = {trial.number: trial for trial in earlier.trials}
    earlier.num_trials = sweep.num_trials
    earlier.trials += [trial for trial in sweep.trials if trial.number not in known]
    return earlier
