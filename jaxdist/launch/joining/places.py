"""Which job this process belongs to. Whoever started it left the answer in its environment; one function reads it.

In order: our own launcher, the variables JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, and what JAX
knows of Open MPI, SLURM, Cloud TPU and Kubernetes. A process that plainly is one of several, but cannot learn where the
others meet, is refused: it would train a whole model by itself, and so would each of the others.
"""

import dataclasses
import os
from collections.abc import Mapping

from jaxdist.errors import UserError
from jaxdist.spmd import jax_private

PROCESS_ID, NUM_PROCESSES, COORDINATOR = "JAXDIST_PROCESS_ID", "JAXDIST_NUM_PROCESSES", "JAXDIST_COORDINATOR"
"""Environment variables by which our launcher tells a process its place in the job."""

MEETING, FIRST, ALL = "JAXDIST_MEETING", "JAXDIST_FIRST_PROCESS", "JAXDIST_ALL_PROCESSES"
"""Further ones, in a job on several hosts: where to meet, this host's first process, and how many there are on all."""

JAX_ADDRESS, JAX_PROCESSES, JAX_ID = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
BIND_ADDRESS = "JAX_COORDINATOR_BIND_ADDRESS"
PORT = "JAX_COORDINATOR_PORT"
LAUNCHER = "jaxdist"

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
"""How engines number what they start: the number of processes, and this one's. For those JAX does not recognise."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Place:
    """A process's place in a job of several.

    Attributes:
      engine: who started the job, for people.
      coordinator: HOST:PORT where the processes meet; process 0 listens there.
      num_processes: of the job.
      process_id: this one's number.
      bind_address: where process 0 listens, if that is spelt otherwise on its own machine.
      local_device_ids: the accelerators of this host that are this process's; None for all.
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
    """Return this process's place in the job it belongs to, None if it is alone; the one function that decides.

    Raises:
      UserError: it is one of several, but the environment does not say where they meet, or contradicts itself.
    """
    environment = os.environ
    if MEETING in environment:
        number = int(environment[FIRST]) + int(environment[PROCESS_ID])
        return _place("jaxdist launch --hosts", environment[MEETING], environment[ALL], str(number))
    if NUM_PROCESSES in environment:
        # A job that we start listens where we say; what the user says of others is not meant for it.
        ours = _place(LAUNCHER, environment[COORDINATOR], environment[NUM_PROCESSES], environment[PROCESS_ID])
        return ours if ours.num_processes > 1 else None
    engine = _detect()
    place = _stated(environment, engine) if JAX_ADDRESS in environment else _detected(engine)
    if place is None:
        _refuse_part_of_a_job(environment)
        return None
    return dataclasses.replace(place, bind_address=environment.get(BIND_ADDRESS, place.coordinator))


def _stated(environment: Mapping[str, str], engine: jax_private.Engine | None) -> Place:
    """Return the place that the JAX_ variables state; an engine may number the processes instead."""
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
            f"{JAX_ADDRESS} makes this process one of a job, whose size and place must be known too; "
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
            f"This process belongs to a job of {_name(engine)}, but JAX cannot tell where the others meet: {error} Set "
            f"{JAX_ADDRESS} to HOST:PORT of process 0, the same for all."
        ) from error
    place = _place(_name(engine), address, str(count), str(engine.get_process_id()))
    number = None if jax_private.is_on_cloud_tpu() else engine.get_local_process_id()
    return dataclasses.replace(place, local_device_ids=None if number is None else (number,))


def _detect() -> jax_private.Engine | None:
    """Return what JAX recognises. It takes every pod of Kubernetes for a part of a Job; a notebook is none."""
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
                f"{name} makes this process one of a job, whose meeting point must be known too; {JAX_ADDRESS} is not "
                f"set. Set it to HOST:PORT of process 0, or unset {name} to train alone."
            )
    for engine, count, number in _TASKS:
        size = environment.get(count, "1")
        if not size.isdigit() or int(size) < 2:
            continue
        if engine == "SLURM":
            raise UserError(
                f"This is a SLURM job of {size} tasks, but this process is none of them. Start it with srun, or "
                f"unset {count} to train alone."
            )
        if number in environment:
            raise UserError(
                f"{engine} started this process as one of {size}, but JAX cannot tell where they meet. Set "
                f"{JAX_ADDRESS} to HOST:PORT, a free port of the host of process 0, the same for all."
            )


def _place(engine: str, coordinator: str, count: str, number: str) -> Place:
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit():
        raise UserError(f"The coordinator of a job is HOST:PORT; got {coordinator!r}. Name the host of process 0.")
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
