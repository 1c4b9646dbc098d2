"""One compiled single-device program, the very same machine code on each device.

`jax.jit` compiles a program again for every device it runs on. Here it is compiled once and its serialized form is
loaded for each device. That saves the compile time and is what canonical reduction rests on: not an equal program but
the same one.
"""

import contextlib
import io
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import jax
import numpy as np
from jax._src import compiler
from jax.experimental import serialize_executable
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh, NamedSharding, PartitionSpec

PyTree: TypeAlias = Any
Program: TypeAlias = Callable[..., Any]


class ReplicatedProgram:
    """A function of replicated global arrays, computed on every device by the very same single-device program.

    Called like `function`, with trees of arrays that are replicated over `mesh`; returns such trees. Compiled at the
    first call, for its shapes. A program partitioned over the mesh would do the same sums, but not to the bit: XLA
    simplifies it otherwise for one device than for many (for instance, it replaces divisions by a product with the
    reciprocal where enough of them share a divisor, and shares more or fewer of them).
    """

    def __init__(self, function: Callable[..., Any], mesh: Mesh, *, donate_argnums: tuple[int, ...] = ()):
        self._function = jax.jit(function, donate_argnums=donate_argnums)
        self._devices = list(mesh.local_devices)
        self._sharding = NamedSharding(mesh, PartitionSpec())
        self._programs: list[Program] = []

    def __call__(self, *args: PyTree) -> Any:
        """Return the global arrays of the result, dispatched and not waited for."""
        views = device_views(args, len(self._devices))
        if not self._programs:
            self._programs = compile_on(self._function, views[0], self._devices)
        results = [program(*view) for program, view in zip(self._programs, views, strict=True)]
        return jax.tree.map(self._assemble, *results)

    def _assemble(self, *replicas: jax.Array) -> jax.Array:
        return jax.make_array_from_single_device_arrays(replicas[0].shape, self._sharding, replicas)


def device_views(tree: PyTree, num_devices: int) -> list[PyTree]:
    """Return, for each of this process's devices in mesh order, the tree of the single-device arrays that lie on it."""
    leaves = jax.tree.leaves(tree)
    if not leaves:
        return [tree] * num_devices
    # Not addressable_data(i): of a replicated array that is the first replica, whatever i.
    by_leaf = [[shard.data for shard in leaf.addressable_shards] for leaf in leaves]
    return [jax.tree.unflatten(jax.tree.structure(tree), views) for views in zip(*by_leaf, strict=True)]


def compile_on(function: jax.stages.Wrapped, args: tuple[Any, ...], devices: list[jax.Device]) -> list[Program]:
    """Compile `function` once and return the program loaded on each of `devices`, in their order.

    Args:
      function: a jitted function of arrays.
      args: arrays on `devices[0]`, whose shapes and dtypes the program is made for.
      devices: local devices of one kind; `args` must lie on the first of them.
    """
    lowered = function.lower(*args)
    if len(devices) == 1:
        return [lowered.compile()]
    with _without_persistent_cache():
        compiled = lowered.compile()
    payload, in_tree, out_tree = serialize_executable.serialize(compiled)
    return [compiled, *(_load(payload, in_tree, out_tree, device) for device in devices[1:])]


@contextlib.contextmanager
def _without_persistent_cache() -> Iterator[None]:
    """Compile anew: what comes from JAX's persistent cache cannot be serialized once more.

    On CPU devices it has lost its kernels then ("Function ... not found" on every device but the first, for which the
    first waits in the next collective until XLA ends the process; jaxlib 0.10 and 0.12).
    """
    name = "jax_enable_compilation_cache"
    before = jax.config.values[name]
    jax.config.update(name, False)
    compilation_cache.reset_cache()  # JAX asks once whether the cache is in use, and remembers
    try:
        yield
    finally:
        jax.config.update(name, before)
        compilation_cache.reset_cache()


def _load(payload: bytes, in_tree: Any, out_tree: Any, device: jax.Device) -> Program:
    unloaded, args_info, no_kwargs = _Relocator(payload, device).load()
    return jax.stages.Compiled(unloaded.load(), [], in_tree.unflatten(args_info), out_tree, no_kwargs=no_kwargs)


class _Relocator(serialize_executable._JaxPjrtUnpickler):
    """Reads our own program's serialized form with its one device replaced by another.

    JAX's public `deserialize_and_load` insists on the device the program was compiled for; these two hooks are all
    that stands between it and any other device. The bytes come from `serialize` a moment ago, never from outside.
    """

    def __init__(self, payload: bytes, device: jax.Device):
        super().__init__(io.BytesIO(payload), device.client, [device])
        self.device = device

    def persistent_load(self, pid: tuple[Any, ...]) -> Any:
        if pid[0] == "device":
            return self.device
        if pid[0] == "exec":
            options = compiler.get_compile_options(
                num_replicas=1, num_partitions=1, device_assignment=np.array([[self.device.id]])
            )
            return self.backend.deserialize_executable(
                pid[1], executable_devices=self.execution_devices, compile_options=options
            )
        return super().persistent_load(pid)
