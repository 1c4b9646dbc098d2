"""The work of `jaxdist train` by a parameter server, apart from the rest: it needs the extra `paramserver`."""

import argparse

from jaxdist import errors
from jaxdist.cli import remote_runs, selected_experiment, train_work
from jaxdist.launch.signals import StopRequest
from jaxdist.paramserver.run import start
from jaxdist.run import components, directory
from jaxdist.rundir import record


def train(options: argparse.Namespace, request: StopRequest, identity: components.Identity | None = None) -> int:
    """Start the scheduler, servers and workers of a parameter server; `--devices` counts those of each worker."""
    if options.processes:
        raise errors.UserError("A parameter server has ps.workers and ps.servers; leave --processes out.")
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
