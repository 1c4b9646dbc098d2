"""One compiled single-device program that runs on every device of a mesh, the same machine code on each.

`jax.jit` makes a different program for every number of devices: XLA partitions, simplifies, fuses and parallelises
each differently. Here a function is compiled once, for one device, and its serialized form is loaded as replicas that
run side by side, one on each device (what `pmap` does, without the collectives). Canonical reduction depends on it: the
program is not just equivalent but the same. Loading takes milliseconds, and one call dispatches all replicas.
"""

import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from jaxdist.spmd import jax_private

PyTree: TypeAlias = Any

_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"


class PerDeviceProgram:
    """`function`, run by each device of `mesh` on its part of the arguments.

    Called with trees of global arrays laid out by `in_specs`: `PartitionSpec()` for what every device holds whole,
    `PartitionSpec(axis)` for what is sharded in the leading dim. Returns global arrays in the same way. There is no
    communication, so a replicated result must be computed from replicated arguments only. Compiled at the first call,
    for its shapes.

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
        """How often it was compiled: at most once, because it refuses arguments of other shapes."""
        return int(self._program is not None)

    def trace(self, *args: PyTree) -> jax.stages.Traced:
        """Return the function traced for what one device has of the arguments; compiles nothing."""
        return self._function.trace(*args)

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
        mesh_executable = jax_private.mesh_executable(
            _load(lowered, device, list(self._mesh.devices.flat)),
            self._mesh,
            [_global_aval(leaf, sharding) for leaf, sharding in zip(local, shardings, strict=True)],
            shardings,
            [_global_aval(leaf, NamedSharding(self._mesh, self._out_spec)) for leaf in results],
            [NamedSharding(self._mesh, self._out_spec)] * len(results),
        )
        return jax.stages.Compiled(mesh_executable, [], lowered.args_info, lowered.out_tree, no_kwargs=True)


def waits(mesh: Mesh) -> bool:
    """Return whether programs of single devices must not be in flight together with programs that have collectives.

    On CPU devices a one-device program computes in XLA's thread pool, and a collective keeps its thread of that pool
    while it waits for the other devices: they could block each other.
    """
    return mesh.size > 1 and bool(mesh.devices.flat[0].platform == "cpu")


def settled(tree: PyTree, mesh: Mesh) -> PyTree:
    """Return `tree`, computed where `waits`, otherwise dispatched."""
    return jax.block_until_ready(tree) if waits(mesh) else tree


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
    its bytes are loaded with our placement: an executable that JAX loaded from there cannot be serialized again
    (on CPU devices its kernels are lost; jaxlib 0.10 and 0.12).
    """
    module: Any = lowered.compiler_ir()
    key = jax_private.cache_key(module, device)
    cached = None if key is None else _read_cache(key, devices)
    if cached is not None:
        return cached
    compiled = _compile(module, device, key)
    return compiled if len(devices) == 1 else jax_private.load_executable(compiled.serialize(), devices)


def _compile(module: Any, device: jax.Device, key: str | None) -> Any:
    """Compile `module` for `device`, store the executable in the cache under `key`, and return it."""
    name = module.operation.attributes["sym_name"].value
    start = time.monotonic()
    compiled = jax_private.compile_module(module, [device])
    seconds = time.monotonic() - start
    jax.monitoring.record_event_duration_secs(_COMPILE_EVENT, seconds, fun_name=name)
    # Only process 0 writes, and only what took long to compile, as JAX does.
    worth_keeping = seconds >= jax.config.values["jax_persistent_cache_min_compile_time_secs"]
    if key is not None and worth_keeping and jax.process_index() == 0:
        jax_private.write_cache(key, name, compiled, device, seconds=seconds)
    return compiled


def _read_cache(key: str, devices: Sequence[jax.Device]) -> Any:
    try:
        return jax_private.read_cache(key, devices)
    except Exception as error:  # a damaged entry is whatever zstandard, zlib or XLA raise
        warnings.warn(f"An entry of the compilation cache cannot be read; compiling again: {error}", stacklevel=2)
        return None
