"""The work of `jaxdist train`: in this process, alone or as one of a job; or supervised."""

import argparse
import functools
import gc
import json
import pathlib
from collections.abc import Callable, Sequence

import jax

from jaxdist import errors
from jaxdist.cli import parser, selected_experiment
from jaxdist.config import hidden_settings, overrides
from jaxdist.config.experiment import Experiment
from jaxdist.errors import ExitStatus
from jaxdist.launch import viewer
from jaxdist.launch.joining import places, runtime, same_on_all, turn
from jaxdist.launch.signals import StopRequest
from jaxdist.launch.supervising import fork_server
from jaxdist.run import attempt, bookkeeping, components, directory, recovery, supervised
from jaxdist.run.diagnosis import profiling
from jaxdist.run.warm_start import beginning
from jaxdist.rundir import record, writers
from jaxdist.rundir.remote import working_copy


def prepare() -> None:
    """Do what each of the processes that are forked from this one would do by itself."""
    same_on_all.look_ahead()
    overrides.prepare()


def train(options: argparse.Namespace, request: StopRequest) -> int:
    """Train in this process."""
    _freeze_imports()
    _check_start(options)
    if options.strategy == parser.PARAMETER_SERVER:
        with viewer.Viewer():
            return _by_server()(options, request)
    in_reserve = turn.Turn.of_process()
    devices, loaded = selected_experiment.start(options)
    with viewer.Viewer() as shown:
        return _train_here(options, devices, loaded, request, shown, in_reserve)


@functools.cache  # a later run of this process would freeze what the one before has left
def _freeze_imports() -> None:
    """Have the garbage collector pass over what is imported, which stays: a third of the time of tracing a step."""
    gc.freeze()


def _by_server() -> Callable[..., int]:
    """Return the handler that trains by a parameter server; its packages are an extra and slow to import."""
    with errors.as_user_error():
        return parser.find_handler("jaxdist.cli.server_work:train")


def supervise(options: argparse.Namespace, forks: fork_server.ForkServer) -> int:
    """Supervise the processes of a job; the run directory is chosen here, so that all of them have the same."""
    place = places.find()
    if place is not None:
        raise errors.UserError(f"--processes starts a job, and this process belongs to one: {place}. Leave it out.")
    _check_start(options)
    experiment = selected_experiment.load(options)
    writers.check(experiment.writers)
    profiling.check_reached(_traced(options), experiment.stop)
    if not options.resume and not getattr(options, "restartable", False):
        beginning.check_source(experiment)
    run_dir = options.run_dir or directory.default_run_dir(experiment.name, resume=options.resume)
    arguments = _for_processes(options.arguments)
    with viewer.Viewer() as shown:
        shown.log = run_dir / "logs" / "supervisor.log"
        return supervised.supervise(
            experiment,
            [*hidden_settings.hide(options.assignments, experiment, arguments), "--run-dir", str(run_dir)],
            run_dir=run_dir,
            num_processes=options.processes,
            forks=forks,
            checkpoint=getattr(options, "checkpoint", None),
            overwrite=getattr(options, "overwrite", False),
        )


def _check_start(options: argparse.Namespace) -> None:
    """Raise UserError where --overwrite or --checkpoint does not apply; `jaxdist launch` does not have them."""
    if getattr(options, "overwrite", False) and (options.resume or options.restartable):
        given = "--resume" if options.resume else "--restartable"
        raise errors.UserError(
            f"--overwrite starts the run again from its first step, and {given} continues it; got both. Leave one out."
        )
    if getattr(options, "fast_dev_run", False) and options.resume:
        raise errors.UserError("--fast-dev-run tries an experiment from its first step, so it takes no --resume.")
    _traced(options)  # which refuses what is no range of steps
    if getattr(options, "checkpoint", None) is None:
        return
    if not options.resume or options.restartable or options.strategy == parser.PARAMETER_SERVER:
        raise errors.UserError(
            "--checkpoint names the step that a run continues from once, so it takes --resume, not --restartable, and "
            "no parameter server. Add --resume, or leave --checkpoint out."
        )


def _traced(options: argparse.Namespace) -> range:
    """Return the steps that --profile names, none without it; `jaxdist launch` does not have it."""
    named = getattr(options, "profile", None)
    return range(0) if named is None else profiling.steps_of(named)


def _for_processes(arguments: Sequence[str]) -> list[str]:
    """Return the arguments for the processes: what is done once, by the supervisor or at its word, is left out."""
    kept: list[str] = []
    previous = ""
    for argument in arguments:
        once = argument == "--overwrite" or "--checkpoint" in (argument, previous)
        if not once and not argument.startswith("--checkpoint="):
            kept.append(argument)
        previous = argument
    return kept


def exit_status(made: record.RunRecord) -> ExitStatus:
    """Return the exit status that goes with how a run ended."""
    if made.end_reason in ("preempted", "hang"):
        return ExitStatus.RETRY
    return ExitStatus.FAILED if made.end_reason in ("nonfinite", "faulty_device", "error", None) else ExitStatus.OK


def _train_here(
    options: argparse.Namespace,
    devices: Sequence[jax.Device],
    loaded: Callable[[], Experiment],
    request: StopRequest,
    shown: viewer.Viewer,
    in_reserve: turn.Turn | None,
) -> int:
    with selected_experiment.record_alone_on_stdout(options):
        experiment, identity, run_dir, begin, hashes = _agree(options, loaded)
        resume, traced = begin == _RESUME, _traced(options)
        profiling.check_reached(traced, experiment.stop)
        if experiment.strategy == parser.PARAMETER_SERVER:  # set in the experiment, not on the command line
            return _by_server()(options, request, identity)
        shown.log = run_dir / "logs" / "process-0.log"
        earlier = record.readable(run_dir) if resume else None
        is_over = recovery.deadline(experiment.recovery)
        made = attempt.train(
            experiment,
            attempt.RunOptions(
                run_dir=run_dir,
                resume=resume,
                overwrite=begin == _OVERWRITE,
                checkpoint=options.checkpoint,
                profile=traced,
                silent=options.json,
                command=options.command,
                stop_requested=lambda step: bool(request) or is_over(),
                in_reserve=in_reserve,
                identity=identity,
                put_together=functools.partial(components.put_together, is_checked=recovery.has_made_steps()),
                source=bookkeeping.ExperimentSource(
                    str(pathlib.Path(options.experiment).absolute()),
                    tuple(hidden_settings.without(selected_experiment.assignments(options), experiment)),
                    hashes,
                ),
            ),
            devices=devices,
        )
    if made.end_reason is None:  # other processes are to take part, and the run continues
        return ExitStatus.RETRY
    is_as_before = earlier is not None and (earlier.step, earlier.end_reason) == (made.step, made.end_reason)
    if runtime.is_first() and is_as_before and options.checkpoint is None:  # from another one, steps are made again
        errors.say(
            f"The run in {working_copy.shown(run_dir)} had ended at step {made.step} already "
            f"({made.end_reason}); nothing was trained. To continue, raise the limit that ended it, for example with "
            "--max-steps."
        )
    return report(made, run_dir, as_json=options.json and runtime.is_first())


_START, _RESUME, _OVERWRITE = "start", "resume", "overwrite"


def _agree(
    options: argparse.Namespace, loaded: Callable[[], Experiment]
) -> tuple[Experiment, components.Identity, pathlib.Path, str, dict[str, str]]:
    """Return the experiment, its identity, its run directory, how to begin and its files: same on every process."""
    try:
        experiment = loaded()
        run_dir = options.run_dir or directory.default_run_dir(experiment.name, resume=options.resume)
        hashes = same_on_all.files_of(options.experiment)
        facts = same_on_all.of_experiment(record.plain(experiment), hashes)
        with errors.as_user_error():
            identity = components.identity(experiment)
        facts |= {"data and model": str(identity), "--resume": options.resume, "--checkpoint": options.checkpoint}
        facts |= {"--overwrite": options.overwrite}
    except errors.UserError as error:
        same_on_all.compare("experiment", {"mistake": str(error)})
        raise
    same_on_all.compare("experiment", facts | {"--run-dir": str(options.run_dir)})
    run_dir = pathlib.Path(same_on_all.from_first("run directory", str(run_dir)))
    return experiment, identity, run_dir, same_on_all.from_first("restart", _beginning(options, run_dir)), hashes


def _beginning(options: argparse.Namespace, run_dir: pathlib.Path) -> str:
    if options.replace is not None and directory.when_started(run_dir) == options.replace:
        return _OVERWRITE
    continues = (options.restartable or options.replace is not None) and (run_dir / record.FILE_NAME).exists()
    if options.resume or continues:
        return _RESUME
    return _OVERWRITE if options.overwrite else _START


def report(made: record.RunRecord, run_dir: pathlib.Path, *, as_json: bool) -> int:
    """Print the run record where that is asked for; return the exit status."""
    if as_json:
        print(json.dumps(made.to_json() | {"run_dir": working_copy.shown(run_dir)}))
    return exit_status(made)
