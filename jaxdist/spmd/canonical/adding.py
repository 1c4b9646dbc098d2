"""How the vectors of the logical shards are added: three ways that differ in memory and messages, and in no bit.

Each deals the shards to the devices in turns (slots), one program call of every device each, and adds what comes out in
the tree that the number of shards alone decides: neighbours first, then pairs of pairs; an odd one out waits for the
next level.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from jaxdist.spmd import device_program, reduce
from jaxdist.spmd.mesh import Dealing, is_power_of_two

BLOCK_SIZE = 1 << 20
"""Elements that are exchanged at a time where vectors are added in slices."""

SMALL_SIZE = 1 << 18
"""Elements of a vector below which holding several costs no memory to speak of."""

Axes: TypeAlias = tuple[str, ...]
T = TypeVar("T")


class Adding(Protocol):
    """Adds the vectors of all logical shards.

    Attributes:
      shards: the number of the logical shard that each device computes in each slot, int32 [devices, slots].
    """

    shards: np.ndarray

    def on_devices(self, slots: Iterable[jax.Array]) -> Any:
        """Return what the devices hold after all slots; each slot is [devices, size], a row on each device."""

    def in_program(self, vectors: Sequence[jax.Array], shards: jax.Array) -> jax.Array:
        """Return the sum, inside a program of all devices that has this device's vectors, of the shards so numbered."""

    def over_devices(self, held: Any) -> jax.Array:
        """Return the sum, replicated."""


class Site(NamedTuple):
    """Where vectors are added: over these axes of this mesh, of shards dealt so.

    Where several devices compute a shard together, along the axes `within`, each holds a part of its vector, and the
    parts are added like vectors: what is said of a device is then said of such a group.
    """

    mesh: Mesh
    axes: Axes
    dealing: Dealing
    within: Axes = ()

    @property
    def held(self) -> PartitionSpec:
        """How the rows of all devices are sharded."""
        return PartitionSpec(self.axes, self.within) if self.within else PartitionSpec(self.axes)

    @property
    def total(self) -> PartitionSpec:
        """How the sum of the rows is sharded."""
        return PartitionSpec(self.within) if self.within else PartitionSpec()

    def program(self, function: Callable[..., Any], *, gives: PartitionSpec, donates: Sequence[int] = ()) -> Any:
        """Return the jitted function of what the devices hold, rows of each device."""
        mapped = jax.shard_map(function, mesh=self.mesh, in_specs=self.held, out_specs=gives, check_vma=False)
        return jax.jit(mapped, donate_argnums=donates)


def held_whole(place: Site, size: int) -> Adding:
    """Return the way with the fewest messages; `size` is that of a vector."""
    del size
    fits = place.dealing.is_even and is_power_of_two(place.dealing.logical_shards)
    return PairTree(place) if fits else AnyTree(place)


def held_in_slices(place: Site, size: int) -> Adding:
    """Return the way that takes the least memory, where memory counts."""
    return held_whole(place, size) if size < SMALL_SIZE else SliceTree(place, size)


class PairTree:
    """Adds a power of two of shards, as many on each device: each adds up its own, and then they meet.

    A device holds one vector of its own shards, and few more while they are computed.
    """

    def __init__(self, place: Site):
        self.shards = place.dealing.slots()
        self._add = jax.jit(_add_in_pairs, donate_argnums=0)
        self.over_devices: Callable[[Any], jax.Array] = place.program(
            lambda row: reduce.tree_sum_over_axis(row[0], place.axes, place.dealing.num_devices),
            gives=place.total,
        )

    def on_devices(self, slots: Iterable[jax.Array]) -> jax.Array:
        """Return the sums of each device's shards, added up as they are dispatched."""
        rows = TreeSum(self._add)
        for slot in slots:
            rows.push(slot)
        return rows.result()

    def in_program(self, vectors: Sequence[jax.Array], shards: jax.Array) -> jax.Array:
        """See Adding."""
        total = _tree_sum_by_itself(shards, *vectors)
        for pairs in reduce.doubling(self.shards.shape[0]):
            total = _tree_sum_by_itself(shards, total, device_program.exchange(total, pairs))
        return total


class AnyTree:
    """Adds any number of shards, dealt to any number of devices: each device adds a slice of all vectors.

    A device holds the vectors of all its shards, and its slice of everybody's.
    """

    def __init__(self, place: Site):
        self.shards = place.dealing.slots()
        self.over_devices: Callable[[Any], jax.Array] = place.program(
            lambda slots: reduce.tree_sum_of_slots(jnp.concatenate(slots), place.axes, place.dealing.slot_of_shards()),
            gives=place.total,
        )

    def on_devices(self, slots: Iterable[jax.Array]) -> list[jax.Array]:
        """Return the vectors of each device's shards."""
        return list(slots)

    def in_program(self, vectors: Sequence[jax.Array], shards: jax.Array) -> jax.Array:
        """See Adding."""
        num_devices, own = self.shards.shape[0], jnp.stack(vectors)
        rows = jnp.zeros((int(self.shards.max()) + 1, own.shape[1]), own.dtype).at[shards].set(own)
        for distance in range(1, num_devices):
            pairs = [(source, (source + distance) % num_devices) for source in range(num_devices)]
            rows = rows.at[device_program.exchange(shards, pairs)].set(device_program.exchange(own, pairs))
        return _tree_sum_by_itself(shards, *rows)


class SliceTree:
    """Adds any number of shards, each device a slice of all vectors, after every slot.

    In a slot the devices compute consecutive shards, so that these can be added at once; a device holds one vector and
    slices of few sums. Vectors are exchanged in blocks, because an exchange takes the memory of what is sent and
    received once more.
    """

    def __init__(self, place: Site, size: int):
        count, num_devices = place.dealing.logical_shards, place.dealing.num_devices
        turns = np.arange(place.dealing.num_slots * num_devices, dtype=np.int32).reshape(-1, num_devices)
        self.shards = np.minimum(turns, count - 1).T
        self._mesh, self._blocks = place.mesh, _Blocks(size, num_devices, place.axes)
        self._turns, levels = [], list[int]()
        for turn in turns:
            new = min(num_devices, count - int(turn[0]))
            later, _ = _counted_up(levels, [0] * len(levels), [0] * new)
            num_kept = sum(before == after for before, after in zip(levels, later, strict=False))
            function = functools.partial(self._add_slot, tuple(levels[num_kept:]), new, len(later) - num_kept)
            self._turns.append((num_kept, place.program(function, gives=place.held, donates=(0,))))
            levels = later
        self.over_devices: Callable[[Any], jax.Array] = place.program(self._gather, gives=PartitionSpec())

    def on_devices(self, slots: Iterable[jax.Array]) -> list[jax.Array]:
        """Return slices of the sums that wait for each other; on CPU devices, waits for every slot."""
        sums: list[jax.Array] = []
        each = iter(slots)
        for num_kept, program in self._turns:
            vector = device_program.settled(next(each), self._mesh)
            made = program(sums[num_kept] if sums[num_kept:] else None, sums[num_kept + 1 :], vector)
            sums = [*sums[:num_kept], *device_program.settled(made, self._mesh)]
            del vector, made
        return sums

    def in_program(self, vectors: Sequence[jax.Array], shards: jax.Array) -> jax.Array:
        """Not possible: slices are exchanged between the shards of a device."""
        raise NotImplementedError

    def _add_slot(
        self,
        levels: Sequence[int],
        new: int,
        num_results: int,
        first: jax.Array | None,
        later: list[jax.Array],
        vector: jax.Array,
    ) -> list[jax.Array]:
        """Return the slices of sums after a slot, of whose vectors the first `new` count; `first` is donated."""

        def add(own: list[jax.Array], received: jax.Array) -> list[jax.Array]:
            return _counted_up(levels, own, [received[row] for row in range(new)])[1]

        return self._blocks.scatter(vector[0], first, later, num_results, add)

    def _gather(self, sums: list[jax.Array]) -> jax.Array:
        return self._blocks.gather(functools.reduce(lambda later, earlier: earlier + later, reversed(sums)))


class _Blocks(NamedTuple):
    """A vector in blocks, of each of which a device has an equal piece; the last block is smaller, and padded."""

    size: int
    num_devices: int
    axes: Axes

    @property
    def _piece(self) -> int:
        return BLOCK_SIZE // self.num_devices

    @property
    def _count(self) -> int:
        return self.size // (self._piece * self.num_devices)

    @property
    def _rest(self) -> int:
        return self.size - self._count * self._piece * self.num_devices

    def scatter(
        self,
        vector: jax.Array,
        first: jax.Array | None,
        later: list[jax.Array],
        num_results: int,
        add: Callable[[list[jax.Array], jax.Array], list[jax.Array]],
    ) -> list[jax.Array]:
        """Return `add(own slices, everybody's vectors in this slice)`, block by block; `first` is one of the slices, in
        whose place the first result is written.
        """
        piece, block = self._piece, self._piece * self.num_devices
        rest = jnp.pad(vector[self.size - self._rest :], (0, -self._rest % self.num_devices))
        length = self._count * piece + rest.size // self.num_devices
        zeros = [jnp.zeros(length, vector.dtype)] * num_results

        def written(results: list[jax.Array], begin: Any, size: int, part: jax.Array) -> list[jax.Array]:
            rows = part.reshape(self.num_devices, -1)
            received = lax.all_to_all(rows, self.axes, split_axis=0, concat_axis=0, tiled=True)
            given = [*([] if first is None else results[:1]), *later]
            made = add([lax.dynamic_slice_in_dim(each, begin, size) for each in given], received)
            pairs = zip(results, made, strict=True)
            return [lax.dynamic_update_slice_in_dim(result, each, begin, 0) for result, each in pairs]

        def write(number: jax.Array, results: list[jax.Array]) -> list[jax.Array]:
            part = lax.dynamic_slice_in_dim(vector, number * block, block)
            return written(results, number * piece, piece, part)

        begun = zeros if first is None else [first, *zeros[1:]]
        results = lax.fori_loop(0, self._count, write, begun)
        return written(results, self._count * piece, length - self._count * piece, rest) if self._rest else results

    def gather(self, pieces: jax.Array) -> jax.Array:
        """Return the whole vector from the devices' pieces of it."""
        piece, block = self._piece, self._piece * self.num_devices

        def write(number: jax.Array, vector: jax.Array) -> jax.Array:
            own = lax.dynamic_slice_in_dim(pieces, number * piece, piece)
            return lax.dynamic_update_slice_in_dim(vector, self._gathered(own), number * block, 0)

        vector = lax.fori_loop(0, self._count, write, jnp.zeros(self.size, pieces.dtype))
        if not self._rest:
            return vector
        rest = self._gathered(pieces[self._count * piece :])[: self._rest]
        return lax.dynamic_update_slice_in_dim(vector, rest, self._count * block, 0)

    def _gathered(self, pieces: jax.Array) -> jax.Array:
        return lax.all_gather(pieces, self.axes, tiled=True)


def _counted_up(levels: Sequence[int], sums: Sequence[T], new: Sequence[T]) -> tuple[list[int], list[T]]:
    """Return the sums, and their levels in the tree, after new values: equal levels are added, like the carries of a
    counter.
    """
    found = list(zip(levels, sums, strict=True))
    for value in new:
        found.append((0, value))
        while len(found) > 1 and found[-1][0] == found[-2][0]:
            (level, first), (_, second) = found[-2:]
            found[-2:] = [(level + 1, first + second)]  # type: ignore[operator]
    return [level for level, _ in found], [value for _, value in found]


class TreeSum:
    """Adds values in a balanced binary tree as they arrive, two levels at a time, like the carries of a counter.

    Few partial sums are held at a time (five for eight values), where adding at the end would hold all values. One
    program adds four values, because dispatching three programs would cost more than the additions.
    """

    def __init__(self, add: Callable[..., jax.Array]):
        self._add = add
        self._partial: list[tuple[int, jax.Array]] = []

    def push(self, value: jax.Array) -> None:
        """Add the next value."""
        self._partial.append((0, value))
        while [level for level, _ in self._partial[-4:]] == 4 * [self._partial[-1][0]]:
            self._combine(4)

    def result(self) -> jax.Array:
        """Return the sum of all values."""
        if len(self._partial) == 2:
            self._combine(2)
        assert len(self._partial) == 1, "the number of values pushed was not a power of two"
        return self._partial.pop()[1]

    def _combine(self, count: int) -> None:
        summands, self._partial = self._partial[-count:], self._partial[:-count]
        total = self._add(*(value for _, value in summands))
        self._partial.append((summands[0][0] + count // 2, total))


def _tree_sum_by_itself(shards: jax.Array, *vectors: jax.Array) -> jax.Array:
    return device_program.by_itself(lambda *vectors: reduce.tree_sum(vectors), shards[0] >= 0, *vectors)


def _add_in_pairs(*values: jax.Array) -> jax.Array:
    """Return the sum of two values, or of four as the sum of two sums."""
    first, second, *rest = values
    return first + second + _add_in_pairs(*rest) if rest else first + second
