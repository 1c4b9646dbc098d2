"""The work of `jaxdist train --dry-run`."""

import argparse
import json

from jaxdist import errors
from jaxdist.cli import selected_experiment
from jaxdist.config.experiment import Experiment
from jaxdist.errors import ExitStatus
from jaxdist.plan import dry_run as sizing
from jaxdist.rundir import writers

_WITHOUT = ("processes", "run_dir", "resume", "checkpoint", "overwrite", "restartable", "profile", "fast_dev_run")


def dry_run(options: argparse.Namespace) -> int:
    """Print the sizes of a run on the devices of this process; nothing is trained or written."""
    for name in _WITHOUT:
        if getattr(options, name):
            raise errors.UserError(
                f"--dry-run trains nothing, so --{name.replace('_', '-')} has no effect. Leave one of them out."
            )
    devices, loaded = selected_experiment.start(options)
    with selected_experiment.record_alone_on_stdout(options):
        experiment = loaded()
        _check(experiment)
        made = sizing.dry_run(experiment, devices)
    print(json.dumps(made.to_json()) if options.json else sizing.render(made))
    return ExitStatus.OK


def _check(experiment: Experiment) -> None:
    if experiment.strategy == "parameter-server":
        raise errors.UserError(
            "--dry-run compiles the step of one process, and a parameter server's run has several. Choose another "
            "--strategy."
        )
    with errors.as_user_error():
        writers.check(experiment.writers)
