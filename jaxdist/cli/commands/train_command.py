"""`jaxdist train`: chooses between training in this process and starting supervised processes that do.

This file imports little, so that signals are handled, and the fork server starts its imports, before JAX is loaded.
"""

import argparse
import contextlib
import os
import pathlib
import tempfile

from jaxdist.cli import parser
from jaxdist.errors import ExitStatus, say
from jaxdist.launch import signals, waiting
from jaxdist.launch.supervising import fork_server
from jaxdist.rundir.remote import run_address

WORK = "jaxdist.cli.train_work"
"""What trains."""
PREPARED = f"{WORK}:prepare"
"""What is imported and called once for the processes of a job, before they are forked."""
_IN_JOB = "JAXDIST_NUM_PROCESSES"


def train(options: argparse.Namespace) -> int:
    """Train in this process, or start the processes that do."""
    if options.dry_run:
        return parser.find_handler("jaxdist.cli.dry_run_work:dry_run")(options)
    if isinstance(options.run_dir, run_address.Address):
        return parser.find_handler("jaxdist.cli.remote_runs:train")(options, _train)
    if not options.fast_dev_run or options.run_dir is not None:
        return _train(options)
    with tempfile.TemporaryDirectory(prefix="jaxdist-trial-") as folder:
        options.run_dir = pathlib.Path(folder) / "run"
        status = _train(options)
    how = "ended well" if status == ExitStatus.OK else f"ended with status {int(status)}"
    say(f"The trial {how}; its run directory was removed. --run-dir keeps one.")
    return status


def _train(options: argparse.Namespace) -> int:
    if options.processes and options.strategy != parser.PARAMETER_SERVER and _IN_JOB not in os.environ:
        return supervise(options)
    # From the start: a signal that arrives during the imports or while the processes connect is not lost.
    with signals.stop_on_signal() as request:
        with waiting.shown("importing JAX", silent=options.json):
            handler = parser.find_handler(f"{WORK}:train")
        return handler(options, request)


def supervise(options: argparse.Namespace) -> int:
    """Start the processes of a job on this machine and supervise them."""
    # The fork server imports what the processes need while this one checks whether to start them.
    with (
        signals.left_at_signals(),  # until the job has its own handlers
        contextlib.closing(fork_server.ForkServer((PREPARED,), experiment=options.experiment)) as forks,
    ):
        return parser.find_handler(f"{WORK}:supervise")(options, forks)
