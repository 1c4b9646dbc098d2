"""Runs one role in a process, from its command line `NAME SPEC` to its exit status."""

import logging
import os
import pathlib
import sys
from collections.abc import Callable

from jaxdist.paramserver.processes.driver import Driver
from jaxdist.paramserver.processes.reports import Statistics
from jaxdist.paramserver.processes.run_folder import Spec
from jaxdist.paramserver.wire.security import Security
from jaxdist.paramserver.wire.streams import Wire, reuse_freed_memory

Make = Callable[[str, Spec], tuple[Driver, Statistics]]


def main(arguments: list[str], make: Make) -> int:
    """Run the role that `make` returns; return the exit status."""
    name, path = arguments
    reuse_freed_memory()
    logging.basicConfig(level=logging.INFO, format=f"{name}: %(message)s", stream=sys.stderr)
    spec = Spec.read(pathlib.Path(path))
    driver, statistics = make(name, spec)
    logger = logging.getLogger(__name__)
    try:
        wire = Wire(
            listen=spec.peers[name],
            peers=spec.peers,
            receive=driver.receive,
            security=Security.read(os.environ).for_attempt(spec.attempt),
        )
    except OSError as error:
        logger.error(str(error))
        return 1
    end = driver.run(wire)
    statistics.write()
    wire.flush(5.0)
    wire.close()
    if end.step < 0:
        logger.error(end.reason)
    return 0 if end.step >= 0 else 1
