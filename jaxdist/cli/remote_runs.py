"""Commands on runs whose directory is remote: they work in a copy on this machine."""

import argparse
import functools
import os
from collections.abc import Callable

from jaxdist.cli import parser
from jaxdist.config.experiment import Experiment
from jaxdist.errors import ExitStatus, UserError
from jaxdist.launch import signals
from jaxdist.launch.joining import places
from jaxdist.rundir import full_disk
from jaxdist.rundir.remote import working_copy
from jaxdist.rundir.remote.run_address import Address

_ANSWER = "The upload stops; what is missing stays on this machine."


def train(options: argparse.Namespace, begin: Callable[[argparse.Namespace], int]) -> int:
    """Train by `begin`, in a working copy where the run directory is remote; return the exit status."""
    address = options.run_dir
    if not isinstance(address, Address):
        return begin(options)
    _check_alone(address)
    how = working_copy.HowToBegin(
        resume=options.resume,
        restartable=getattr(options, "restartable", False),
        overwrite=getattr(options, "overwrite", False),
        checkpoint=getattr(options, "checkpoint", None),
    )
    status: int = ExitStatus.FAILED
    ending = functools.partial(signals.stop_on_signal, answer=_ANSWER)
    try:
        with working_copy.opened(address, how, purpose=options.command, ending=ending) as run_dir:
            options.run_dir = run_dir
            status = begin(options)
    except working_copy.NotUploadedError as error:
        full_disk.say(str(error))
        return status if status not in (ExitStatus.OK, ExitStatus.USER) else ExitStatus.FAILED
    return status


def check_launch(options: argparse.Namespace, experiment: Experiment) -> None:
    """Raise UserError where the processes of a job would be on other machines than the working copy."""
    by_server = experiment.strategy == parser.PARAMETER_SERVER
    elsewhere = options.engine or options.hosts > 1 or options.host_index is not None or by_server
    if isinstance(options.run_dir, Address) and elsewhere:
        raise _only_here(options.run_dir)


def check_servers(experiment: Experiment) -> None:
    """Raise UserError where a parameter server whose run directory is remote would be on several machines."""
    address = os.environ.get(working_copy.ADDRESS_VARIABLE)
    if address and (experiment.ps.hosts or experiment.ps.engine != "processes"):
        raise _only_here(Address(address))


def _check_alone(address: Address) -> None:
    if places.find() is not None:
        raise _only_here(address)


def _only_here(address: Address) -> UserError:
    return UserError(
        "The processes of a job share a run directory, and the working copy of a remote one is on one machine; got "
        f"{address} for a job of several hosts, or of an engine. Name a directory on a file system that they share, or "
        "use one machine: `jaxdist train`, with --processes for several."
    )
