"""One compiled single-device program that runs on every device of a mesh, the very same machine code on each.

`jax.jit` makes another program for every number of devices: XLA partitions, simplifies, fuses and parallelises it
otherwise. Here a function is compiled once, for one device, and its serialized form is loaded as replicas that run side
by side, one on each device (what `pmap` does, without the collectives). That is what canonical reduction rests on: not
an equal program but the same one. Loading takes milliseconds, and one call dispatches all replicas.
"""

import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import numpy as np
from jax._src import compilation_cache, compiler
from jax._src.interpreters import pxla
from jax._src.lib import xla_client
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

PyTree: TypeAlias = Any

_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"


class PerDeviceProgram:
    """`function`, run by each device of `mesh` on what it holds of the arguments.

    Called with trees of global arrays, as `in_specs` say: `PartitionSpec()` for what every device holds whole,
    `PartitionSpec(axis)` for what is cut in the leading dim. Returns global arrays in the same way. There is no
    communication, so what is said to be replicated must come from replicated arguments alone. Compiled at the first
    call, for its shapes.

    Args:
      function: of single-device arrays; traced once.
      mesh: devices of one kind.
      in_specs: one for each argument, for all its leaves.
      out_spec: for all leaves of the result.
      donate_argnums: arguments whose memory the result may take.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        mesh: Mesh,
        *,
        in_specs: tuple[PartitionSpec, ...],
        out_spec: PartitionSpec,
        donate_argnums: tuple[int, ...] = (),
    ):
        # keep_unused, so that the compiled program's arguments are the leaves of ours, one by one.
        self._function = jax.jit(function, donate_argnums=donate_argnums, keep_unused=True)
        self._mesh, self._in_specs, self._out_spec = mesh, in_specs, out_spec
        self._program: jax.stages.Compiled | None = None

    def __call__(self, *args: PyTree) -> Any:
        """Return the result's global arrays, dispatched and not waited for."""
        if self._program is None:
            self._program = self._compile(args)
        return self._program(*args)

    @property
    def num_compiles(self) -> int:
        """How often it was compiled: once at the most, for it refuses arguments of another form."""
        return int(self._program is not None)

    def _compile(self, args: tuple[PyTree, ...]) -> jax.stages.Compiled:
        shardings = [
            NamedSharding(self._mesh, spec)
            for spec, arg in zip(self._in_specs, args, strict=True)
            for _ in jax.tree.leaves(arg)
        ]
        leaves, structure = jax.tree.flatten(args)
        device = self._mesh.local_devices[0]
        local = [_local(leaf, sharding, device) for leaf, sharding in zip(leaves, shardings, strict=True)]
        local_args = jax.tree.unflatten(structure, local)
        lowered = self._function.lower(*local_args)
        results = jax.tree.leaves(jax.eval_shape(self._function, *local_args))
        mesh_executable = _wrap(
            _load(lowered, device, list(self._mesh.devices.flat)),
            self._mesh,
            [_global_aval(leaf, sharding) for leaf, sharding in zip(local, shardings, strict=True)],
            shardings,
            [_global_aval(leaf, NamedSharding(self._mesh, self._out_spec)) for leaf in results],
            [NamedSharding(self._mesh, self._out_spec)] * len(results),
        )
        return jax.stages.Compiled(mesh_executable, [], lowered.args_info, lowered.out_tree, no_kwargs=True)


def _local(leaf: jax.Array, sharding: NamedSharding, device: jax.Device) -> jax.ShapeDtypeStruct:
    shape = sharding.shard_shape(leaf.shape)
    weak_type = bool(jax.typeof(leaf).weak_type)
    return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=SingleDeviceSharding(device), weak_type=weak_type)


def _global_aval(local: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.core.ShapedArray:
    parts = sharding.num_devices if tuple(sharding.spec) else 1
    shape = (local.shape[0] * parts, *local.shape[1:]) if parts > 1 else local.shape
    return jax.core.ShapedArray(shape, local.dtype, weak_type=bool(local.weak_type))


def _load(lowered: jax.stages.Lowered, device: jax.Device, devices: Sequence[jax.Device]) -> Any:
    """Return XLA's executable of `lowered`, made for the one `device`, with a replica on each of `devices`.

    JAX's persistent cache is used under a key of our own, the same for all processes and any number of devices, and
    its bytes are loaded with our placement: an executable that JAX loaded from there cannot be serialized once more
    (on CPU devices its kernels are lost then; jaxlib 0.10 and 0.12).
    """
    module: Any = lowered.compiler_ir()
    backend = device.client
    options = compiler.get_compile_options(
        num_replicas=len(devices),
        num_partitions=1,
        device_assignment=np.array([[each.id] for each in devices]),
        backend=backend,
    )
    placement = (xla_client.DeviceList(tuple(devices)), options)
    key = None
    if compilation_cache.is_cache_used(backend):
        anywhere = compiler.get_compile_options(num_replicas=1, num_partitions=1, backend=backend)
        key = compilation_cache.get_cache_key(module, np.array([device]), anywhere, backend)
        cached = _read_cache(key, backend, placement)
        if cached is not None:
            return cached
    compiled = _compile(module, device, key)
    return compiled if len(devices) == 1 else backend.deserialize_executable(compiled.serialize(), *placement)


def _compile(module: Any, device: jax.Device, key: str | None) -> Any:
    """Return the executable of `module` on `device`, compiled anew, and keep it in the cache under `key`."""
    backend, name = device.client, module.operation.attributes["sym_name"].value
    options = compiler.get_compile_options(
        num_replicas=1, num_partitions=1, device_assignment=np.array([[device.id]]), backend=backend
    )
    start = time.monotonic()
    compiled = compiler.backend_compile_and_load(backend, module, xla_client.DeviceList((device,)), options, [])
    seconds = time.monotonic() - start
    jax.monitoring.record_event_duration_secs(_COMPILE_EVENT, seconds, fun_name=name)
    # Process 0 alone writes, and only what took long to compile, as JAX does.
    worth_keeping = seconds >= jax.config.values["jax_persistent_cache_min_compile_time_secs"]
    if key is not None and worth_keeping and jax.process_index() == 0:
        compilation_cache.put_executable_and_time(key, name, compiled, backend, int(seconds))
    return compiled


def _read_cache(key: str, backend: Any, placement: tuple[Any, Any]) -> Any:
    devices, options = placement
    try:
        return compilation_cache.get_executable_and_time(key, options, backend, devices)[0]
    except Exception as error:  # a damaged entry is whatever zstandard, zlib or XLA raise
        warnings.warn(f"An entry of the compilation cache cannot be read, compiling anew: {error}", stacklevel=2)
        return None


def _wrap(
    executable: Any,
    mesh: Mesh,
    input_avals: list[jax.core.ShapedArray],
    input_shardings: list[NamedSharding],
    output_avals: list[jax.core.ShapedArray],
    output_shardings: list[NamedSharding],
) -> Any:
    """Return what `jax.stages.Compiled` calls: it takes and gives global arrays, by JAX's fast path."""
    devices = tuple(mesh.devices.flat)
    return pxla.UnloadedMeshExecutable(
        xla_executable=executable,
        device_list=xla_client.DeviceList(devices),
        backend=mesh.local_devices[0].client,
        input_avals=input_avals,
        input_shardings=input_shardings,
        output_avals=output_avals,
        output_shardings=output_shardings,
        committed=True,
        name="per_device_program",
        unordered_effects=[],
        ordered_effects=[],
        keepalive=[],
        host_callbacks=[],
        kept_var_idx=set(range(len(input_avals))),
        mut=None,
        xla_in_layouts=[None] * len(input_avals),
        dispatch_in_layouts=[None] * len(input_avals),
        xla_out_layouts=[None] * len(output_avals),
        all_args_info=None,
        pgle_profiler=None,
    ).load()
