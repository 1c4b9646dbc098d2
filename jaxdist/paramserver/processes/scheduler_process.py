"""The scheduler's process: `python -m jaxdist.paramserver.processes.scheduler_process scheduler SPEC`.

It imports neither JAX nor the experiment, so it restarts quickly after a crash.
"""

import contextlib
import pathlib
import sys
from collections.abc import Iterator

from jaxdist.errors import UserError
from jaxdist.launch import parent, signals
from jaxdist.paramserver.processes import faults, lease_history, role
from jaxdist.paramserver.processes.driver import Driver
from jaxdist.paramserver.processes.process_world import Log, ProcessWorld
from jaxdist.paramserver.processes.reports import ReportFiles, statistics_of
from jaxdist.paramserver.processes.run_folder import LOG_NAME, Spec
from jaxdist.paramserver.protocol import effects
from jaxdist.paramserver.protocol.scheduler.scheduler import Scheduler
from jaxdist.paramserver.wire import encoding, log_frames


def make_scheduler(name: str, spec: Spec) -> role.Cast:
    """Return the driver of the scheduler, restored from its log, its world and its counters."""
    directory = pathlib.Path(spec.directory)
    settings = spec.make_settings()
    # Only Ray starts the scheduler again elsewhere, when its node is lost.
    with _telling_of_damage(directory / LOG_NAME):
        log = Log(directory / LOG_NAME, outlives_machine=settings.engine == "ray")
    resume = None
    if spec.resume and not log.records:
        resume = encoding.decode((directory / spec.resume / "manifest").read_bytes())
    machine = Scheduler(settings=settings, records=log.records, resume=resume)
    statistics = statistics_of(name, spec, machine)
    report = ReportFiles(directory, spec.make_clock(), ledger=spec.ledger)

    with _telling_of_damage(log.path):
        report.catch_up(machine, log.records)

    def observe(effect: effects.Effect) -> None:
        statistics.observe(effect)
        report.observe(effect)

    point = faults.faults_of(name, directory)
    world = ProcessWorld(directory, log=log)
    watched = lease_history.watched(name, machine, spec)
    return Driver(watched, world, observe=observe, point=point), world, statistics


@contextlib.contextmanager
def _telling_of_damage(path: pathlib.Path) -> Iterator[None]:
    """Raise as a UserError what is wrong with the log: without its last decisions, steps would be made twice."""
    try:
        yield
    except log_frames.DamagedLogError as error:
        raise UserError(
            f"The log of the scheduler, {path}, is damaged. {error} The run ends; --resume continues from the "
            "newest checkpoint or saved cut."
        ) from error


if __name__ == "__main__":
    parent.die_with_parent()
    signals.leave_to_parent()  # servers must live to be saved
    sys.exit(role.main(sys.argv[1:], make_scheduler))
