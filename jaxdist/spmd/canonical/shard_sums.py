"""Canonical reduction: sums over a batch whose bits do not depend on the number of devices or processes.

The global batch is divided into a fixed number of logical shards, dealt to the devices (`mesh.Dealing`). A program for
one device computes one of them, with the same machine code on every device (see `device_program` and `_Programs`), and
the results, one flat vector each, are added in a binary tree that the number of shards alone decides: neighbours first,
then pairs of pairs; an odd one out waits for the next level. A program partitioned over the devices does additions
only: XLA simplifies, fuses and parallelises a program for one device differently from one for many devices, and that
changes the bits.
"""

import functools
import json
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxdist.spmd import dependence, device_program
from jaxdist.spmd.canonical import adding as ways
from jaxdist.spmd.canonical import thread_pool
from jaxdist.spmd.canonical.adding import Adding, Site, held_whole
from jaxdist.spmd.mesh import DATA_AXIS, Dealing, DealtBatch
from jaxdist.spmd.metrics import Batch

PyTree: TypeAlias = Any
ShardFn: TypeAlias = Callable[[PyTree, Batch, jax.Array], PyTree]
"""`shard_fn(shared, shard, index) -> sums`: pure; `index` is the logical shard's number (int32 scalar)."""


Splitting: TypeAlias = Callable[[Batch], list[Batch]]


class LogicalShardSums:
    """Computes the sums of every logical shard on the device that holds it, and adds them.

    Calling it with (shared, batch) returns the sum over the global batch, a replicated flat vector that `unravel`
    turns into a tree. The programs are compiled at the first call, once.

    `shard_fn` is traced once, for the shapes of one logical shard. The axes have at most as many devices as there are
    logical shards; where their number does not divide that, the batch is placed as a `mesh.DealtBatch`, and a power of
    two takes the fewest messages. `finish_fn(flat, index)` is applied to the vector of each logical shard; `adding`
    chooses how the vectors are added, by what takes the fewest messages or the least memory.
    """

    def __init__(
        self,
        shard_fn: ShardFn,
        mesh: Mesh,
        *,
        logical_shards: int,
        axes: Sequence[str] = (DATA_AXIS,),
        finish_fn: Callable[[jax.Array, jax.Array], jax.Array] = lambda flat, index: flat,
        adding: Callable[[Site, int], Adding] = held_whole,
    ):
        self.axes = tuple(axes)
        check_axes(mesh, axes=self.axes)
        check_layout(mesh, logical_shards=logical_shards, axes=self.axes)
        self.mesh, self.dealing = mesh, Dealing(logical_shards, mesh.size)
        self._site = Site(mesh, self.axes, self.dealing)
        self._adding = adding
        self._unravel: Callable[[jax.Array], PyTree] | None = None

        def flat_sums(shared: PyTree, shard: Batch, index: jax.Array) -> jax.Array:
            sums, self._unravel = ravel_pytree(shard_fn(shared, shard, index))
            return finish_fn(sums, index)

        # One function, of which JAX keeps the trace; inlined, it leaves a program as it would be without.
        self._flat_sums = jax.jit(flat_sums, inline=True)
        held = self._site.held
        self._program = device_program.PerDeviceProgram(
            self._sums_of_shard, mesh, in_specs=(PartitionSpec(), held, held), out_spec=held
        )
        self._shapes: tuple[PyTree, PyTree, jax.ShapeDtypeStruct] | None = None
        self._facts: tuple[int, bool] | None = None
        self._programs: Callable[[PyTree, Batch], jax.Array] | None = None

    def __call__(self, shared: PyTree, batch: Batch) -> jax.Array:
        """Return the sum over all logical shards, shape (size,); on CPU devices, waits for the shards first.

        `shared` are replicated global arrays, given whole to every shard; those of the batch are sharded over the axes
        in their leading dim.

        Raises:
          ValueError: the batch is not placed as this number of devices needs it.
        """
        batch = checked(batch, self.dealing)
        if self._programs is None:
            self._programs = self._make_programs(shared, batch)
        return self._programs(shared, batch)

    def unravel(self, total: jax.Array) -> PyTree:
        """Return the tree of sums that a flat vector holds; known after the first call."""
        if self._unravel is None:  # process 0 has traced them
            assert self._shapes is not None, "the shards' shapes are known at the first call"
            self._program.trace(*self._shapes)
            assert self._unravel is not None
        return self._unravel(total)

    def is_small(self, shared: PyTree, batch: Batch) -> bool:
        """Return whether all shards are computed by one program."""
        return self._look(shared, batch)[1]

    def followed_by(
        self, then: Callable[..., PyTree], *, shared_of: Callable[[PyTree, PyTree], PyTree]
    ) -> "OneProgram":
        """Return the one program of the shards, their sum and what follows, for what `is_small`."""
        return OneProgram(self._flat_sums, self._site, self._adding(self._site, 0), shared_of=shared_of, then=then)

    def _make_programs(self, shared: PyTree, batch: Batch) -> Callable[[PyTree, Batch], jax.Array]:
        size, is_small = self._look(shared, batch)
        if not is_small:
            return _Programs(self._program, self._site, self._adding(self._site, size))
        program = self.followed_by(lambda total, _, shared: total, shared_of=lambda _, shared: shared)
        return lambda shared, batch: device_program.settled(program(None, shared, batch), self.mesh)

    def _look(self, shared: PyTree, batch: Batch) -> tuple[int, bool]:
        """Return the length of a shard's vector, and whether the shards are small; they are traced once in a job."""
        if self._facts is None:
            num_placed = self.dealing.num_slots * self.dealing.num_devices
            shard = {name: _shape(leaf, (leaf.shape[0] // num_placed, *leaf.shape[1:])) for name, leaf in batch.items()}
            shared = jax.tree.map(lambda leaf: _shape(leaf, leaf.shape), shared)
            self._shapes = shapes = shared, shard, jax.ShapeDtypeStruct((1,), jnp.int32)
            self._facts = device_program.told_by_first(
                json.dumps(["a shard's sums", [leaf.shape for leaf in jax.tree.leaves(shapes)]]),
                lambda: self._trace(shapes),
                self.mesh,
                write=lambda facts: json.dumps(facts).encode(),
                read=lambda told: cast(tuple[int, bool], tuple(json.loads(told))),
            )
        return self._facts

    def _trace(self, shapes: tuple[PyTree, PyTree, jax.ShapeDtypeStruct]) -> tuple[int, bool]:
        traced = self._program.trace(*shapes)
        is_short = bool(traced.out_info.size < ways.SMALL_SIZE)
        return traced.out_info.size, is_short and not dependence.uses(traced.jaxpr, "conv_general_dilated")

    def _sums_of_shard(self, shared: PyTree, shard: Batch, index: jax.Array) -> jax.Array:
        return self._flat_sums(shared, shard, index[0])[None]

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
            out_spec=PartitionSpec(self.axes),
        )


class _Programs:
    """The compiled programs of one call: split the batch, compute the shards one by one, add the results."""

    def __init__(self, sums: device_program.PerDeviceProgram, place: Site, adding: Adding):
        self._sums, self._adding = sums, adding
        self._sharding = NamedSharding(place.mesh, place.held)
        self._split = splitting(place, adding.shards)
        self._indices = [self._placed(slot) for slot in np.ascontiguousarray(adding.shards.T)]
        self._mesh = place.mesh

    def __call__(self, shared: PyTree, batch: Batch) -> jax.Array:
        parts = [batch] if len(self._indices) == 1 else self._split(batch)
        slots = (self._sums(shared, part, index) for part, index in zip(parts, self._indices, strict=True))
        held = device_program.settled(self._adding.on_devices(slots), self._mesh)
        return self._adding.over_devices(held)

    def _placed(self, slot: np.ndarray) -> jax.Array:
        return jax.make_array_from_callback(slot.shape, self._sharding, slot.__getitem__)


class OneProgram:
    """One program for all shards of all devices, their sum and what follows from it, where calls take longer than what
    they compute.

    Each shard is computed by itself (see `device_program`), with the bits of a program of its own, and so is each sum.
    Not for convolutions, which take fifteen times as long in a branch on CPU devices.

    The functions are `flat_sums(shared, shard, index) -> vector`, `shared_of(donated, kept) -> shared` and
    `then(total, donated, kept) -> result`, the same on every device.
    """

    def __init__(
        self,
        flat_sums: Callable[..., jax.Array],
        place: Site,
        adding: Adding,
        *,
        shared_of: Callable[[PyTree, PyTree], PyTree],
        then: Callable[..., PyTree],
    ):
        num_slots, one_shard = adding.shards.shape[1], jax.jit(flat_sums)

        def of_device(donated: PyTree, kept: PyTree, rows: Batch, indices: jax.Array) -> PyTree:
            shared, shards = shared_of(donated, kept), zip(_equal_parts(rows, num_slots), indices, strict=True)
            vectors = [device_program.by_itself(one_shard, index >= 0, shared, shard, index) for shard, index in shards]
            return then(adding.in_program(vectors, indices), donated, kept)

        self._program = device_program.PerDeviceProgram(
            of_device,
            place.mesh,
            in_specs=(PartitionSpec(), PartitionSpec(), place.held, place.held),
            out_spec=place.total,
            donate_argnums=(0,),
            exchanges=True,
        )
        shards = adding.shards.reshape(-1)
        self._indices = jax.make_array_from_callback(
            shards.shape, NamedSharding(place.mesh, place.held), shards.__getitem__
        )

    def __call__(self, donated: PyTree, kept: PyTree, batch: Batch) -> PyTree:
        """Return the dispatched result; `donated` and `kept` are replicated, `batch` holds the fields of one."""
        return self._program(donated, kept, batch, self._indices)


def _shape(leaf: jax.Array, shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, leaf.dtype, weak_type=bool(jax.typeof(leaf).weak_type))


def checked(batch: Batch, dealing: Dealing) -> Batch:
    """Return the fields of a batch that is placed as `dealing` says.

    Raises:
      ValueError: it is placed in another way.
    """
    found = batch.dealing if isinstance(batch, DealtBatch) else None
    if found != (None if dealing.is_even else dealing):
        raise ValueError(
            f"The batch is not placed for {dealing.logical_shards} logical shards on {dealing.num_devices} devices. "
            f"Place it by data.feed(loader, mesh, logical_shards={dealing.logical_shards})."
        )
    return dict(batch)


def splitting(place: Site, shards: np.ndarray) -> Splitting:
    """Return the program that gives each slot its part of a placed batch; `shards` as in `Adding`.

    Where the devices compute other shards than were placed on them, rows change the device.
    """
    if np.array_equal(shards, place.dealing.slots()):
        split = functools.partial(_equal_parts, count=shards.shape[1])
        return cast(Splitting, place.program(split, gives=place.held))
    held_at = np.asarray(place.dealing.slot_of_shards())[shards]

    def take(batch: Batch) -> list[Batch]:
        rows = {name: leaf.reshape(place.dealing.slots().size, -1, *leaf.shape[1:]) for name, leaf in batch.items()}
        return [{name: leaf[slot].reshape(-1, *leaf.shape[2:]) for name, leaf in rows.items()} for slot in held_at.T]

    exchange = jax.jit(take, out_shardings=NamedSharding(place.mesh, place.held))
    return lambda batch: device_program.settled(exchange(batch), place.mesh)


def _equal_parts(rows: Batch, count: int) -> list[Batch]:
    """Return `count` equal parts of a batch, in order."""
    divided = {name: jnp.split(leaf, count) for name, leaf in rows.items()}
    return [dict(zip(divided, parts, strict=True)) for parts in zip(*divided.values(), strict=True)]


def check_axes(mesh: Mesh, *, axes: Sequence[str]) -> None:
    """Raise ValueError where devices of `mesh` share the computation of an example."""
    if mesh.size != math.prod(mesh.shape[axis] for axis in axes):
        raise ValueError(
            f"Canonical reduction works on a mesh of {' and '.join(axes)}; got {dict(mesh.shape)}. "
            "Use reduction='mean' on a mesh with more axes."
        )


def check_layout(mesh: Mesh, *, logical_shards: int, axes: Sequence[str] = (DATA_AXIS,)) -> None:
    """Raise ValueError where canonical reduction cannot keep its promise on `mesh`."""
    num_devices = math.prod(mesh.shape[axis] for axis in axes)
    if logical_shards < 1:
        raise ValueError(f"logical_shards must be at least 1; got {logical_shards}.")
    if num_devices > logical_shards:
        raise ValueError(
            f"Canonical reduction gives every device at least one logical shard; got {num_devices} devices and "
            f"{logical_shards} logical shards. Use {logical_shards} devices or fewer, or raise logical_shards, which "
            "gives other bits."
        )
    if mesh.devices.flat[0].platform == "cpu":
        thread_pool.check(logical_shards, jax.local_device_count("cpu"))
