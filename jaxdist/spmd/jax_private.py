"""The one door to JAX's private modules: no other module imports `jax._src`.

Each function says why JAX's public API does not suffice. `tests/spmd/test_jax_private.py` calls every one of them and
runs under each supported version of JAX, so that a change in a new version is found there first.
"""

import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np
from jax._src import cache_key as cache_keys
from jax._src import (
    cloud_tpu_init,
    clusters,
    compilation_cache,
    compiler,
    core,
    distributed,
    effects,
    source_info_util,
    xla_bridge,
)
from jax._src.interpreters import mlir, pxla
from jax._src.lib import _jax, xla_client
from jax.extend.mlir import ir, passmanager
from jax.sharding import Mesh, NamedSharding

Engine: TypeAlias = type[clusters.ClusterEnv]
Placement: TypeAlias = tuple[Any, Any]
"""Where an executable's replicas are to run: XLA's list of devices and its compile options."""


def coordinator_store() -> Any:
    """Return the key-value store of the job's coordinator, None outside a job.

    `jax.distributed` offers no store, and `multihost_utils` moves values by collectives, which must not run at the
    same time as those of a training step. Its methods: `key_value_set(key, text, allow_overwrite)`,
    `blocking_key_value_get(key, milliseconds)`, `key_value_try_get(key)`, `wait_at_barrier(name, milliseconds)`.
    """
    return distributed.global_state.client


def process_of_job() -> tuple[int, int]:
    """Return this process's number and how many there are in the job.

    `jax.process_index` and `jax.process_count` start JAX's backend, which must wait until the processes have compared
    their settings.
    """
    state = distributed.global_state
    return state.process_id, state.num_processes


def has_started() -> bool:
    """Return whether JAX's backend has started, which fixes its devices and threads; any public question starts it."""
    return bool(xla_bridge.backends_are_initialized())


def use_gloo_at(address: str) -> None:
    """Have the collectives between CPU devices of this job listen at `address`.

    `jax_cpu_collectives_implementation` creates gloo at the address that the machine's name resolves to.
    """

    def make_client() -> object:
        collectives = _jax.make_gloo_tcp_collectives(distributed.global_state.client, hostname=address)
        return xla_bridge.make_cpu_client(collectives)

    xla_bridge.register_backend_factory("cpu", make_client, priority=0, fail_quietly=False)


def array_of_parts(
    shape: tuple[int, ...], sharding: NamedSharding, devices: Sequence[jax.Device], parts: Sequence[np.ndarray]
) -> jax.Array:
    """Return the global array of this shape whose part on each of this process's `devices` is that of `parts`.

    The dtype of the parts must be one that devices have. `jax.device_put` of the whole array, or of its parts before
    `make_array_from_single_device_arrays`, gives the same, but takes five times as long: 28 us for a small array.
    """
    return pxla.batched_device_put(global_form(shape, parts[0].dtype, sharding), sharding, parts, devices)


@functools.lru_cache(maxsize=256)
def global_form(shape: tuple[int, ...], dtype: np.dtype, sharding: NamedSharding) -> Any:
    """Return the `aval` of a global array; JAX has no public name for it."""
    return core.update_aval_with_sharding(core.ShapedArray(shape, dtype), sharding)


def known_engines() -> Sequence[Engine]:
    """Return the engines (SLURM, Open MPI, ...) whose environment JAX can read, in the order in which it asks them.

    `jax.distributed.initialize` reads them too, but joins the job at once: it cannot be asked which job that is.
    """
    return tuple(clusters.ClusterEnv._cluster_types)


def is_on_cloud_tpu() -> bool:
    """Return whether this process runs on a Cloud TPU machine; no public name says so before the backend starts."""
    return bool(cloud_tpu_init.running_in_cloud_tpu_vm)


def placement(devices: Sequence[jax.Device], num_partitions: int = 1) -> Placement:
    """Return the placement of a program with one replica on each of `devices`, or on each `num_partitions` of them.

    Under `jax.jit` a program for many devices differs from the one for a single device.
    """
    options = compiler.get_compile_options(
        num_replicas=len(devices) // num_partitions,
        num_partitions=num_partitions,
        device_assignment=np.array([device.id for device in devices]).reshape(-1, num_partitions),
        backend=devices[0].client,
    )
    return xla_client.DeviceList(tuple(devices)), options


def compile_module(
    module: Any, devices: Sequence[jax.Device], num_partitions: int = 1, callbacks: Sequence[Any] = ()
) -> Any:
    """Return XLA's executable of a lowered module with a replica on each of `devices`, or on each `num_partitions` of
    them; serializable, which that of `Lowered.compile` may not be. `callbacks` are those of `python_of`.

    An executable that JAX loaded from its persistent cache cannot be serialized again (on CPU devices its kernels are
    lost; jaxlib 0.10 and 0.12), and `Lowered.compile` may return one of these.
    """
    device_list, options = placement(devices, num_partitions)
    return compiler.backend_compile_and_load(devices[0].client, module, device_list, options, callbacks)


class Python(NamedTuple):
    """What a program uses of this process: functions that it calls by number, and objects whose addresses it has."""

    callbacks: Sequence[Any] = ()
    kept: Sequence[Any] = ()


NO_PYTHON = Python()


def python_of(lowered: jax.stages.Lowered) -> Python:
    """Return what a lowered program uses of this process; another process can load one that uses nothing."""
    made = lowered._lowering.compile_args
    return Python(made["host_callbacks"] or (), made["keepalive"] or ())


def has_order(jaxpr: Any) -> bool:
    """Return whether a jaxpr has effects that happen in order, such as `jax.debug.print(..., ordered=True)`."""
    return bool(effects.ordered_effects.filter_in(jaxpr.effects))


def module_bytes(module: Any) -> bytes:
    """Return a lowered module as bytes, without the lines of code that it comes from; see `module_of`.

    `jax.export` serializes too, but lowers in another way, which gives other machine code.
    """
    with module.context:
        copy: Any = module.operation.clone()
        passmanager.PassManager.parse("builtin.module(strip-debuginfo)").run(copy.operation)
    return mlir.module_to_bytecode(copy)


def module_of(content: bytes) -> Any:
    """Return the module that `module_bytes` has written, in a process with the same version of JAX."""
    return ir.Module.parse(content, context=mlir.make_ir_context())


def load_executable(
    serialized: bytes, devices: Sequence[jax.Device], num_partitions: int = 1, callbacks: Sequence[Any] = ()
) -> Any:
    """Return the executable with a replica on each of `devices`, or on each `num_partitions` of them.

    `jax.experimental.serialize_executable` loads only onto as many devices as the program was compiled for.
    """
    return devices[0].client.deserialize_executable(serialized, *placement(devices, num_partitions), callbacks)


def share_cache_keys(cpu: str) -> None:
    """Give all processes of a job the same keys in JAX's persistent compilation cache, on CPU devices.

    By itself JAX makes keys from the topology and the device numbers that a process sees. In a job these differ, and as
    only process 0 writes entries, all others would compile every program again at each start. A program's partitions
    and the assignment of several devices stay in the key.

    Args:
      cpu: what else decides the machine code: the kind of the processor, and what XLA reads from the environment.
    """
    if hasattr(cache_keys._hash_accelerator_config, "by_jax"):
        return
    hash_accelerators, hash_options = cache_keys._hash_accelerator_config, cache_keys._hash_serialized_compile_options

    def hash_cpu(hash_obj: Any, accelerators: np.ndarray) -> None:
        if accelerators.flat[0].platform != "cpu":
            hash_accelerators(hash_obj, accelerators)
            return
        hash_obj.update(f"{cpu} {sorted(device.device_kind for device in accelerators.flat)}".encode())

    def hash_without_number(hash_obj: Any, options: Any, **settings: Any) -> None:
        assigned = options.device_assignment
        alone = assigned is not None and assigned.replica_count() * assigned.computation_count() == 1
        on_cpu = xla_bridge.default_backend() == "cpu"
        hash_options(hash_obj, options, **(settings | ({"strip_device_assignment": True} if alone and on_cpu else {})))

    hash_cpu.by_jax, hash_without_number.by_jax = hash_accelerators, hash_options  # type: ignore[attr-defined]
    cache_keys._hash_accelerator_config = hash_cpu
    cache_keys._hash_serialized_compile_options = hash_without_number  # type: ignore[assignment]


def take_turns_compiling(turn: Callable[[str], AbstractContextManager[None]]) -> None:
    """Have the processes of this machine compile a program once, where several need it at the same time.

    By itself JAX has every process compile what is not in the persistent cache yet, and only process 0 writes it there:
    not in one move, so that an entry of a process that was killed stays damaged. Such a one is replaced.

    Args:
      turn: `turn(key)` is entered before a program is compiled for CPU devices; another process may have done so.
    """
    compile_now = compiler._compile_and_write_cache
    if hasattr(compile_now, "by_jax"):
        return

    def compile_in_turn(
        backend: Any, computation: Any, devices: Any, options: Any, callbacks: Any, name: str, key: str
    ) -> Any:
        if backend.platform != "cpu" or callbacks:
            return compile_now(backend, computation, devices, options, callbacks, name, key)
        with turn(key):
            try:
                found, _ = compilation_cache.get_executable_and_time(key, options, backend, devices)
            except Exception:  # whatever zstandard, zlib or XLA raise; JAX has just warned of it
                found = None
                remove_from_cache(key)
            if found is not None:
                return found
            compiled = compile_now(backend, computation, devices, options, callbacks, name, key)
            if distributed.global_state.process_id:  # process 0 has written it
                with suppress(Exception):  # a full disk, for example
                    compilation_cache.put_executable_and_time(key, name, compiled, backend, 0)
            return compiled

    compile_in_turn.by_jax, compile_in_turn.turn = compile_now, turn  # type: ignore[attr-defined]
    compiler._compile_and_write_cache = compile_in_turn  # type: ignore[assignment]


def turn_to_compile(key: str) -> AbstractContextManager[None]:
    """Return the turn to compile a program, as `take_turns_compiling` was given it; else one that waits for nothing."""
    turn: Callable[[str], AbstractContextManager[None]] = getattr(
        compiler._compile_and_write_cache, "turn", lambda key: nullcontext()
    )
    return turn(key)


def cache_key(module: Any, device: jax.Device) -> str | None:
    """Return the key of `module` in JAX's persistent compilation cache, None where the cache is off.

    The key is made for one device, whatever the number of replicas; JAX's own key changes with that number.
    """
    if not compilation_cache.is_cache_used(device.client):
        return None
    options = compiler.get_compile_options(num_replicas=1, num_partitions=1, backend=device.client)
    return compilation_cache.get_cache_key(module, np.array([device]), options, device.client)


def read_cache(key: str, devices: Sequence[jax.Device]) -> Any:
    """Return the cached executable with a replica on each of `devices`, or None.

    There is no public access to the entries of the cache. A damaged entry raises whatever zstandard, zlib or XLA raise.
    """
    device_list, options = placement(devices)
    return compilation_cache.get_executable_and_time(key, options, devices[0].client, device_list)[0]


def remove_from_cache(key: str) -> None:
    """Remove a damaged entry, which JAX would never write again."""
    with suppress(OSError):
        pathlib.Path(jax.config.values["jax_compilation_cache_dir"], f"{key}-cache").unlink()


def write_cache(key: str, name: str, executable: Any, device: jax.Device, *, seconds: float) -> None:
    """Keep an executable in JAX's persistent cache; `seconds` is what it took to compile. See `read_cache`."""
    compilation_cache.put_executable_and_time(key, name, executable, device.client, int(seconds))


def mesh_executable(
    executable: Any,
    mesh: Mesh,
    input_avals: list[jax.core.ShapedArray],
    input_shardings: list[NamedSharding],
    output_avals: list[jax.core.ShapedArray],
    output_shardings: list[NamedSharding],
    python: Python = NO_PYTHON,
) -> Any:
    """Return what `jax.stages.Compiled` wraps: it takes and returns global arrays, by JAX's fast path.

    The public API makes such an object only by `jax.jit(...).lower(...).compile()`, which partitions one program over
    the mesh instead of running replicas of a single-device program.
    """
    return pxla.UnloadedMeshExecutable(
        xla_executable=executable,
        device_list=xla_client.DeviceList(tuple(mesh.devices.flat)),
        backend=mesh.local_devices[0].client,
        input_avals=input_avals,
        input_shardings=input_shardings,
        output_avals=output_avals,
        output_shardings=output_shardings,
        committed=True,
        name="per_device_program",
        unordered_effects=[],
        ordered_effects=[],
        keepalive=python.kept,
        host_callbacks=python.callbacks,
        kept_var_idx=set(range(len(input_avals))),
        mut=None,
        xla_in_layouts=[None] * len(input_avals),
        dispatch_in_layouts=[None] * len(input_avals),
        xla_out_layouts=[None] * len(output_avals),
        all_args_info=None,
        pgle_profiler=None,
    ).load()


def scan_counts(params: Mapping[str, Any]) -> tuple[int, int]:
    """Return how many operands of a scan are constants and how many are its carry; `params` are the equation's own.

    There is no public function for it. JAX 0.10 has the two numbers, JAX 0.12 the trees of constants, carry and inputs.
    """
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    constants, carry, _ = (len(list(part.vals)) for part in params["ft_in"].unpack())
    return constants, carry


def results_of(equation: Any, values: Sequence[Any]) -> list[Any]:
    """Return what an equation of a jaxpr gives for these values, with the lines of code that it comes from.

    `jax.core.eval_jaxpr` evaluates whole jaxprs; what is public for one equation forgets where in the code it was made.
    """
    names = source_info_util.current_name_stack() + equation.source_info.name_stack
    origin = source_info_util.user_context(equation.source_info.traceback, name_stack=names)
    with origin, equation.ctx.manager:
        found = equation.primitive.bind(*values, **equation.primitive.get_bind_params(equation.params))
    return list(found) if equation.primitive.multiple_results else [found]


def lines_of(equation: Any) -> list[tuple[str, int, str]]:
    """Return file, line and function of the calls that made an equation of a jaxpr, the innermost first.

    What is public of them is the text of a whole jaxpr.
    """
    trace = equation.source_info.traceback
    return [] if trace is None else [(each.file_name, each.line_num, each.function_name) for each in trace.frames]
