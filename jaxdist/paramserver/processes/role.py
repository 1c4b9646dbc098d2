"""Runs one role in a process, from its command line `NAME SPEC` to its exit status."""

import gc
import logging
import os
import pathlib
import sys
from collections.abc import Callable

from jaxdist.errors import UserError, as_user_error
from jaxdist.paramserver.processes import peer_addresses
from jaxdist.paramserver.processes.driver import Driver
from jaxdist.paramserver.processes.process_world import ProcessWorld
from jaxdist.paramserver.processes.reports import Statistics
from jaxdist.paramserver.processes.run_folder import Spec
from jaxdist.paramserver.protocol import effects
from jaxdist.paramserver.wire import certificates
from jaxdist.paramserver.wire.security import Security
from jaxdist.paramserver.wire.streams import Wire, reuse_freed_memory

LEFT_STATUS = 4
"""The exit status of a worker that has left the run, which continues."""

Cast = tuple[Driver, ProcessWorld, Statistics]
Make = Callable[[str, Spec], Cast]


def main(arguments: list[str], make: Make) -> int:
    """Run the role that `make` returns; return the exit status."""
    name, path = arguments
    reuse_freed_memory()
    # "force": a package that is imported may have given the root logger a handler of its own.
    logging.basicConfig(level=logging.WARNING, format=f"{name}: %(message)s", stream=sys.stderr, force=True)
    spec = Spec.read(pathlib.Path(path))
    known = peer_addresses.Addresses(spec.peers, pathlib.Path(spec.directory))
    logger = logging.getLogger(__name__)
    try:
        with as_user_error():
            security = Security.read(os.environ)
            certificates.check(security, known[name].rpartition(":")[0])  # they may have expired since the run began
        driver, world, statistics = make(name, spec)
    except UserError as error:
        logger.error(str(error))
        return error.exit_status
    gc.collect()
    gc.freeze()  # what is imported and compiled by now stays; each collection would look through it
    try:
        wire = Wire(
            listen=known[name],
            peers=known,
            receive=world.receive,
            receive_small=world.receive_small,
            security=security.for_attempt(spec.attempt),
        )
    except OSError as error:
        logger.error(str(error))
        return 1
    end = world.run(driver, wire)
    statistics.write()
    wire.flush(5.0)
    wire.close()
    if end.step < 0:
        logger.error(end.reason)
    if end.reason == effects.LEFT:
        return LEFT_STATUS
    return 0 if end.step >= 0 else 1
