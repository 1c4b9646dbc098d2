"""From host batches to global arrays on the mesh, a few batches ahead of the step.

The rows that a process supplies follow from the sharding, so they are right for any mesh: with replicated axes several
devices (and processes) hold copies of the same rows, and each process computes the rows it needs by itself.
"""

import atexit
import contextlib
import functools
import itertools
import math
import queue
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxdist.data.assembly import ExampleError, HostArrays
from jaxdist.data.loader import HostBatch, Loader, as_slice
from jaxdist.data.position import Position
from jaxdist.setting_group import whole_number
from jaxdist.spmd import jax_private
from jaxdist.spmd.mesh import Dealing, DealtBatch
from jaxdist.spmd.metrics import MASK, Batch

Item = TypeVar("Item")


def batch_sharding(mesh: Mesh, axes: Sequence[str] = ("data",)) -> NamedSharding:
    """Return the sharding of a batch: dim 0 spread over `axes`, copies along all others."""
    missing = [axis for axis in axes if axis not in mesh.shape]
    if missing or not axes:
        raise ValueError(f"The batch is to be spread over the axes {tuple(axes)}; the mesh has {dict(mesh.shape)}.")
    return NamedSharding(mesh, PartitionSpec(tuple(axes)))


def process_rows(
    mesh: Mesh, global_batch_size: int, axes: Sequence[str] = ("data",), *, logical_shards: int | None = None
) -> np.ndarray:
    """Return the rows of a global batch that this process's devices hold, ascending, int64.

    Raises:
      ValueError: global_batch_size is not a multiple of the devices along `axes`, or of the logical shards.
    """
    return _place_of(mesh, global_batch_size, axes, logical_shards).needed


class _Place(NamedTuple):
    """Where the rows of a global batch go.

    Attributes:
      sharding: of the placed batch.
      needed: the rows of the global batch that this process's devices hold, ascending.
      devices: of this process.
      rows: the places in `needed` of each device's rows; a slice where they follow each other, so that it is no copy.
      num_rows: of the placed batch.
      dealing: how logical shards are dealt, where the placed batch is not the global batch in its own order.
    """

    sharding: NamedSharding
    needed: np.ndarray
    devices: list[jax.Device]
    rows: list[slice | np.ndarray]
    num_rows: int
    dealing: Dealing | None


def _place_of(mesh: Mesh, global_batch_size: int, axes: Sequence[str], logical_shards: int | None) -> _Place:
    sharding = batch_sharding(mesh, axes)
    num_devices = math.prod(mesh.shape[axis] for axis in axes)
    dealing = None if logical_shards is None else Dealing(logical_shards, num_devices)
    if dealing is None or dealing.is_even:
        dealing, placed = None, np.arange(global_batch_size)
    else:
        placed = dealing.rows(global_batch_size)
    if global_batch_size < 1 or len(placed) % num_devices:
        raise ValueError(
            f"The global batch must divide evenly over the mesh axes {tuple(axes)}: global_batch_size is "
            f"{global_batch_size}, the devices along them are {num_devices}. Choose a multiple of {num_devices}."
        )
    held = []
    for device, index in sharding.addressable_devices_indices_map((len(placed),)).items():
        assert index is not None  # only devices of other processes have none
        held.append((device, placed[index[0]]))
    needed = np.unique(np.concatenate([rows for _, rows in held]))
    rows = [as_slice(np.searchsorted(needed, rows)) for _, rows in held]
    return _Place(sharding, needed, [device for device, _ in held], rows, len(placed), dealing)


def host_shards(mesh: Mesh, num_shards: int, axes: Sequence[str] = ("data",)) -> list[int]:
    """Return the numbers of the shards whose examples this process's devices need."""
    num_rows = math.lcm(num_shards, math.prod(mesh.shape[axis] for axis in axes))
    rows = process_rows(mesh, num_rows, axes)
    return np.unique(rows // (num_rows // num_shards)).tolist()


def _place_batch(batch: HostArrays, place: _Place) -> Batch:
    """Return the global arrays whose rows `place.needed` are those of `batch`, which must not change any more."""
    found = {name: _place_field(array, place) for name, array in batch.items()}
    return found if place.dealing is None else DealtBatch(found, place.dealing)


def _place_field(array: np.ndarray, place: _Place) -> jax.Array:
    # Part by part also where a process has all of them: device_put of the whole would compare the copies of several
    # processes, and takes longer than a small step.
    array = array.astype(jax.dtypes.canonicalize_dtype(array.dtype), copy=False)
    parts = [array[rows] for rows in place.rows]
    shape = (place.num_rows, *array.shape[1:])
    return jax_private.array_of_parts(shape, place.sharding, place.devices, parts)


def check_numbers(batch: HostArrays, ids: Callable[[], np.ndarray]) -> None:
    """Raise ExampleError where a number would become another on the devices; `ids` returns the rows' examples.

    Devices hold numbers of 64 bits as 32, unless `jax_enable_x64` is set. Floats are rounded; none becomes infinite.
    """
    for name, array in batch.items():
        if array.dtype == np.float64 and jax.dtypes.canonicalize_dtype(array.dtype) != array.dtype:
            _check_floats(name, array, ids)
        if array.dtype.kind not in "iu" or (wanted := jax.dtypes.canonicalize_dtype(array.dtype)) == array.dtype:
            continue
        limits = np.iinfo(wanted)
        if not array.size or (array.min() >= limits.min and array.max() <= limits.max):
            continue
        outside = np.argwhere((array < limits.min) | (array > limits.max))[0]
        raise ExampleError(
            f"Field {name!r} of example {ids()[outside[0]]} holds {array[tuple(outside)]}, but devices hold whole "
            f"numbers as {wanted}, from {limits.min} to {limits.max}. Renumber the values, split them into two "
            "fields, or set JAX_ENABLE_X64=1."
        )


def _check_floats(name: str, array: np.ndarray, ids: Callable[[], np.ndarray]) -> None:
    limit = float(np.finfo(np.float32).max)
    large = (array > limit) | (array < -limit)
    if large.any() and (large := large & np.isfinite(array)).any():
        place = tuple(np.argwhere(large)[0])
        raise ExampleError(
            f"Field {name!r} of example {ids()[place[0]]} holds {array[place]}, but devices hold such numbers as "
            f"float32, up to {limit:.3g}, so it would become infinite. Scale the field, or set JAX_ENABLE_X64=1."
        )


def _ids_of_batch(loader: Loader, number: int) -> np.ndarray:
    return next(itertools.islice(loader.plans(), number, None)).ids


def feed(
    loader: Loader,
    mesh: Mesh,
    axes: Sequence[str] = ("data",),
    prefetch: int = 2,
    *,
    logical_shards: int | None = None,
) -> Iterator[tuple[Batch, Position]]:
    """Yield (batch, Position after it), the batch as global arrays spread over `axes`; `prefetch` batches are placed
    ahead, small ones that are made in one thread 8 to 16.

    Batches of a few kilobytes that are rows of arrays in memory are placed in the thread that asks for them, eight at a
    time: that takes less than taking turns with another thread. Closing the iterator (or dropping it) ends its thread
    and those of the loader. An exception of the loader is raised here, in its turn. `logical_shards` is that of a
    canonical step: where the devices do not divide them, batches are placed as that step needs them (see
    `spmd.mesh.Dealing`).

    Raises:
      ValueError: global_batch_size does not divide over `axes`; the loader's rows are not those that this process
        needs.
    """
    place = _place_of(mesh, loader.global_batch_size, axes, logical_shards)
    rows = place.needed
    if loader.rows is not None and not np.array_equal(loader.rows, rows):
        raise ValueError(
            f"The loader supplies {len(loader.rows)} rows of the global batch, but this process's devices hold rows "
            f"{rows[0]} to {rows[-1]} ({len(rows)} of them). Leave the loader's `rows` out: feed finds them itself."
        )
    loader, prefetch = loader.with_rows(rows), whole_number("prefetch", prefetch)
    if loader.takes_rows_from_memory and _example_bytes(loader) * len(rows) <= _TINY_BYTES:
        return _placed_in_turn(loader, place)
    return _prefetched(loader, place, prefetch)


_TINY_BYTES, _AT_A_TIME = 1 << 16, 8
"""Batches that are placed in the thread that trains, and how many of them at a time: the code and what it looks up
leave the processor's caches in a step."""


def _example_bytes(loader: Loader) -> int:
    return sum(array.nbytes for array in loader.source.__getitems__([0]).values())  # type: ignore[attr-defined]


def _placed_in_turn(loader: Loader, place: _Place) -> Iterator[tuple[Batch, Position]]:
    with contextlib.closing(iter(loader)) as batches:
        placed = _with_its_error(_placed(loader, batches, place))
        while some := list(itertools.islice(placed, _AT_A_TIME)):
            for item in some:
                if isinstance(item, Exception):
                    raise item
                yield item


def _with_its_error(items: Iterator[Item]) -> Iterator[Item | Exception]:
    """Yield the items, and what is raised after them."""
    try:
        yield from items
    except Exception as error:
        yield error


def _placed(loader: Loader, batches: Iterator[HostBatch], place: _Place) -> Iterator[tuple[Batch, Position]]:
    """Yield the batches of a loader as they are placed."""
    place_batch = _Placer(place)
    for count, (batch, position) in enumerate(batches):
        check_numbers(batch, functools.partial(_ids_of_batch, loader, count))
        yield place_batch(batch), position


_MOST_AHEAD, _SMALL_BYTES = 16, 1 << 20
"""Batches that are placed ahead where `feed`'s own thread makes them and all together are small."""


class _Room:
    """Room for the batches that are placed ahead. Where they are small, it is given back for several at once.

    To wake the thread that makes them takes longer than to make a small one.
    """

    def __init__(self, prefetch: int) -> None:
        self._free, self._ahead, self._at_a_time, self._taken = threading.Semaphore(prefetch), prefetch, 1, 0

    def grow(self, ahead: int) -> None:
        """Have room for so many, if that is more; called by the thread that makes them, before the first is ready."""
        if ahead > self._ahead:
            self._at_a_time = ahead // 2
            self._free.release(ahead - self._ahead)

    def wait(self) -> None:
        """Wait for room for one."""
        self._free.acquire()

    def give_back(self) -> None:
        """Note that one was taken."""
        self._taken += 1
        if self._taken >= self._at_a_time:
            self._free.release(self._taken)
            self._taken = 0

    def end(self) -> None:
        """Let the thread that waits go."""
        self._free.release()


class _Placer:
    """Places the batches of a loader, and a mask once that is the same as the one before."""

    def __init__(self, place: _Place) -> None:
        self._place, self._last = place, b""
        self._placed_mask: Batch = {}

    def __call__(self, batch: HostArrays) -> Batch:
        """Return the placed batch; see `_place_batch`."""
        mask = batch.get(MASK)
        if mask is None or mask.ndim > 1 or self._place.dealing is not None:
            return _place_batch(batch, self._place)
        if self._last != (found := mask.tobytes()):
            self._last, self._placed_mask = found, _place_batch({MASK: mask}, self._place)
        rest = {name: array for name, array in batch.items() if name != MASK}
        return {**_place_batch(rest, self._place), **self._placed_mask}


_EXIT_SECONDS = 5.0
"""How long the end of Python waits for a batch that is being made."""


def _prefetched(loader: Loader, place: _Place, prefetch: int) -> Iterator[tuple[Batch, Position]]:
    ready: queue.SimpleQueue = queue.SimpleQueue()
    room, stopped = _Room(prefetch), threading.Event()
    arguments = (loader, place, ready, room, stopped)
    thread = threading.Thread(target=_place_ahead, args=arguments, name="jaxdist-feed", daemon=True)
    thread.start()

    def end(seconds: float | None = None) -> None:
        stopped.set()
        room.end()
        thread.join(seconds)

    # At its end Python stops the threads where they are; one that is in JAX would take the process with it (SIGABRT).
    at_exit = functools.partial(end, _EXIT_SECONDS)
    atexit.register(at_exit)
    try:
        while True:
            item = ready.get()
            if isinstance(item, BaseException):
                raise item
            if item is None:
                return
            room.give_back()
            yield item
    finally:
        atexit.unregister(at_exit)
        if not sys.is_finalizing():  # by then Python has stopped the thread where it was, and never ends it
            end()


def _place_ahead(
    loader: Loader, place: _Place, ready: queue.SimpleQueue, room: _Room, stopped: threading.Event
) -> None:
    """Place batches while there is room for them; the last item is None, or the exception that ended it."""
    try:
        with contextlib.closing(iter(loader)) as batches:
            placed, is_first = _placed(loader, batches, place), True
            while True:
                room.wait()
                item = None if stopped.is_set() else next(placed, None)
                if item is None:
                    break
                if is_first and loader.assembles_itself:
                    num_bytes = sum(array.nbytes for array in item[0].values())
                    room.grow(min(_SMALL_BYTES // max(num_bytes, 1), _MOST_AHEAD))
                is_first = False
                ready.put(item)
        ready.put(None)
    except Exception as error:  # handed to the consumer, who raises it
        ready.put(error)
