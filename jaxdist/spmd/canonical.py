"""Canonical reduction: sums over a batch whose bits do not depend on the number of devices or processes.

The global batch is divided into a fixed number of logical shards, dealt to the devices (`mesh.Dealing`). A program for
one device computes one of them, with the same machine code on every device (see `device_program` and `_Programs`), and
the results, one flat vector each, are added in a binary tree that the number of shards alone decides: neighbours first,
then pairs of pairs; an odd one out waits for the next level. A program partitioned over the devices does additions
only: XLA simplifies, fuses and parallelises a program for one device differently from one for many devices, and that
changes the bits.
"""

import functools
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxdist.spmd import device_program, reduce
from jaxdist.spmd.mesh import DATA_AXIS, Dealing, DealtBatch, is_power_of_two
from jaxdist.spmd.metrics import Batch

PyTree: TypeAlias = Any
ShardFn: TypeAlias = Callable[[PyTree, Batch, jax.Array], PyTree]
"""`shard_fn(shared, shard, index) -> sums`: pure; `index` is the logical shard's number (int32 scalar)."""


class LogicalShardSums:
    """Computes the sums of every logical shard on the device that holds it, and adds them.

    Calling it with (shared, batch) returns the sum over the global batch, a replicated flat vector that `unravel`
    turns into a tree. The programs are compiled at the first call, once.

    Args:
      shard_fn: traced once, for the shapes of one logical shard.
      mesh: of the one axis `axis`, with at most `logical_shards` devices. Where their number does not divide
        `logical_shards`, the batch is placed as a `mesh.DealtBatch`.
      logical_shards: any number; a power of two that the devices divide takes the least memory.
      finish_fn: `finish_fn(flat, index) -> flat`, applied to the flat vector of each logical shard.
    """

    def __init__(
        self,
        shard_fn: ShardFn,
        mesh: Mesh,
        *,
        logical_shards: int,
        axis: str = DATA_AXIS,
        finish_fn: Callable[[jax.Array, jax.Array], jax.Array] = lambda flat, index: flat,
    ):
        check_layout(mesh, logical_shards=logical_shards, axis=axis)
        self.mesh, self.axis = mesh, axis
        self.dealing = Dealing(logical_shards, mesh.shape[axis])
        self._shard_fn, self._finish_fn = shard_fn, finish_fn
        self._unravel: Callable[[jax.Array], PyTree] | None = None
        self._programs: _Programs | None = None

    def __call__(self, shared: PyTree, batch: Batch) -> jax.Array:
        """Return the dispatched sum over all logical shards, shape (size,); on CPU devices, waits for the shards first.

        Args:
          shared: replicated global arrays, given whole to every shard.
          batch: global arrays, sharded over the axis in their leading dim.

        Raises:
          ValueError: the batch is not placed as this number of devices needs it.
        """
        batch = self._checked(batch)
        if self._programs is None:
            self._programs = self._make_programs()
        return self._programs(shared, batch)

    def unravel(self, total: jax.Array) -> PyTree:
        """Return the tree of sums that a flat vector holds; known after the first call."""
        assert self._unravel is not None, "the shards' program is compiled at the first call"
        return self._unravel(total)

    def _checked(self, batch: Batch) -> Batch:
        """Return the fields of a batch that is placed as `dealing` says."""
        dealt = batch.dealing if isinstance(batch, DealtBatch) else None
        if dealt != (None if self.dealing.is_even else self.dealing):
            raise ValueError(
                f"The batch is not placed for {self.dealing.logical_shards} logical shards on "
                f"{self.dealing.num_devices} devices. Place it by data.feed(loader, mesh, logical_shards="
                f"{self.dealing.logical_shards})."
            )
        return dict(batch)

    def _make_programs(self) -> "_Programs":
        adding = _PairTree if self.dealing.is_even and is_power_of_two(self.dealing.logical_shards) else _AnyTree
        return _Programs(self._flat_sums, adding(self.mesh, self.axis, self.dealing))

    def _flat_sums(self, shared: PyTree, shard: Batch, index: jax.Array) -> jax.Array:
        sums, self._unravel = ravel_pytree(self._shard_fn(shared, shard, index))
        return self._finish_fn(sums, index)

    def everywhere(self) -> device_program.PerDeviceProgram:
        """Return the program (shared, shard, index) -> flat sums of one logical shard, computed by every device.

        `shard` and `index`, shape (1,), are replicated; the result, shape (devices, size), has a row of each device.
        The code is that of the step.
        """
        whole = PartitionSpec()
        return device_program.PerDeviceProgram(
            lambda shared, shard, index: self._flat_sums(shared, shard, index[0])[None],
            self.mesh,
            in_specs=(whole, whole, whole),
            out_spec=PartitionSpec(self.axis),
        )


class _Programs:
    """The compiled programs of one call: split the batch, compute the shards one by one, add the results.

    A program of several shards would save calls, but not give the bits of one: XLA fuses across the shards, also where
    `optimization_barrier` stands between them, which it removes before it fuses. In branches of a conditional, which
    keep the bits, convolutions take fifteen times as long on CPU devices.
    """

    def __init__(self, one_shard: ShardFn, adding: "_PairTree | _AnyTree"):
        mesh, axis, dealing = adding.mesh, adding.axis, adding.dealing
        self._one_shard, self._adding = one_shard, adding
        whole, sharded = PartitionSpec(), PartitionSpec(axis)
        split = functools.partial(_equal_parts, count=dealing.num_slots)
        self._split = jax.jit(jax.shard_map(split, mesh=mesh, in_specs=sharded, out_specs=sharded, check_vma=False))
        self._sums = device_program.PerDeviceProgram(
            self._sums_of_shard, mesh, in_specs=(whole, sharded, sharded), out_spec=sharded
        )
        self._indices = self._place_indices()
        # A one-device program on CPU computes in XLA's thread pool; a collective keeps its thread of that pool while it
        # waits for the other devices. If both were in flight at once, they could deadlock.
        self._waits_for_rows = dealing.num_devices > 1 and mesh.devices.flat[0].platform == "cpu"

    def __call__(self, shared: PyTree, batch: Batch) -> jax.Array:
        parts = [batch] if len(self._indices) == 1 else self._split(batch)
        slots = (self._sums(shared, part, index) for part, index in zip(parts, self._indices, strict=True))
        held = self._adding.on_devices(slots)
        if self._waits_for_rows:
            jax.block_until_ready(held)
        return self._adding.over_devices(held)

    def _sums_of_shard(self, shared: PyTree, shard: Batch, index: jax.Array) -> jax.Array:
        return self._one_shard(shared, shard, index[0])[None]

    def _place_indices(self) -> list[jax.Array]:
        """Return, for each slot, the numbers of the logical shards that the devices compute in it."""
        sharding = NamedSharding(self._adding.mesh, PartitionSpec(self._adding.axis))
        slots = np.ascontiguousarray(self._adding.dealing.slots().T)
        return [jax.make_array_from_callback(slot.shape, sharding, slot.__getitem__) for slot in slots]


class _PairTree:
    """Adds a power of two of shards, as many on each device: each adds up its own, and then they meet.

    A device holds one vector of its own shards, and few more while they are computed.
    """

    def __init__(self, mesh: Mesh, axis: str, dealing: Dealing):
        self.mesh, self.axis, self.dealing = mesh, axis, dealing
        self._add = jax.jit(_add_in_pairs, donate_argnums=0)
        tree_sum = jax.shard_map(
            lambda row: reduce.tree_sum_over_axis(row[0], axis, dealing.num_devices),
            mesh=mesh,
            in_specs=PartitionSpec(axis),
            out_specs=PartitionSpec(),
            check_vma=False,
        )
        self.over_devices: Callable[[Any], jax.Array] = jax.jit(tree_sum)

    def on_devices(self, slots: Iterable[jax.Array]) -> jax.Array:
        """Return the sums of each device's shards, added up as they are dispatched."""
        rows = _TreeSum(self._add)
        for slot in slots:
            rows.push(slot)
        return rows.result()


class _AnyTree:
    """Adds any number of shards, dealt to any number of devices: each device adds a slice of all vectors.

    A device holds the vectors of all its shards, and its slice of everybody's.
    """

    def __init__(self, mesh: Mesh, axis: str, dealing: Dealing):
        self.mesh, self.axis, self.dealing = mesh, axis, dealing
        tree_sum = jax.shard_map(
            lambda slots: reduce.tree_sum_of_slots(jnp.concatenate(slots), axis, dealing.slot_of_shards()),
            mesh=mesh,
            in_specs=PartitionSpec(axis),
            out_specs=PartitionSpec(),
            check_vma=False,
        )
        self.over_devices: Callable[[Any], jax.Array] = jax.jit(tree_sum)

    def on_devices(self, slots: Iterable[jax.Array]) -> list[jax.Array]:
        """Return the vectors of each device's shards."""
        return list(slots)


def _equal_parts(rows: Batch, count: int) -> list[Batch]:
    """Return `count` equal parts of a batch, in order."""
    divided = {name: jnp.split(leaf, count) for name, leaf in rows.items()}
    return [dict(zip(divided, parts, strict=True)) for parts in zip(*divided.values(), strict=True)]


class _TreeSum:
    """Adds values in a balanced binary tree as they arrive, two levels at a time, like the carries of a counter.

    Few partial sums are held at a time (five for eight values), where adding at the end would hold all values. One
    program adds four values, because dispatching three programs would cost more than the additions.
    """

    def __init__(self, add: Callable[..., jax.Array]):
        self._add = add
        self._partial: list[tuple[int, jax.Array]] = []

    def push(self, value: jax.Array) -> None:
        self._partial.append((0, value))
        while [level for level, _ in self._partial[-4:]] == 4 * [self._partial[-1][0]]:
            self._combine(4)

    def result(self) -> jax.Array:
        if len(self._partial) == 2:
            self._combine(2)
        assert len(self._partial) == 1, "the number of values pushed was not a power of two"
        return self._partial.pop()[1]

    def _combine(self, count: int) -> None:
        summands, self._partial = self._partial[-count:], self._partial[:-count]
        total = self._add(*(value for _, value in summands))
        self._partial.append((summands[0][0] + count // 2, total))


def _add_in_pairs(*values: jax.Array) -> jax.Array:
    """Return the sum of two values, or of four as the sum of two sums."""
    first, second, *rest = values
    return first + second + _add_in_pairs(*rest) if rest else first + second


def check_layout(mesh: Mesh, *, logical_shards: int, axis: str = DATA_AXIS) -> None:
    """Raise ValueError where canonical reduction cannot keep its promise on `mesh`."""
    num_devices = mesh.shape[axis]
    if logical_shards < 1:
        raise ValueError(f"logical_shards must be at least 1; got {logical_shards}.")
    if num_devices > logical_shards:
        raise ValueError(
            f"Canonical reduction gives every device at least one logical shard; got {num_devices} devices and "
            f"{logical_shards} logical shards. Use {logical_shards} devices or fewer, or raise logical_shards, which "
            "gives other bits."
        )
    if mesh.size != num_devices:
        raise ValueError(
            f"Canonical reduction works on a mesh of the one axis {axis!r}; got {dict(mesh.shape)}. "
            "Use reduction='mean' on a mesh with more axes."
        )
    if thread_pool_size(os.environ) < 2 and mesh.devices.flat[0].platform == "cpu":
        raise ValueError(
            "Canonical reduction on CPU devices needs a thread pool of two or more threads: XLA generates different "
            "code for one. It has one here: PJRT_NPROC or NPROC in the environment sets it, or this process may use "
            "one core only. Set PJRT_NPROC=2 before it starts; more threads than cores are fine."
        )


def thread_pool_size(environment: Mapping[str, str]) -> int:
    """Return the size of XLA's thread pool on CPU devices: from the environment, or the number of usable cores."""
    for name in ("PJRT_NPROC", "NPROC"):
        if environment.get(name, "").isdigit():
            return int(environment[name])
    return len(os.sched_getaffinity(0))
