"""`jaxdist sweep`: runs of one experiment with other settings, ranked; the work is in `run.sweeps`."""

import argparse
import contextlib
import json
import os
import pathlib
import shlex
import shutil
import sys
from collections.abc import Callable

from jaxdist.cli import selected_experiment
from jaxdist.config import hidden_settings
from jaxdist.config.experiment import Experiment
from jaxdist.errors import ExitStatus, say
from jaxdist.launch import parent, signals
from jaxdist.launch.joining import runtime, same_on_all
from jaxdist.run import bookkeeping, directory, recovery
from jaxdist.run.sweeps import (
    conducting,
    optuna_proposals,
    planning,
    ranking,
    space,
    sweep_record,
    sweep_workers,
    trial_runs,
)
from jaxdist.rundir import lock

_WIDTH = 80


def sweep(options: argparse.Namespace) -> int:
    """Run the trials of a sweep that are left, and rank them; exit 0 if one of them works."""
    with signals.stop_on_signal() as request:
        if options.worker_of is not None:
            return _work(options, lambda: bool(request))
        experiment = selected_experiment.load(options)
        is_over = recovery.deadline(experiment.recovery)

        def stopped() -> bool:
            return bool(request) or is_over()

        settings = space.parse(options.over)
        planned = _plan(options, experiment, settings)
        sweep_dir = options.sweep_dir or directory.default_run_dir(f"{experiment.name}-sweep", resume=options.resume)
        made = planning.begin(planned, sweep_dir, resume=options.resume, experiment=experiment)
        proposals = _proposals(made, settings)
        run = _several_processes(options, experiment) if options.parallel > 1 else _one_process(options, experiment)
        with lock.locked(sweep_dir, purpose=options.command):
            conductor = conducting.Conductor(made, sweep_dir, proposals)
            say(conductor.beginning())
            run(conductor, stopped)
        return _report(options, experiment, conductor, interrupted=stopped())


def _plan(options: argparse.Namespace, experiment: Experiment, settings: list[space.Setting]) -> sweep_record.Sweep:
    return planning.plan(
        experiment,
        settings,
        over=options.over,
        assignments=hidden_settings.without(selected_experiment.assignments(options), experiment),
        method="optuna" if options.optuna else "random" if options.random else "grid",
        num_trials=options.trials,
        seed=options.seed,
        metric=options.metric,
        mode=options.mode,
    )


def _proposals(made: sweep_record.Sweep, settings: list[space.Setting]) -> optuna_proposals.OptunaProposals | None:
    if made.method != "optuna":
        return None
    return optuna_proposals.OptunaProposals(settings, made.mode, seed=made.seed, known=len(made.trials))


def _one_process(
    options: argparse.Namespace, experiment: Experiment
) -> Callable[[conducting.Conductor, Callable[[], bool]], None]:
    """Return what runs trials in this process."""

    def run(conductor: conducting.Conductor, stopped: Callable[[], bool]) -> None:
        runs = _trial_runs(options, experiment, conductor.sweep_dir, stopped)
        with contextlib.redirect_stdout(sys.stderr):  # the table is what a pipe takes
            conducting.run_here(conductor, runs.train, stopped)

    return run


def _several_processes(
    options: argparse.Namespace, experiment: Experiment
) -> Callable[[conducting.Conductor, Callable[[], bool]], None]:
    """Return what runs trials in `--parallel` processes."""
    shares = sweep_workers.shares_of_gpus(options.parallel)
    arguments = hidden_settings.hide(options.assignments, experiment, options.arguments)

    def run(conductor: conducting.Conductor, stopped: Callable[[], bool]) -> None:
        command = sweep_workers.command(arguments, conductor.sweep_dir)
        logs = conductor.sweep_dir / conducting.LOGS
        with contextlib.ExitStack() as stack:
            workers = [
                stack.enter_context(
                    contextlib.closing(sweep_workers.TrialWorker(command, share, logs / f"worker-{number}.log"))
                )
                for number, share in enumerate(shares)
            ]
            sweep_workers.run(conductor, workers, stopped)

    return run


def _work(options: argparse.Namespace, stopped: Callable[[], bool]) -> int:
    """Be a worker: train the trials that standard input names."""
    parent.die_with_parent({})
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    with answers, contextlib.redirect_stdout(sys.stderr):
        experiment = selected_experiment.load(options)
        sweep_workers.work(_trial_runs(options, experiment, options.worker_of, stopped).train, sys.stdin, answers)
    return ExitStatus.OK


def _trial_runs(
    options: argparse.Namespace, experiment: Experiment, sweep_dir: pathlib.Path, stopped: Callable[[], bool]
) -> trial_runs.TrialRuns:
    return trial_runs.TrialRuns(
        experiment=experiment,
        sweep_dir=sweep_dir,
        devices=runtime.start(options.devices, threads=lambda: selected_experiment.threads_of(experiment)),
        command=lambda trial: _training_command(options, experiment, trial),
        source=bookkeeping.ExperimentSource(
            str(pathlib.Path(options.experiment).absolute()),
            tuple(hidden_settings.without(selected_experiment.assignments(options), experiment)),
            same_on_all.files_of(options.experiment),
        ),
        stop_requested=stopped,
    )


def _training_command(options: argparse.Namespace, experiment: Experiment, trial: sweep_record.Trial) -> str:
    """Return the command line that trains what a trial trains, secrets replaced by `***`."""
    arguments = selected_experiment.as_arguments(options, after=trial.assignments)
    hidden = hidden_settings.shown([*options.assignments, *trial.assignments], experiment)
    shown = [hidden.get(argument, argument) for argument in arguments]
    return shlex.join(["jaxdist", "train", options.experiment, *shown])


def _report(
    options: argparse.Namespace, experiment: Experiment, conductor: conducting.Conductor, *, interrupted: bool
) -> int:
    """Print the ranking and the best command; return the exit status."""
    made, sweep_dir = conductor.sweep, conductor.sweep_dir
    found = ranking.rank(sweep_dir, made)
    best = found[0] if found and found[0].works else None
    command = _training_command(options, experiment, best.trial) if best else None
    if options.json:
        best_json = best and {**best.to_json(sweep_dir), "command": command}
        trials = [each.to_json(sweep_dir) for each in found]
        facts = {"sweep_dir": str(sweep_dir), "metric": made.metric, "mode": made.mode, "interrupted": interrupted}
        print(json.dumps(facts | {"best": best_json, "trials": trials}))
    else:
        width = min(shutil.get_terminal_size((_WIDTH, 0)).columns, _WIDTH)
        print(ranking.table(made, found, width=width))
        if command:
            print(f"\nThe best again:  {command}")
        if any(each.step for each in found):
            print(f"All curves:      jaxdist report {shlex.quote(str(sweep_dir))}")
    left = conductor.num_left()
    if interrupted and left:
        say(f"{left} trials are left; the same command with --resume continues.")
        return ExitStatus.RETRY
    if best is not None:
        return ExitStatus.OK
    return conductor.when_nothing_works()
