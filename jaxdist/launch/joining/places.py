"""Which job this process belongs to, read from its environment by one function, `find`.

In order: our own launcher, the variables JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, and what JAX
knows of Open MPI, SLURM, Cloud TPU and Kubernetes. A process that is one of several, but has no
address of the coordinator, is refused: otherwise each of them would train a whole model by itself.
"""

import dataclasses
import os
from collections.abc import Mapping

from jaxdist.errors import UserError
from jaxdist.spmd import jax_private

PROCESS_ID, NUM_PROCESSES, COORDINATOR = "JAXDIST_PROCESS_ID", "JAXDIST_NUM_PROCESSES", "JAXDIST_COORDINATOR"
"""Environment variables with which our launcher tells a process its place in the job."""

MEETING, FIRST, ALL = "JAXDIST_MEETING", "JAXDIST_FIRST_PROCESS", "JAXDIST_ALL_PROCESSES"
"""The same for a job on several hosts: the coordinator, the first process of this host, and the number on all hosts."""

JAX_ADDRESS, JAX_PROCESSES, JAX_ID = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
BIND_ADDRESS = "JAX_COORDINATOR_BIND_ADDRESS"
PORT = "JAX_COORDINATOR_PORT"
LAUNCHER = "jaxdist"
LOOPBACK = "127.0.0.1"

_FIND_SECONDS = 300
_NAMES = {
    "OmpiCluster": "Open MPI",
    "SlurmCluster": "SLURM",
    "GkeTpuCluster": "Cloud TPU (GKE)",
    "GceTpuCluster": "Cloud TPU",
    "K8sCluster": "Kubernetes",
}
_TASKS = (
    ("Open MPI", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    ("MPI", "PMI_SIZE", "PMI_RANK"),
    ("SLURM", "SLURM_NTASKS", "SLURM_PROCID"),
)
"""The variables of engines for the number of processes and of this one; for engines that JAX does not recognise."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Place:
    """A process's place in a job of several.

    Attributes:
      engine: what started the job, for messages.
      coordinator: HOST:PORT where the processes meet; process 0 listens there.
      num_processes: of the job.
      process_id: this one's number.
      bind_address: the address at which process 0 listens, if it differs from `coordinator` on its own machine.
      local_device_ids: the accelerators of this host that belong to this process; None for all.
    """

    engine: str
    coordinator: str
    num_processes: int
    process_id: int
    bind_address: str
    local_device_ids: tuple[int, ...] | None = None

    def __str__(self) -> str:
        return f"process {self.process_id} of {self.num_processes}, by {self.engine}, coordinator {self.coordinator}"


def find() -> Place | None:
    """Return the place of this process in its job, None if it is not part of one.

    Raises:
      UserError: it is one of several, but the environment names no coordinator, or contradicts itself.
    """
    environment = os.environ
    if MEETING in environment:
        number = int(environment[FIRST]) + int(environment[PROCESS_ID])
        return _place("jaxdist launch --hosts", environment[MEETING], environment[ALL], str(number))
    if NUM_PROCESSES in environment:
        # A job of our launcher listens at the launcher's address; the variables of the user are for other jobs.
        ours = _place(LAUNCHER, environment[COORDINATOR], environment[NUM_PROCESSES], environment[PROCESS_ID])
        return ours if ours.num_processes > 1 else None
    engine = _detect()
    place = _stated(environment, engine) if JAX_ADDRESS in environment else _detected(engine)
    if place is None:
        _refuse_part_of_a_job(environment)
        return None
    return dataclasses.replace(place, bind_address=environment.get(BIND_ADDRESS, place.coordinator))


def _stated(environment: Mapping[str, str], engine: jax_private.Engine | None) -> Place:
    """Return the place in the JAX_ variables; the numbers may come from the variables of an engine instead."""
    count, number = environment.get(JAX_PROCESSES), environment.get(JAX_ID)
    name = JAX_ADDRESS
    for tasks, count_name, number_name in _TASKS:
        if count is None and number is None and count_name in environment and number_name in environment:
            count, number, name = environment[count_name], environment[number_name], tasks
    if count is None and number is None and engine is not None:
        count, number, name = str(engine.get_process_count()), str(engine.get_process_id()), _name(engine)
    missing = [name for name, value in ((JAX_PROCESSES, count), (JAX_ID, number)) if value is None]
    if count is None or number is None:
        raise UserError(
            f"{JAX_ADDRESS} makes this process part of a job, which needs {JAX_PROCESSES} and {JAX_ID} too; "
            f"{' and '.join(missing)} is not set. Set it, or unset {JAX_ADDRESS} to train alone."
        )
    return _place(name, environment[JAX_ADDRESS], count, number)


def _detected(engine: jax_private.Engine | None) -> Place | None:
    if engine is None:
        return None
    try:
        count = engine.get_process_count()
        if count == 1:
            return None
        address = engine.get_coordinator_address(_FIND_SECONDS, os.environ.get(PORT))
    except (RuntimeError, OSError, KeyError) as error:
        raise UserError(
            f"This process belongs to a job of {_name(engine)}, but JAX cannot find its coordinator: {error} Set "
            f"{JAX_ADDRESS} to HOST:PORT of process 0, the same for all."
        ) from error
    place = _place(_name(engine), address, str(count), str(engine.get_process_id()))
    number = None if jax_private.is_on_cloud_tpu() else engine.get_local_process_id()
    return dataclasses.replace(place, local_device_ids=None if number is None else (number,))


def _detect() -> jax_private.Engine | None:
    """Return the engine that JAX recognises, except a Kubernetes pod without a Job, for example a notebook."""
    for engine in jax_private.known_engines():
        in_a_job = engine.__name__ != "K8sCluster" or "JOB_COMPLETION_INDEX" in os.environ
        if not engine.opt_in_only_method and in_a_job and engine.is_env_present():
            return engine
    return None


def _name(engine: jax_private.Engine) -> str:
    return _NAMES.get(engine.__name__, engine.__name__)


def _refuse_part_of_a_job(environment: Mapping[str, str]) -> None:
    for name in (JAX_PROCESSES, JAX_ID):
        if name in environment:
            raise UserError(
                f"{name} makes this process part of a job, which needs {JAX_ADDRESS} too; it is not set. Set it to "
                f"HOST:PORT of process 0, or unset {name} to train alone."
            )
    for engine, count, number in _TASKS:
        size = environment.get(count, "1")
        if not size.isdigit() or int(size) < 2:
            continue
        if engine == "SLURM":
            raise UserError(
                f"This is a SLURM job of {size} tasks, but this process is not one of them. Start it with srun, or "
                f"unset {count} to train alone."
            )
        if number in environment:
            raise UserError(
                f"{engine} started this process as one of {size}, but JAX cannot find their coordinator. Set "
                f"{JAX_ADDRESS} to HOST:PORT, a free port of the host of process 0, the same for all."
            )


def _place(engine: str, coordinator: str, count: str, number: str) -> Place:
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit():
        raise UserError(f"The coordinator of a job must be HOST:PORT, got {coordinator!r}. Name the host of process 0.")
    if not (count.isdigit() and number.isdigit() and int(number) < int(count)):
        raise UserError(
            f"A job of N processes numbers them 0 to N - 1; got process {number!r} of {count!r}. Correct the variables."
        )
    return Place(
        engine=engine,
        coordinator=coordinator,
        num_processes=int(count),
        process_id=int(number),
        bind_address=coordinator,
    )
