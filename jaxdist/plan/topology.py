"""Hardware that is not present: `cpu:64`, `tpu:v5e:16x16` and `gpu:h100:8` as devices that programs are compiled for.

Fake CPU devices are the host's own. For TPUs the compiler comes with the package libtpu, which needs no TPU; for GPUs
with JAX's CUDA plugin, which needs no GPU and is given a description of one (`jax.experimental.topologies`, an
ahead-of-time interface of JAX).
"""

import contextlib
import dataclasses
import difflib
import importlib.util
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
from jax.experimental import topologies

from jaxdist.errors import UserError
from jaxdist.launch.joining import runtime
from jaxdist.plan import chips
from jaxdist.plan.calibrated import calibration
from jaxdist.plan.calibrated.calibration import Calibration

EXAMPLES = (
    "cpu:8", "cpu:64", "tpu:v4:2x2x2", "tpu:v5e:4x4", "tpu:v5e:16x16", "tpu:v5p:4x4x4", "tpu:v6e:16x16",
    "gpu:a100:8", "gpu:h100:8", "gpu:h100:64", "gpu:h200:8", "gpu:b200:8",
)  # fmt: skip
LONGEST_SIDE = 16
"""Chips of a TPU's torus in one direction, at most."""
MOST_GPUS = 1024
MOST_CPU_DEVICES = 256
_CALIBRATION_SIZE = 768
_GPU_COMPILERS = ("jax_cuda13_plugin", "jax_cuda12_plugin")
_NOT_TUNED = (
    "Compiled for a description of the GPU, without one: kernels are not chosen by timing them, so those of a real GPU "
    "may use other temporary memory."
)
_WHERE_NO_TPU_IS = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_MIN_LOG_LEVEL": "3",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
"""Environment for libtpu, which would otherwise ask the cloud's metadata server, and run in one process at a time."""


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices to compile for.

    Attributes:
      name: as the user wrote it.
      devices: in order; nothing can run on those of a TPU or GPU.
      chip: what one of them can do.
      runs_here: whether a compiled program could run on this machine.
      note: what the compiler could not know; empty where it knows all.
      calibration: what its devices were measured to do; None where they were not.
    """

    name: str
    devices: Sequence[jax.Device]
    chip: chips.Chip
    runs_here: bool
    note: str = ""
    calibration: Calibration | None = None


def find(name: str) -> Topology:
    """Return the topology called `name`, such as `cpu:8`. Must be called before JAX's backend starts.

    Raises:
      UserError: there is no such topology, or the compiler for it is not installed.
    """
    platform, _, rest = name.partition(":")
    # Everything is computed on this machine's processor, even where it has accelerators.
    jax.config.update("jax_platforms", "cpu")
    if platform == "cpu" and rest.isdecimal() and 1 <= int(rest) <= MOST_CPU_DEVICES:
        devices = runtime.start_by_itself(int(rest))
        return Topology(name, devices, _this_machine(len(devices)), runs_here=True)
    kind, _, shape = rest.partition(":")
    if platform == "tpu" and kind in chips.TPUS:
        return _tpu(name, kind, shape)
    if platform == "gpu" and kind in chips.GPUS and shape.isdecimal() and _is_count_of_gpus(int(shape)):
        return _gpu(name, kind, int(shape))
    raise UserError(_unknown(name))


def _is_count_of_gpus(count: int) -> bool:
    return 1 <= count <= chips.HOST_GPUS or (count % chips.HOST_GPUS == 0 and 0 < count <= MOST_GPUS)


def _gpu(name: str, kind: str, count: int) -> Topology:
    if not any(importlib.util.find_spec(module) for module in _GPU_COMPILERS):
        raise UserError(
            f"{name} is compiled for by JAX's CUDA plugin, which is not installed. It needs no GPU: "
            "pip install 'jaxdist[gpu]'."
        )
    # The plugin otherwise prints that it found no driver, which nothing here needs.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    runtime.start_by_itself(1)
    return Topology(name, _described_gpus(name, kind, count), chips.GPUS[kind].chip, runs_here=False, note=_NOT_TUNED)


def _described_gpus(name: str, kind: str, count: int) -> Sequence[jax.Device]:
    on_host = min(count, chips.HOST_GPUS)
    shape, target = f"1x{count // on_host}x{on_host}", chips.GPUS[kind].target_config()
    try:
        described = topologies.get_topology_desc("", platform="cuda", topology=shape, target_config=target)
    except Exception as error:  # the plugin's own, of several kinds
        raise UserError(f"The CUDA plugin cannot describe {name!r}: {error}. {_known()}") from error
    return described.devices


def _tpu(name: str, kind: str, shape: str) -> Topology:
    _check_sides(name, shape)  # before anything is started
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f"{name} is compiled for by libtpu, which is not installed. It needs no TPU: pip install 'jaxdist[tpu]'."
        )
    for variable, value in _WHERE_NO_TPU_IS.items():
        os.environ.setdefault(variable, value)
    runtime.start_by_itself(1)
    return Topology(name, _described(name, kind, shape), chips.TPUS[kind], runs_here=False)


@contextlib.contextmanager
def _without_native_output() -> Iterator[None]:
    """Within it, what native code prints on standard error is dropped: libtpu asks there for a TPU's settings."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _check_sides(name: str, shape: str) -> None:
    sides = shape.split("x")
    if not all(side.isdecimal() and int(side) > 0 for side in sides):
        raise UserError(_unknown(name))
    longest = max(map(int, sides))
    if longest > LONGEST_SIDE:  # libtpu would end the process
        nearest = f"{name.removesuffix(shape)}{'x'.join(str(min(int(side), LONGEST_SIDE)) for side in sides)}"
        raise UserError(
            f"{name} has a side of {longest} chips, and libtpu compiles for at most {LONGEST_SIDE}. "
            f"The nearest that it can is {nearest!r}. {_known()}"
        )


def _described(name: str, kind: str, shape: str) -> Sequence[jax.Device]:
    _check_sides(name, shape)
    try:
        with _without_native_output():
            return topologies.get_topology_desc(f"{kind}:{shape}", "tpu").devices
    except Exception as error:  # libtpu's own, of several kinds
        raise UserError(
            f"libtpu cannot describe {name!r}: {error}. The nearest that it can is {_nearest(name)!r}. {_known()}"
        ) from error


def calibrated(topology: Topology, *, show: Callable[[int, int, str], None]) -> Topology:
    """Return the topology with rates that its devices were measured to reach: now, or once before on this machine.

    Raises:
      UserError: its devices are not here.
    """
    if not topology.runs_here:
        raise UserError(
            f"--calibrate measures the devices of this machine, and those of {topology.name} are not here. "
            "Leave it out: times are then bounds, from the chip's data sheet."
        )
    return dataclasses.replace(topology, calibration=calibration.find(topology.devices, show=show))


def with_devices(topology: Topology, count: int) -> Topology:
    """Return a topology of the same kind with `count` devices, near a square or a cube.

    Raises:
      UserError: the kind has none of that size.
    """
    platform, _, rest = topology.name.partition(":")
    if platform == "cpu":
        if count > len(topology.devices):
            raise UserError(
                f"--sweep-devices takes up to {len(topology.devices)} devices of {topology.name}; got {count}. "
                f"Name a larger topology, cpu:{count}."
            )
        return dataclasses.replace(topology, name=f"cpu:{count}", devices=topology.devices[:count])
    kind = rest.partition(":")[0]
    if platform == "gpu":
        name = f"gpu:{kind}:{count}"
        if not _is_count_of_gpus(count):
            raise UserError(_unknown(name))
        return dataclasses.replace(topology, name=name, devices=_described_gpus(name, kind, count))
    shape = "x".join(map(str, even_factors(count, chips.TPUS[kind].dims)))
    name = f"tpu:{kind}:{shape}"
    return dataclasses.replace(topology, name=name, devices=_described(name, kind, shape))


def even_factors(count: int, dims: int) -> tuple[int, ...]:
    """Return `dims` factors of `count`, ascending, as equal as they can be: 32 is 4 x 8, and 2 x 4 x 4."""
    if dims == 1:
        return (count,)
    divisors = (each for each in range(1, count + 1) if count % each == 0 and each**dims <= count)
    first = max(divisors)
    return tuple(sorted((first, *even_factors(count // first, dims - 1))))


def _unknown(name: str) -> str:
    return f"There is no topology {name!r}. Did you mean {_nearest(name)!r}? {_known()}"


def _nearest(name: str) -> str:
    """Return the topology whose name is most like `name`; of CPU devices and GPUs with as many as there may be."""
    nearest = difflib.get_close_matches(name.strip().lower(), EXAMPLES, n=1, cutoff=0.0)[0]
    platform, _, count = name.rpartition(":")
    if not count.isdecimal() or not int(count) or nearest.rpartition(":")[0] != platform.strip().lower():
        return nearest
    if platform == "cpu":
        return f"cpu:{min(int(count), MOST_CPU_DEVICES)}"
    hosts = min(-(-int(count) // chips.HOST_GPUS) * chips.HOST_GPUS, MOST_GPUS)
    return f"{nearest.rpartition(':')[0]}:{int(count) if _is_count_of_gpus(int(count)) else hosts}"


def _known() -> str:
    return (
        f"A topology is cpu:N with N up to {MOST_CPU_DEVICES}; tpu:KIND:SHAPE with KIND one of "
        f"{', '.join(chips.TPUS)}; or gpu:KIND:N with KIND one of {', '.join(chips.GPUS)} and N up to "
        f"{chips.HOST_GPUS} or a multiple of it up to {MOST_GPUS}. For example {', '.join(EXAMPLES)}."
    )


def _this_machine(num_devices: int) -> chips.Chip:
    """Return what one fake device gets of this machine, measured: all devices share its cores and its memory."""
    flops, copied = _measure_matmul(), _measure_copy()
    share = 1 / num_devices
    return chips.Chip("cpu", None, flops * share, copied * share, copied * share, 1, "measured on this machine")


def _measure_matmul() -> float:
    size = _CALIBRATION_SIZE
    multiply = jax.jit(lambda a: a @ a)
    matrix = jax.device_put(np.ones((size, size), np.float32), jax.devices()[0])
    return 2 * size**3 / _least_seconds(lambda: multiply(matrix).block_until_ready())


def _measure_copy() -> float:
    source, target = np.ones(1 << 22, np.float64), np.empty(1 << 22, np.float64)
    return 2 * source.nbytes / _least_seconds(lambda: np.copyto(target, source))


def _least_seconds(work: Callable[[], object], repeats: int = 15) -> float:
    """Return the least of some times: what follows from it is a bound also where other programs run."""
    work()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds)
