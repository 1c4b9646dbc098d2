"""The work of `jaxdist train` and `chaos` by a parameter server, apart from the rest: it needs an extra."""

import argparse
import functools
from collections.abc import Callable

from jaxdist import errors
from jaxdist.cli import remote_runs, selected_experiment, train_work
from jaxdist.cli.commands import chaos_command
from jaxdist.config.experiment import Experiment
from jaxdist.config.overrides import override
from jaxdist.launch.signals import StopRequest
from jaxdist.paramserver.run import served_job, start
from jaxdist.run import components, directory
from jaxdist.rundir import record


def train(options: argparse.Namespace, request: StopRequest, identity: components.Identity | None = None) -> int:
    """Start the scheduler, servers and workers of a parameter server; `--devices` counts those of each worker."""
    check_processes(options)
    for name in ("profile", "fast_dev_run", "overfit_batch"):
        if getattr(options, name, None):
            raise errors.UserError(
                f"--{name.replace('_', '-')} is for runs whose steps are made by this command's processes; those of a "
                "parameter server load the experiment by themselves. Leave it out, or try the experiment with another "
                "--strategy."
            )
    experiment = selected_experiment.load(options)
    remote_runs.check_servers(experiment)
    run_dir = options.run_dir or directory.default_run_dir(experiment.name, resume=options.resume)
    with selected_experiment.record_alone_on_stdout(options):
        settings = start.Options(
            experiment=options.experiment,
            run_dir=run_dir,
            assignments=selected_experiment.assignments(options),
            resume=options.resume or (options.restartable and (run_dir / record.FILE_NAME).exists()),
            overwrite=options.overwrite,
            devices=options.devices or 1,
            silent=options.json,
            command=options.command,
            stop_requested=lambda: bool(request),
            identity=identity,
        )
        made = start.train(settings)
    return train_work.report(made, run_dir, as_json=options.json)


def chaos(options: argparse.Namespace, experiment: Experiment, compare: Callable[..., int]) -> int:
    """Compare an undisturbed run with one whose processes, of every role, are killed; return the exit status."""
    check_processes(options)
    given = {each.partition("=")[0] for each in options.assignments}
    before = [f"{name}={value}" for name, value in served_job.SETTINGS.items() if name not in given]
    names = served_job.names_of(override(experiment, before))
    return compare(
        options,
        experiment,
        chaos_command.command(options, before=before),
        num_processes=len(names),
        num_changing=experiment.ps.workers,
        make_job=functools.partial(served_job.ServedJob, names=names),
    )


def check_processes(options: argparse.Namespace) -> None:
    """Raise UserError if processes are counted that are not all of one kind."""
    if options.processes:
        raise errors.UserError("A parameter server has ps.workers and ps.servers; leave --processes out.")
