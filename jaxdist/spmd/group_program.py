"""One compiled program of a group of devices that share their computations, run by every group of a mesh.

Where an axis of the mesh divides the model, the devices along it form a group, and the groups stand along the axes that
divide the batch. A function is compiled once, partitioned over the devices of one group, and its serialized form is
loaded onto the others. So what a group computes does not depend on how many there are. One executable with a replica on
each group would take fewer calls, but IFRT ends the process where replicas have partitioned results (jaxlib 0.10).
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxdist.spmd import jax_private
from jaxdist.spmd import layout as layouts

PyTree: TypeAlias = Any


def group_axes(mesh: Mesh, batch_axes: Sequence[str]) -> tuple[str, ...]:
    """Return the axes along which the devices of a group stand."""
    return tuple(axis for axis in mesh.axis_names if axis not in batch_axes)


def group_meshes(mesh: Mesh, batch_axes: Sequence[str]) -> list[Mesh]:
    """Return the mesh of each group, in the order of their parts of the batch.

    Raises:
      ValueError: the axes of the batch are not the first of the mesh.
    """
    if mesh.axis_names[: len(batch_axes)] != tuple(batch_axes):
        raise ValueError(
            f"Canonical reduction needs the axes {', '.join(batch_axes)} before the others; got {dict(mesh.shape)}. "
            f"Name them first in the mesh."
        )
    own = group_axes(mesh, batch_axes)
    types = mesh.axis_types[len(batch_axes) :]
    grids = mesh.devices.reshape(-1, *mesh.devices.shape[len(batch_axes) :])
    return [Mesh(grid, own, axis_types=types) for grid in grids]


class GroupProgram:
    """`function`, run by each group of `mesh` on its part of the arguments.

    Called with trees of global arrays: what is sharded over the batch axes, in its leading dim, is divided among the
    groups; the rest all groups hold. Compiled at the first call, for its shapes.

    The function is traced once. `out_specs(shapes of the result)` gives the specs of the global result; a replicated
    one must be computed from replicated arguments only. The result may take the memory of `donate_argnums`.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        mesh: Mesh,
        *,
        batch_axes: Sequence[str],
        out_specs: Callable[[PyTree], PyTree],
        donate_argnums: tuple[int, ...] = (),
    ):
        self._function, self._mesh, self._axes = function, mesh, tuple(batch_axes)
        self._out_specs, self._donate = out_specs, donate_argnums
        process = jax.process_index()
        groups = group_meshes(mesh, batch_axes)
        self._groups = [group for group in groups if any(d.process_index == process for d in group.devices.flat)]
        self._own_axes = group_axes(mesh, batch_axes)
        self._programs: list[jax.stages.Compiled] = []

    def __call__(self, *args: PyTree) -> Any:
        """Return the result's global arrays, dispatched and not waited for."""
        if not self._programs:
            self._compile(args)
        leaves, structure = jax.tree.flatten(args)
        parts = [self._parts(leaf) for leaf in leaves]
        found = [
            program(*jax.tree.unflatten(structure, own))
            for program, own in zip(self._programs, zip(*parts, strict=True), strict=True)
        ]
        return jax.tree.map(self._joined, self._results, *found, is_leaf=lambda node: isinstance(node, NamedSharding))

    @property
    def num_compiles(self) -> int:
        """How often it was compiled: at most once, because it refuses arguments of other shapes."""
        return int(bool(self._programs))

    def _compile(self, args: tuple[PyTree, ...]) -> None:
        """Compile for the first group that this process has devices of, and load the program onto the others."""
        leaves, structure = jax.tree.flatten(args)
        first, given = self._groups[0], [self._own(spec_of(leaf)) for leaf in leaves]
        shapes = [_shape(self._parts(leaf)[0]) for leaf in leaves]
        placed = [
            jax.ShapeDtypeStruct(each.shape, each.dtype, sharding=NamedSharding(first, spec), weak_type=each.weak_type)
            for each, spec in zip(shapes, given, strict=True)
        ]
        local_args = jax.tree.unflatten(structure, placed)
        results = jax.eval_shape(self._function, *local_args)
        specs = self._out_specs(results)
        self._results = layouts.map_specs(lambda spec: NamedSharding(self._mesh, spec), specs)
        own = layouts.map_specs(lambda spec: NamedSharding(first, self._own(spec)), specs)
        function = jax.jit(self._function, donate_argnums=self._donate, out_shardings=own, keep_unused=True)
        lowered = function.lower(*local_args)
        python = jax_private.python_of(lowered)
        gives = [sharding.spec for sharding in jax.tree.leaves(own)]
        for group, executable in zip(self._groups, self._load(lowered.compiler_ir(), python.callbacks), strict=True):
            on_group = jax_private.mesh_executable(
                executable,
                group,
                shapes,
                [NamedSharding(group, spec) for spec in given],
                [_shape(leaf) for leaf in jax.tree.leaves(results)],
                [NamedSharding(group, spec) for spec in gives],
                python,
            )
            program = jax.stages.Compiled(on_group, [], lowered.args_info, lowered.out_tree, no_kwargs=True)
            self._programs.append(program)

    def _load(self, module: Any, callbacks: Sequence[Any]) -> list[Any]:
        """Return XLA's executable of a lowered module for each group."""
        first, *others = [list(group.devices.flat) for group in self._groups]
        compiled = jax_private.compile_module(module, first, len(first), callbacks)
        serialized = compiled.serialize() if others else b""
        return [compiled, *(jax_private.load_executable(serialized, each, len(each), callbacks) for each in others)]

    def _own(self, spec: PartitionSpec) -> PartitionSpec:
        return layouts.keep_axes(spec, self._own_axes)

    def _num_parts(self, spec: PartitionSpec) -> int:
        """Return among how many groups the leading dim of an array is divided."""
        return math.prod(self._mesh.shape[axis] for axis in layouts.spec_axes(layouts.keep_axes(spec, self._axes)))

    def _parts(self, leaf: jax.Array) -> list[jax.Array]:
        """Return what each group of this process has of a global array."""
        spec = spec_of(leaf)
        parts = self._num_parts(spec)
        shape = (leaf.shape[0] // parts, *leaf.shape[1:]) if parts > 1 else leaf.shape
        held = {shard.device: shard.data for shard in leaf.addressable_shards}
        return [
            jax.make_array_from_single_device_arrays(
                shape,
                NamedSharding(group, self._own(spec)),
                [held[device] for device in group.devices.flat if device in held],
            )
            for group in self._groups
        ]

    def _joined(self, sharding: NamedSharding, *parts: jax.Array) -> jax.Array:
        """Return the global array of what the groups computed."""
        factor = self._num_parts(sharding.spec)
        first = parts[0]
        shape = (first.shape[0] * factor, *first.shape[1:]) if factor > 1 else first.shape
        arrays = [shard.data for part in parts for shard in part.addressable_shards]
        return jax.make_array_from_single_device_arrays(shape, sharding, arrays)


def spec_of(leaf: jax.Array) -> PartitionSpec:
    """Return how a global array is sharded over its mesh."""
    if isinstance(leaf.sharding, NamedSharding):
        return leaf.sharding.spec
    assert leaf.sharding.is_fully_replicated
    return PartitionSpec()


def _shape(leaf: Any) -> jax.core.ShapedArray:
    return jax.core.ShapedArray(leaf.shape, leaf.dtype, weak_type=bool(jax.typeof(leaf).weak_type))
