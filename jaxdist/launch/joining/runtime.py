"""Preparing this process before JAX's backend starts: devices, threads, compilation cache, the job it belongs to."""

import contextlib
import hashlib
import os
import pathlib
import platform
import sys
import threading
import traceback
import types
from collections.abc import Callable, MutableMapping, Sequence
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from jaxdist.errors import ExitStatus, UserError, say
from jaxdist.launch import parent
from jaxdist.launch.joining import compile_turns, coordinator, places, same_on_all
from jaxdist.rundir import files
from jaxdist.spmd import jax_private
from jaxdist.spmd.canonical import thread_pool

PROCESS_ID, NUM_PROCESSES, COORDINATOR = places.PROCESS_ID, places.NUM_PROCESSES, places.COORDINATOR

LOG = "JAXDIST_LOG"
"""Environment variable: the file that takes what native code prints in a process that shares the user's terminal."""
MOST_DEVICES = 4096
"""So many fake CPU devices take 0.6 GB and three seconds before anything is computed."""
LEAST_COMPILE_SECONDS = 0.0
"""Every program is cached, even a small one: at a restart the whole job waits for every compilation."""
_COLLECTIVE_FLAG = "xla_gpu_nccl_termination_timeout_seconds"
_COLLECTIVE_SECONDS = 7200
"""More than the watchdog allows a process to compile, evaluate or save while the others wait in a collective."""
_CHANGING = ("processor", "cpu MHz", "core id", "apicid", "initial apicid", "bogomips", "BogoMIPS", "physical id")
"""Lines of /proc/cpuinfo that say nothing on the kind of a processor."""
_LEAVE_SECONDS = 3.0
"""How long a process that exits because of an error waits for the others to exit too."""


def is_alone() -> bool:
    """Return whether no launcher of ours started this process."""
    return parent.PARENT_ID not in os.environ


def is_first() -> bool:
    """Return whether this is process 0, or the only process."""
    return jax.process_index() == 0


def start(num_devices: int | None = None, *, threads: Callable[[], int | None] = lambda: None) -> Sequence[jax.Device]:
    """Prepare JAX, join the job if this process belongs to one, and return the devices to train on, of all processes.

    It must run before JAX is asked for its devices.

    Args:
      num_devices: devices of each process. Without accelerators, this number of fake CPU devices is made; with them,
        the first ones are used. None uses every accelerator, or one CPU device.
      threads: called once the job is joined, returns the number of XLA's threads for CPU devices, the same in all
        processes; None leaves it to XLA, or as it was fixed before.

    Raises:
      UserError: there are fewer accelerators than `num_devices`, or it is above MOST_DEVICES.
    """
    _prepare(num_devices)
    place = places.find()
    if place is not None and not jax.distributed.is_initialized():
        _join_job(place)
    wanted = threads()
    if wanted is not None and not jax_private.has_started():
        thread_pool.fix(wanted)
    use_compilation_cache(num_devices or 1)
    if jax.distributed.is_initialized():  # by us, or by the caller, for example Ray Train
        _compare_and_meet(num_devices, same_threads=wanted is not None)
    return first_of_each_process(num_devices or jax.local_device_count(), jax.local_devices(), jax.devices())


def start_by_itself(num_devices: int, threads: int = thread_pool.LEAST) -> Sequence[jax.Device]:
    """Do as `start`, but join no job: a worker of a parameter server is not part of the job that it runs in."""
    _prepare(num_devices)
    thread_pool.fix(threads)  # the machines of a run may have other numbers of cores
    use_compilation_cache(num_devices)
    return first_of_each_process(num_devices, jax.local_devices(), jax.devices())


def _prepare(num_devices: int | None) -> None:
    if num_devices and num_devices > MOST_DEVICES:
        raise UserError(
            f"A process has at most {MOST_DEVICES:,} devices; --devices asks for {num_devices:,}. What more of them "
            "would need, jaxdist plan says."
        )
    if len(os.sched_getaffinity(0)) == 1:  # with one thread XLA generates other code
        os.environ.setdefault("NPROC", "2")
    _bound_gpu_collectives(os.environ)
    jax.config.update("jax_num_cpu_devices", num_devices or 1)
    if not is_alone():
        parent.die_with_parent()


def _bound_gpu_collectives(environment: MutableMapping[str, str]) -> None:
    """Have XLA end a process whose GPU collective does not end, unless the user has set the flag."""
    flags = environment.get("XLA_FLAGS", "")
    if _COLLECTIVE_FLAG not in flags:
        environment["XLA_FLAGS"] = f"{flags} --{_COLLECTIVE_FLAG}={_COLLECTIVE_SECONDS}".strip()


def first_of_each_process(
    wanted: int, local: Sequence[jax.Device], everywhere: Sequence[jax.Device]
) -> Sequence[jax.Device]:
    """Return the first `wanted` devices of each process; raise UserError if this one (`local`) has fewer."""
    if wanted > len(local):
        raise UserError(
            f"--devices asks for {wanted} devices per process, but this machine has {len(local)} "
            f"({local[0].device_kind}). Ask for at most {len(local)}, or set JAX_PLATFORMS=cpu for fake CPU devices."
        )
    by_process: dict[int, list[jax.Device]] = {}
    for device in everywhere:
        by_process.setdefault(device.process_index, []).append(device)
    return [device for _, devices in sorted(by_process.items()) for device in devices[:wanted]]


def use_compilation_cache(num_devices: int) -> None:
    """Keep compiled programs on disk between runs, unless the user has configured the cache of JAX.

    Those for `num_devices` CPU devices belong to the number of XLA's threads.
    """
    if jax.config.values["jax_compilation_cache_dir"] is None:
        jax.config.update("jax_compilation_cache_dir", str(files.cache_folder() / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", LEAST_COMPILE_SECONDS)
        jax_private.take_turns_compiling(compile_turns.turn)
    jax_private.share_cache_keys(f"{_processor()} {thread_pool.size(num_devices)}")


def _processor(cpuinfo: pathlib.Path = pathlib.Path("/proc/cpuinfo")) -> str:
    """Return what the machine code of programs for the CPU is made for."""
    text = cpuinfo.read_text().partition("\n\n")[0] if cpuinfo.exists() else platform.processor()
    kind = [line for line in text.splitlines() if not line.startswith(_CHANGING)]
    return hashlib.sha256("\n".join([platform.machine(), *kind]).encode()).hexdigest()


def keep_native_output_apart() -> None:
    """Let native code print to this process's log, or to standard error without one; Python prints as before.

    Gloo and the coordination service say on both streams what only a developer can read. `sys.__stderr__`, and so
    what `print_for_developers` prints, goes to the log, too.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    sys.stdout = os.fdopen(os.dup(1), "w", buffering=1)
    if LOG in os.environ:
        with contextlib.suppress(OSError):  # on a full disk the terminal has to do
            log = os.open(os.environ[LOG], os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
            sys.stderr = os.fdopen(os.dup(2), "w", buffering=1, errors="backslashreplace")
            os.dup2(log, 2)
            os.close(log)
    os.dup2(2, 1)


def print_for_developers(error: BaseException) -> None:
    """Print the traceback to the log: where other processes fail first, it tells a user nothing, or the wrong thing."""
    with contextlib.suppress(OSError, ValueError):
        traceback.print_exception(error, file=sys.__stderr__)


def _join_job(place: places.Place) -> None:
    keep_native_output_apart()
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # JAX's preemption service would consume SIGTERM, which we handle ourselves.
    jax.config.update("jax_enable_preemption_service", False)
    if place.process_id == 0 and place.engine != places.LAUNCHER:
        say(place)
    coordinator.join(place)
    sys.excepthook = _fail_at_once


def _compare_and_meet(num_devices: int | None, *, same_threads: bool) -> None:
    same_on_all.compare("start", same_on_all.of_start(num_devices))
    local = jax.local_devices()
    facts: dict[str, Any] = {"devices": num_devices or len(local), "kind of device": local[0].device_kind}
    if local[0].platform == "cpu":  # its kind does not tell which instructions XLA compiles to
        facts["CPU instructions"] = same_on_all.instructions()
        if same_threads:
            facts["XLA's threads (PJRT_NPROC)"] = thread_pool.size(len(local))
    same_on_all.compare("devices", facts)
    _meet()


def leave(exit_status: int) -> NoReturn:
    """End this process; if it has failed, it waits for the other processes for a short time at most.

    A normal exit of Python would wait for them, up to five minutes, in the shutdown of JAX, while they may wait for
    this process in a collective. If all processes exit because of the same user error, they disconnect properly.
    """
    if exit_status in (ExitStatus.OK, ExitStatus.RETRY) or not jax.distributed.is_initialized():
        sys.exit(exit_status)
    sys.stdout.flush()
    sys.stderr.flush()
    if exit_status == ExitStatus.USER:
        timer = threading.Timer(_LEAVE_SECONDS, os._exit, [exit_status])
        timer.daemon = True
        timer.start()
        jax.distributed.shutdown()
    os._exit(exit_status)


def _fail_at_once(kind: type[BaseException], error: BaseException, trace: types.TracebackType | None) -> None:
    del kind, trace
    print_for_developers(error)
    leave(1)


def _meet() -> None:
    """Run one collective over all devices while every process is at the same point.

    Gloo connects the processes at their first collective and allows 30 seconds for all to reach it. Connected now,
    they may take any time to compile the first step.
    """
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()), ("device",))
    ones = jax.make_array_from_callback(
        (mesh.size,), jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("device")), lambda index: np.ones(1)
    )
    jax.block_until_ready(jax.jit(jnp.sum)(ones))
