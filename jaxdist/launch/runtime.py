"""Preparing this process before JAX's backend starts: devices, threads, compilation cache, the job it belongs to."""

import ctypes
import os
import pathlib
import signal
import sys
import types
from collections.abc import Mapping, Sequence
from typing import NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from jaxdist.errors import UserError

PROCESS_ID, NUM_PROCESSES, COORDINATOR = "JAXDIST_PROCESS_ID", "JAXDIST_NUM_PROCESSES", "JAXDIST_COORDINATOR"
PARENT_ID = "JAXDIST_PARENT_ID"
"""Environment variables by which a launcher tells a process its place in the job, and whose child it is."""

LEAST_COMPILE_SECONDS = 0.5


def in_job(environment: Mapping[str, str] = os.environ) -> bool:
    """Return whether this process was started by our launcher as one of several."""
    return NUM_PROCESSES in environment


def is_alone(environment: Mapping[str, str] = os.environ) -> bool:
    """Return whether no launcher of ours started this process."""
    return PARENT_ID not in environment


def is_first(environment: Mapping[str, str] = os.environ) -> bool:
    """Return whether this process speaks for the job: the only one, or process 0."""
    return environment.get(PROCESS_ID, "0") == "0"


def start(num_devices: int | None = None) -> Sequence[jax.Device]:
    """Prepare JAX, join the job if this process belongs to one, and return the devices to train on, of all processes.

    Must run before anything asks JAX for its devices.

    Args:
      num_devices: devices of each process. Without accelerators that many fake CPU devices are made; with them the
        first that many are taken. None takes what is there: every accelerator, or one CPU device.

    Raises:
      UserError: more devices are asked for than there are accelerators.
    """
    # XLA sizes its thread pool by PJRT_NPROC, NPROC or the usable cores; with exactly one thread it generates other
    # code, and canonical reduction would give other bits on a one-core machine.
    if len(os.sched_getaffinity(0)) == 1:
        os.environ.setdefault("NPROC", "2")
    jax.config.update("jax_num_cpu_devices", num_devices or 1)
    use_compilation_cache()
    if not is_alone():
        die_with_parent(os.environ)
    if in_job() and os.environ[NUM_PROCESSES] != "1":
        _join_job(os.environ)
    return first_of_each_process(num_devices or jax.local_device_count(), jax.local_devices(), jax.devices())


def first_of_each_process(
    wanted: int, local: Sequence[jax.Device], everywhere: Sequence[jax.Device]
) -> Sequence[jax.Device]:
    """Return the first `wanted` devices of each process; UserError where this one has fewer (`local`)."""
    if wanted > len(local):
        raise UserError(
            f"--devices asks for {wanted} devices per process, but this machine has {len(local)} "
            f"({local[0].device_kind}). Ask for at most {len(local)}, or set JAX_PLATFORMS=cpu for fake CPU devices."
        )
    by_process: dict[int, list[jax.Device]] = {}
    for device in everywhere:
        by_process.setdefault(device.process_index, []).append(device)
    return [device for _, devices in sorted(by_process.items()) for device in devices[:wanted]]


def use_compilation_cache() -> None:
    """Keep compiled programs on disk between runs, unless the user has configured JAX's cache."""
    if jax.config.values["jax_compilation_cache_dir"] is None:
        home = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(home / "jaxdist" / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", LEAST_COMPILE_SECONDS)


def _keep_standard_output_clean() -> None:
    """Send what native code prints to standard error: gloo announces its connections on standard output."""
    sys.stdout.flush()
    ours = os.dup(1)
    os.dup2(2, 1)
    sys.stdout = os.fdopen(ours, "w", buffering=1)


def die_with_parent(environment: Mapping[str, str]) -> None:
    """Have the kernel kill this process when its launcher dies: nobody else would end a process in a collective."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if PARENT_ID in environment and os.getppid() != int(environment[PARENT_ID]):
        sys.exit("The launcher of this process has ended already.")


def _join_job(environment: Mapping[str, str]) -> None:
    _keep_standard_output_clean()
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # JAX's preemption service would swallow SIGTERM; ours decides what a signal means.
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(
        coordinator_address=environment[COORDINATOR],
        # By default the coordinator would listen on every interface of the machine.
        coordinator_bind_address=environment[COORDINATOR],
        num_processes=int(environment[NUM_PROCESSES]),
        process_id=int(environment[PROCESS_ID]),
    )
    sys.excepthook = _fail_at_once
    _meet()


def leave(exit_status: int) -> NoReturn:
    """End this process; in a job of several, a failed one ends at once.

    Python's own way out would wait for the others, up to five minutes, in JAX's shutdown: they wait for this process in
    a collective, and its message would reach nobody.
    """
    if in_job() and exit_status:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_status)
    sys.exit(exit_status)


def _fail_at_once(kind: type[BaseException], error: BaseException, trace: types.TracebackType | None) -> None:
    sys.__excepthook__(kind, error, trace)
    leave(1)


def _meet() -> None:
    """Run one collective over all devices while every process is at the same place.

    Gloo connects the processes at their first collective and gives them 30 seconds to get there. Connected now, they
    may take as long as they need to compile the first step.
    """
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()), ("device",))
    ones = jax.make_array_from_callback(
        (mesh.size,), jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("device")), lambda index: np.ones(1)
    )
    jax.block_until_ready(jax.jit(jnp.sum)(ones))
