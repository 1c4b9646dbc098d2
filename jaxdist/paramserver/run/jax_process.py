"""A server or worker process: `python -m jaxdist.paramserver.run.jax_process NAME SPEC`.

Both need JAX and the experiment; the scheduler needs neither and has its own module.
"""

import dataclasses
import pathlib
import signal
import sys
from types import FrameType
from typing import Any, cast

import jax
import numpy as np

from jaxdist.config import hidden_settings, loading, overrides
from jaxdist.errors import UserError
from jaxdist.launch import own_cores, parent, signals
from jaxdist.launch.joining import runtime
from jaxdist.paramserver.processes import faults, lease_history, peer_addresses, role
from jaxdist.paramserver.processes.driver import Driver
from jaxdist.paramserver.processes.process_world import ProcessWorld, write_file
from jaxdist.paramserver.processes.reports import statistics_of
from jaxdist.paramserver.processes.run_folder import NONFINITE_NAME, Spec, next_boot
from jaxdist.paramserver.protocol import effects, messages
from jaxdist.paramserver.protocol.scheduler import lease_table
from jaxdist.paramserver.protocol.server import Server
from jaxdist.paramserver.protocol.settings import Settings, server_shard, worker_name, worker_number
from jaxdist.paramserver.protocol.worker import Worker
from jaxdist.paramserver.run import shared_plan
from jaxdist.paramserver.run.island import Island
from jaxdist.paramserver.run.optimizer_kind import Kind


def make(name: str, spec: Spec) -> role.Cast:
    """Return the driver of the server or worker `name`, its world and its counters."""
    devices = runtime.start_by_itself(spec.devices, spec.threads)
    experiment = overrides.override(loading.load_experiment(spec.experiment), hidden_settings.reveal(spec.assignments))
    plan = shared_plan.make_plan(experiment, experiment.ps, kind=cast(Kind, spec.kind))
    plan = dataclasses.replace(plan, settings=spec.make_settings())
    number = worker_number(name)
    if number is not None:
        _check_data(plan, spec)
        return _make_worker(number, plan, devices, name, spec)
    return _make_server(name, plan, spec)


def _check_data(plan: shared_plan.Plan, spec: Spec) -> None:
    """Raise UserError if the training data of this machine are not those of the run."""
    found = plan.loader.beginning.fingerprint
    if spec.data and found != spec.data:
        raise UserError(
            f"All workers of a run must read the same training data; their fingerprint is {found} here and {spec.data} "
            "in the run. Copy the data of the run to this machine, or correct their path."
        )


def _compile(island: Island, plan: shared_plan.Plan) -> None:
    """Compute a gradient of zeros, so that a worker joins a run that trains only when it is ready to compute."""
    zeros = [np.zeros(shape, dtype) for shape, dtype in zip(plan.sharding.shapes, plan.sharding.dtypes, strict=True)]
    params = tuple(tuple(pieces) for pieces in plan.sharding.split(zeros))
    island.gradient(effects.Compute(0, 0, lease_table.lease(plan.settings, 0), params))


def _make_worker(number: int, plan: Any, devices: Any, name: str, spec: Spec) -> role.Cast:
    island = Island(plan, devices)
    if number >= plan.settings.workers:
        _compile(island, plan)
    directory = pathlib.Path(spec.directory)
    machine = Worker(worker=number, boot=next_boot(directory, name), settings=plan.settings)
    statistics = statistics_of(name, spec, machine)
    cores = _cores(number, devices, spec, plan.settings)

    def gradient(compute: effects.Compute) -> messages.Computed:
        computed = island.gradient(compute)
        # Not before the first one is compiled. Where workers are missing, this one has the cores of others, too.
        cores.keep(own=not (plan.settings.shards_report and machine.reports))
        if not computed.finite:
            # The report is written before the push, so that it exists when the run ends.
            path = directory / NONFINITE_NAME / f"worker-{number}.txt"
            write_file(path, [f"{name}. {island.explain_nonfinite(compute)}".encode()])
        return computed

    world = ProcessWorld(directory, gradient=gradient, prepare=island.prepare)
    point = faults.faults_of(name, directory)
    watched = lease_history.watched(name, machine, spec)
    return Driver(watched, world, observe=statistics.observe, point=point), world, statistics


def _cores(number: int, devices: Any, spec: Spec, settings: Settings) -> own_cores.OwnCores:
    """Return the cores of a worker: a share of those of its machine, as all workers that the run began with have."""
    known = peer_addresses.Addresses(spec.peers, pathlib.Path(spec.directory))
    hosts = {name: address.rpartition(":")[0] for name, address in known.items()}
    here = hosts.get(worker_name(number))
    workers = [each for each in range(settings.workers) if here and hosts.get(worker_name(each)) == here]
    if number not in workers or devices[0].platform != "cpu":
        return own_cores.OwnCores(0, 1)
    return own_cores.OwnCores(workers.index(number), len(workers))


def _make_server(name: str, plan: Any, spec: Spec) -> role.Cast:
    shard = server_shard(name)
    assert shard is not None
    first = shared_plan.make_shard(plan, shard)
    start = first.export()

    def make_shard() -> Any:
        first.adopt(start)
        return first

    directory = pathlib.Path(spec.directory)
    boot = next_boot(directory, name)  # last: its crew takes a process without a new number for one that starts
    machine = Server(name=name, boot=boot, settings=plan.settings, make_shard=make_shard)
    statistics = statistics_of(name, spec, machine)
    point = faults.faults_of(name, directory)
    world = ProcessWorld(directory)
    watched = lease_history.watched(name, machine, spec)
    return Driver(watched, world, observe=statistics.observe, point=point), world, statistics


class Leaving:
    """What SIGTERM does to a worker: it leaves the run after its step, also if it is still starting."""

    def __init__(self) -> None:
        self._asked, self._world = False, cast(ProcessWorld | None, None)

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Note the signal."""
        self._asked = True
        if self._world is not None:
            self._world.receive(messages.Retire())

    def make(self, name: str, spec: Spec) -> role.Cast:
        """Return what `make` returns, and have its world told of the signal."""
        made = make(name, spec)
        self._world = made[1]
        if self._asked:
            self._world.receive(messages.Retire())
        return made


if __name__ == "__main__":
    parent.die_with_parent()
    signals.leave_to_parent()  # servers must live to be saved
    # Each result is waited for at once; another thread to compute it would only cost two changes of threads.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    leaving = Leaving()
    if worker_number(sys.argv[1]) is not None:
        signal.signal(signal.SIGTERM, leaving.handle)
    sys.exit(role.main(sys.argv[1:], leaving.make))
