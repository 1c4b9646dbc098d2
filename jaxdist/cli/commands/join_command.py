"""`jaxdist join` and `jaxdist leave`: the number of processes of a running job grows and shrinks."""

import argparse
import pathlib
import re

from jaxdist.cli import parser
from jaxdist.cli.commands import train_command
from jaxdist.errors import ExitStatus, UserError
from jaxdist.launch import signals
from jaxdist.launch.supervising import joiner

_ADDRESS = re.compile(r"[^/]+:\d+")
_NEWCOMER = "jaxdist.paramserver.processes.newcomer"
_SPEC = pathlib.Path("ps", "spec.json")


def join(options: argparse.Namespace) -> int:
    """Add processes to a job, and stay until it ends or they have left."""
    run = options.run
    with signals.left_at_signals():  # until the processes have joined
        if _ADDRESS.fullmatch(run) and not pathlib.Path(run).exists():
            return parser.find_handler(f"{_NEWCOMER}:join_at")(run, options.processes, options.experiment)
        if options.experiment is not None:
            raise UserError(
                f"--experiment is for a run at an address HOST:PORT; a run directory knows its own, got {run}. Leave "
                "it out."
            )
        run_dir = pathlib.Path(run)
        if _is_served(run_dir):
            return parser.find_handler(f"{_NEWCOMER}:join")(run_dir, options.processes)
        return joiner.join(run_dir, options.processes, (train_command.PREPARED,))


def leave(options: argparse.Namespace) -> int:
    """Take processes out of a job at the end of a step."""
    if _is_served(options.run_dir):
        parser.find_handler(f"{_NEWCOMER}:leave")(options.run_dir, options.processes)
    else:
        joiner.leave(options.run_dir, options.processes)
    return ExitStatus.OK


def _is_served(run_dir: pathlib.Path) -> bool:
    """Return whether a parameter server trains, or has trained last, in a run directory."""
    return (run_dir / _SPEC).exists()
