"""A server or worker process: `python -m jaxdist.paramserver.run.jax_process NAME SPEC`.

Both need JAX and the experiment; the scheduler needs neither and has its own module.
"""

import dataclasses
import pathlib
import sys
from typing import Any, cast

from jaxdist.config import hidden_settings, loading, overrides
from jaxdist.launch import parent, signals
from jaxdist.launch.joining import runtime
from jaxdist.paramserver.processes import faults, lease_history, role
from jaxdist.paramserver.processes.driver import Driver
from jaxdist.paramserver.processes.process_world import ProcessWorld, write_file
from jaxdist.paramserver.processes.reports import statistics_of
from jaxdist.paramserver.processes.run_folder import NONFINITE_NAME, Spec, next_boot
from jaxdist.paramserver.protocol import effects, messages
from jaxdist.paramserver.protocol.server import Server
from jaxdist.paramserver.protocol.settings import server_shard, worker_number
from jaxdist.paramserver.protocol.worker import Worker
from jaxdist.paramserver.run import shared_plan
from jaxdist.paramserver.run.island import Island
from jaxdist.paramserver.run.optimizer_kind import Kind


def make(name: str, spec: Spec) -> role.Cast:
    """Return the driver of the server or worker `name`, its world and its counters."""
    devices = runtime.start_by_itself(spec.devices)
    experiment = overrides.override(loading.load_experiment(spec.experiment), hidden_settings.reveal(spec.assignments))
    plan = shared_plan.make_plan(experiment, experiment.ps, kind=cast(Kind, spec.kind))
    plan = dataclasses.replace(plan, settings=spec.make_settings())
    boot = next_boot(pathlib.Path(spec.directory), name)
    number = worker_number(name)
    if number is not None:
        return _make_worker(number, boot, plan, devices, name, spec)
    return _make_server(name, boot, plan, spec)


def _make_worker(number: int, boot: int, plan: Any, devices: Any, name: str, spec: Spec) -> role.Cast:
    island = Island(plan, devices)
    machine = Worker(worker=number, boot=boot, settings=plan.settings)
    statistics = statistics_of(name, spec, machine)
    directory = pathlib.Path(spec.directory)

    def gradient(compute: effects.Compute) -> messages.Computed:
        computed = island.gradient(compute)
        if not computed.finite:
            # The report is written before the push, so that it exists when the run ends.
            path = directory / NONFINITE_NAME / f"worker-{number}.txt"
            write_file(path, [f"{name}. {island.explain_nonfinite(compute)}".encode()])
        return computed

    world = ProcessWorld(directory, gradient=gradient, prepare=island.prepare)
    point = faults.faults_of(name, directory)
    watched = lease_history.watched(name, machine, directory)
    return Driver(watched, world, observe=statistics.observe, point=point), world, statistics


def _make_server(name: str, boot: int, plan: Any, spec: Spec) -> role.Cast:
    shard = server_shard(name)
    assert shard is not None
    first = shared_plan.make_shard(plan, shard)
    start = first.export()

    def make_shard() -> Any:
        first.adopt(start)
        return first

    machine = Server(name=name, boot=boot, settings=plan.settings, make_shard=make_shard)
    statistics = statistics_of(name, spec, machine)
    directory = pathlib.Path(spec.directory)
    point = faults.faults_of(name, directory)
    world = ProcessWorld(directory)
    watched = lease_history.watched(name, machine, directory)
    return Driver(watched, world, observe=statistics.observe, point=point), world, statistics


if __name__ == "__main__":
    parent.die_with_parent()
    signals.leave_to_parent()  # servers must live to be saved
    sys.exit(role.main(sys.argv[1:], make))
