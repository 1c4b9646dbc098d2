"""Canonical sums where an axis of the mesh divides the model: groups of devices compute a logical shard together.

The shards are dealt to the groups as they are to devices elsewhere. One program, partitioned over a group and the same
on each (see `group_program`), computes a shard; then each device adds its parts of the results to those of the devices
at its place in the other groups, in the tree that the number of shards alone decides. So the bits belong to the size of
the group, and the number of groups changes none.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import jax
import numpy as np
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxdist.spmd import device_program, group_program
from jaxdist.spmd import layout as layouts
from jaxdist.spmd.canonical import adding, shard_sums
from jaxdist.spmd.mesh import DATA_AXIS, Dealing
from jaxdist.spmd.metrics import Batch

PyTree: TypeAlias = Any
SumSpecs: TypeAlias = Callable[[PyTree, PyTree], PyTree]
"""`sum_specs(shared, shapes of the sums) -> specs`: how the sums are sharded over a group."""
LookFn: TypeAlias = Callable[[PyTree, jax.Array], PyTree]
"""`look_fn(sums of a shard, its number) -> arrays` that every device of a group has whole."""


def whole(shared: PyTree, shapes: PyTree) -> PyTree:
    """Return the specs of sums that every device of a group has whole."""
    del shared
    return jax.tree.map(lambda _: PartitionSpec(), shapes)


class GroupSums:
    """Computes the sums of every logical shard on the group that holds it, and adds them.

    Calling it with (shared, batch) returns (the tree of the sums over the global batch, what `look_fn` gives of all
    shards, added), which all groups have. The programs are compiled at the first call.

    `shard_fn` is traced once, for the shapes of one logical shard. `sum_specs` says how a group holds the sums.
    `look_fn` is computed by a program of its own: XLA would partition that of the sums otherwise for its sake.
    """

    def __init__(
        self,
        shard_fn: shard_sums.ShardFn,
        mesh: Mesh,
        *,
        logical_shards: int,
        axes: Sequence[str] = (DATA_AXIS,),
        sum_specs: SumSpecs = whole,
        look_fn: LookFn | None = None,
    ):
        shard_sums.check_layout(mesh, logical_shards=logical_shards, axes=axes)
        within = group_program.group_axes(mesh, axes)
        num_groups = len(group_program.group_meshes(mesh, axes))
        self._mesh, self._dealing = mesh, Dealing(logical_shards, num_groups)
        self._place = adding.Site(mesh, tuple(axes), self._dealing, within)
        self._shard_fn, self._sum_specs = shard_fn, sum_specs
        self._adding = adding.held_whole(self._place, size=0)
        rows = adding.Site(mesh, tuple(axes), self._dealing)
        self._split = shard_sums.splitting(rows, self._adding.shards)
        sharding = NamedSharding(mesh, rows.held)
        slots = np.ascontiguousarray(self._adding.shards.T)
        self._indices = [jax.make_array_from_callback(slot.shape, sharding, slot.__getitem__) for slot in slots]
        self._packing: Any = None
        self._sums: group_program.GroupProgram | None = None
        self._look = (
            None
            if look_fn is None
            else self._group_program(
                lambda rows, index: _rows(look_fn(jax.tree.map(lambda leaf: leaf[0], rows), index[0])),
                self._specs_of_rows,
            )
        )

    def __call__(self, shared: PyTree, batch: Batch) -> tuple[PyTree, PyTree]:
        """Return the dispatched sums over all logical shards; on CPU devices, waits for what they are added from."""
        batch = shard_sums.checked(batch, self._dealing)
        if self._sums is None:
            self._sums = self._make_sums(shared)
        parts = [batch] if len(self._indices) == 1 else self._settled(self._split(batch))
        held = self._settled(self._adding.on_devices(self._vectors(self._sums, shared, parts)))
        found: tuple[PyTree, PyTree] = self._unpack(self._settled(self._adding.over_devices(held)))
        return found

    def _vectors(self, program: group_program.GroupProgram, shared: PyTree, parts: list[Batch]) -> Iterator[jax.Array]:
        for part, index in zip(parts, self._indices, strict=True):
            rows = self._settled(program(shared, part, index))
            looked = () if self._look is None else self._settled(self._look(rows, index))
            if self._packing is None:
                self._packing = self._make_packing((rows, looked))
            yield self._settled(self._packing((rows, looked)))

    def _settled(self, tree: PyTree) -> PyTree:
        return device_program.settled(tree, self._mesh)

    def _make_sums(self, shared: PyTree) -> group_program.GroupProgram:
        def sums_of_shard(shared: PyTree, shard: Batch, index: jax.Array) -> PyTree:
            return _rows(self._shard_fn(shared, shard, index[0]))

        def specs(rows: PyTree) -> PyTree:
            return layouts.map_specs(self._of_rows, self._sum_specs(shared, rows))

        return self._group_program(sums_of_shard, specs)

    def _group_program(self, function: Callable[..., Any], specs: Callable[[PyTree], PyTree]) -> Any:
        axes = self._place.axes
        return group_program.GroupProgram(function, self._mesh, batch_axes=axes, out_specs=specs)

    def _of_rows(self, spec: PartitionSpec) -> PartitionSpec:
        """Return the spec of the groups' rows, each of which is sharded by `spec`."""
        return PartitionSpec(self._place.axes, *spec)

    def _specs_of_rows(self, rows: PyTree) -> PyTree:
        return jax.tree.map(lambda _: self._of_rows(PartitionSpec()), rows)

    def _make_packing(self, rows: PyTree) -> Any:
        """Return the program from a tree of rows to the vector of each device's parts of it; make that back."""
        of_rows = jax.tree.map(group_program.spec_of, rows)
        unravel: list[Callable[[jax.Array], PyTree]] = []

        def pack(rows: PyTree) -> jax.Array:
            vector, back = ravel_pytree(jax.tree.map(lambda leaf: leaf[0], rows))
            unravel[:] = [back]
            return vector[None]

        def mapped(function: Callable[..., Any], given: Any, gives: Any) -> Any:
            specs = {"in_specs": (given,), "out_specs": gives}
            return jax.jit(jax.shard_map(function, mesh=self._mesh, **specs, check_vma=False))

        of_sums = layouts.map_specs(lambda spec: PartitionSpec(*spec[1:]), of_rows)
        self._unpack = mapped(lambda vector: unravel[0](vector), self._place.total, of_sums)
        return mapped(pack, of_rows, self._place.held)


def _rows(tree: PyTree) -> PyTree:
    """Return a group's row of each leaf."""
    return jax.tree.map(lambda leaf: leaf[None], tree)
