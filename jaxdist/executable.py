"""One compiled single-device program, the very same machine code on each device.

`jax.jit` compiles a program again for every device it runs on. Here it is compiled once and its serialized form is
loaded for each device. That saves the compile time and is what canonical reduction rests on: not an equal program but
the same one.
"""

import io
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import numpy as np
from jax._src import compiler
from jax.experimental import serialize_executable

Program: TypeAlias = Callable[..., Any]


def compile_on(function: jax.stages.Wrapped, args: tuple[Any, ...], devices: list[jax.Device]) -> list[Program]:
    """Compile `function` once and return the program loaded on each of `devices`, in their order.

    Args:
      function: a jitted function of arrays.
      args: arrays on `devices[0]`, whose shapes and dtypes the program is made for.
      devices: local devices of one kind; `args` must lie on the first of them.
    """
    compiled = function.lower(*args).compile()
    if len(devices) == 1:
        return [compiled]
    payload, in_tree, out_tree = serialize_executable.serialize(compiled)
    return [compiled, *(_load(payload, in_tree, out_tree, device) for device in devices[1:])]


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
