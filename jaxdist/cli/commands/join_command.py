"""`jaxdist join` and `jaxdist leave`: the number of processes of a running job grows and shrinks."""

import argparse

from jaxdist.cli.commands import train_command
from jaxdist.errors import ExitStatus
from jaxdist.launch import signals
from jaxdist.launch.supervising import joiner


def join(options: argparse.Namespace) -> int:
    """Add processes to a job, and stay until it ends or they have left."""
    with signals.left_at_signals():  # until the processes have joined
        return joiner.join(options.run_dir, options.processes, (train_command.WORK,))


def leave(options: argparse.Namespace) -> int:
    """Take processes out of a job at the end of a step."""
    joiner.leave(options.run_dir, options.processes)
    return ExitStatus.OK
