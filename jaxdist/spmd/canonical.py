"""Canonical reduction: sums over a batch whose bits do not depend on the number of devices or processes.

The global batch is divided into a fixed number of logical shards. A single-device program computes one or several of
them, with the same machine code for each (see `device_program` and `_Programs`), and the results, one flat vector each,
are added in a fixed binary tree: first over a device's own shards, then over the devices
(`reduce.tree_sum_over_axis`). A program partitioned over the devices does additions only: XLA simplifies, fuses and
parallelises a program for one device differently from one for many devices, and that changes the bits.
"""

import functools
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxdist.spmd import dependence, device_program, reduce
from jaxdist.spmd.mesh import DATA_AXIS
from jaxdist.spmd.metrics import Batch

PyTree: TypeAlias = Any
ShardFn: TypeAlias = Callable[[PyTree, Batch, jax.Array], PyTree]
"""`shard_fn(shared, shard, index) -> sums`: pure; `index` is the logical shard's number (int32 scalar)."""


MAX_OPERATIONS = 4096
"""How many operations the program of a call may have (a scan's body counts once); more would take long to compile."""


class LogicalShardSums:
    """Computes the sums of every logical shard on the device that holds it, and adds them.

    Calling it with (shared, batch) returns the sum over the global batch, a replicated flat vector that `unravel`
    turns into a tree. The programs are compiled at the first call, once.

    Args:
      shard_fn: traced once, for the shapes of one logical shard.
      mesh: of the one axis `axis`, whose size divides `logical_shards`.
      logical_shards: a power of two.
      shards_per_call: how many of a device's logical shards one program computes, a power of two; by default as many
        as `MAX_OPERATIONS` allows. Changes the speed and the time to compile, and no bit.
    """

    def __init__(
        self,
        shard_fn: ShardFn,
        mesh: Mesh,
        *,
        logical_shards: int,
        axis: str = DATA_AXIS,
        shards_per_call: int | None = None,
    ):
        check_layout(mesh, logical_shards=logical_shards, axis=axis)
        self.mesh, self.axis, self.num_devices = mesh, axis, mesh.shape[axis]
        self.logical_shards = logical_shards
        self.shards_per_device = logical_shards // self.num_devices
        self.shards_per_call = shards_per_call
        self._shard_fn = shard_fn
        self._unravel: Callable[[jax.Array], PyTree] | None = None
        self._programs: _Programs | None = None

    def __call__(self, shared: PyTree, batch: Batch) -> jax.Array:
        """Return the dispatched sum over all logical shards, shape (size,); on CPU devices, waits for the shards first.

        Args:
          shared: replicated global arrays, given whole to every shard.
          batch: global arrays, sharded over the axis in their leading dim.
        """
        if self._programs is None:
            self._programs = self._make_programs(shared, batch)
        return self._programs(shared, batch)

    def unravel(self, total: jax.Array) -> PyTree:
        """Return the tree of sums that a flat vector holds; known after the first call."""
        assert self._unravel is not None, "the shards' program is compiled at the first call"
        return self._unravel(total)

    def _make_programs(self, shared: PyTree, batch: Batch) -> "_Programs":
        one = jax.jit(self._flat_sums)
        rows = {name: leaf.shape[0] // self.logical_shards for name, leaf in batch.items()}
        shard = {name: _described(leaf, (rows[name], *leaf.shape[1:])) for name, leaf in batch.items()}
        described = jax.tree.map(lambda leaf: _described(leaf, leaf.shape), shared)
        operations = dependence.num_operations(one.trace(described, shard, jax.ShapeDtypeStruct((), jnp.int32)).jaxpr)
        chosen = self.shards_per_call or _power_of_two_within(MAX_OPERATIONS // max(operations, 1))
        return _Programs(one, self.mesh, self.axis, self.shards_per_device, min(chosen, self.shards_per_device))

    def _flat_sums(self, shared: PyTree, shard: Batch, index: jax.Array) -> jax.Array:
        sums, self._unravel = ravel_pytree(self._shard_fn(shared, shard, index))
        return sums


class _Programs:
    """The compiled programs of one call: split the batch, compute the shards, add the results.

    A device's shards are computed by as few calls as possible, each an unrolled sequence of `shards_per_call` shards.
    `optimization_barrier` around every shard keeps XLA from fusing across them, so that the code of a shard, and with
    it the bits, is that of a program of its own. `vmap` and `scan` over the shards would give other bits.
    """

    def __init__(self, one_shard: ShardFn, mesh: Mesh, axis: str, shards_per_device: int, shards_per_call: int):
        self.num_devices, self.axis, self.mesh = mesh.shape[axis], axis, mesh
        self.shards_per_call, self.num_calls = shards_per_call, shards_per_device // shards_per_call
        self._one_shard = one_shard
        whole, sharded = PartitionSpec(), PartitionSpec(axis)
        self._split = jax.jit(self._map_split())
        self._sums = device_program.PerDeviceProgram(
            self._sums_of_shards, mesh, in_specs=(whole, sharded, sharded), out_spec=sharded
        )
        self._add = jax.jit(_add_in_pairs, donate_argnums=0)
        self._add_over_devices = jax.jit(self._map_tree_sum())
        self._indices = self._place_indices()
        # A one-device program on CPU computes in XLA's thread pool; a collective keeps its thread of that pool while it
        # waits for the other devices. If both were in flight at once, they could deadlock.
        self._waits_for_rows = self.num_devices > 1 and mesh.devices.flat[0].platform == "cpu"

    def __call__(self, shared: PyTree, batch: Batch) -> jax.Array:
        parts = [batch] if self.num_calls == 1 else self._split(batch)
        rows = _TreeSum(self._add)
        for part, indices in zip(parts, self._indices, strict=True):
            rows.push(self._sums(shared, part, indices))
        row = rows.result()
        if self._waits_for_rows:
            jax.block_until_ready(row)
        return self._add_over_devices(row)

    def _sums_of_shards(self, shared: PyTree, part: Batch, indices: jax.Array) -> jax.Array:
        shards = _equal_parts(part, self.shards_per_call)
        sums = []
        for shard, index in zip(shards, indices, strict=True):
            arguments = jax.lax.optimization_barrier((shared, shard, index))
            sums.append(jax.lax.optimization_barrier(self._one_shard(*arguments)))
        while len(sums) > 1:
            sums = [first + second for first, second in zip(sums[::2], sums[1::2], strict=True)]
        return sums[0][None]

    def _map_split(self) -> Callable[[Batch], list[Batch]]:
        spec = PartitionSpec(self.axis)
        split = functools.partial(_equal_parts, count=self.num_calls)
        return jax.shard_map(split, mesh=self.mesh, in_specs=spec, out_specs=spec, check_vma=False)

    def _map_tree_sum(self) -> Callable[[jax.Array], jax.Array]:
        return jax.shard_map(
            lambda row: reduce.tree_sum_over_axis(row[0], self.axis, self.num_devices),
            mesh=self.mesh,
            in_specs=PartitionSpec(self.axis),
            out_specs=PartitionSpec(),
            check_vma=False,
        )

    def _place_indices(self) -> list[jax.Array]:
        """Return, for each call, the numbers of the logical shards that the devices compute in it."""
        sharding = NamedSharding(self.mesh, PartitionSpec(self.axis))
        numbers = np.arange(self.num_devices * self.num_calls * self.shards_per_call, dtype=np.int32)
        calls = numbers.reshape(self.num_devices, self.num_calls, self.shards_per_call).swapaxes(0, 1)
        flat = calls.reshape(self.num_calls, -1)
        return [jax.make_array_from_callback(call.shape, sharding, call.__getitem__) for call in flat]


def _equal_parts(rows: Batch, count: int) -> list[Batch]:
    """Return `count` equal parts of a batch, in order."""
    divided = {name: jnp.split(leaf, count) for name, leaf in rows.items()}
    return [dict(zip(divided, parts, strict=True)) for parts in zip(*divided.values(), strict=True)]


def _described(leaf: jax.Array, shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, leaf.dtype, weak_type=bool(jax.typeof(leaf).weak_type))


def _power_of_two_within(limit: int) -> int:
    """Return the largest power of two that is at most `limit`, or 1."""
    return 1 << max(limit.bit_length() - 1, 0)


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
    if logical_shards < 1 or logical_shards & (logical_shards - 1):
        below = 1 << max(logical_shards.bit_length() - 1, 0)
        raise ValueError(
            f"logical_shards must be a power of two, so that one binary tree fits every layout; got {logical_shards}. "
            f"Nearest valid: {below} or {2 * below}."
        )
    if logical_shards % num_devices:
        raise ValueError(
            f"Canonical reduction needs a number of devices that divides logical_shards; got {num_devices} devices and "
            f"{logical_shards} logical shards. Use {_nearest_divisors(num_devices, logical_shards)} devices."
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


def _nearest_divisors(number: int, power_of_two: int) -> str:
    divisors = list(_divisors(power_of_two))
    return " or ".join(map(str, sorted(sorted(divisors, key=lambda divisor: abs(divisor - number))[:2])))


def _divisors(power_of_two: int) -> Iterator[int]:
    divisor = 1
    while divisor <= power_of_two:
        yield divisor
        divisor *= 2
