"""From host batches to global arrays on the mesh, a few batches ahead of the step.

The rows that a process supplies follow from the sharding, so they are right for any mesh: with replicated axes several
devices (and processes) hold copies of the same rows, and each process computes the rows it needs by itself.
"""

import contextlib
import functools
import itertools
import math
import queue
import threading
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxdist.data.assembly import ExampleError, HostArrays
from jaxdist.data.loader import Loader
from jaxdist.data.position import Position


def batch_sharding(mesh: Mesh, axes: Sequence[str] = ("data",)) -> NamedSharding:
    """Return the sharding of a batch: dim 0 spread over `axes`, copies along all others."""
    missing = [axis for axis in axes if axis not in mesh.shape]
    if missing or not axes:
        raise ValueError(f"The batch is to be spread over the axes {tuple(axes)}; the mesh has {dict(mesh.shape)}.")
    return NamedSharding(mesh, PartitionSpec(tuple(axes)))


def process_rows(mesh: Mesh, global_batch_size: int, axes: Sequence[str] = ("data",)) -> np.ndarray:
    """Return the rows of a global batch that this process's devices hold, ascending, int64.

    Raises:
      ValueError: global_batch_size is not a multiple of the devices along `axes`.
    """
    rows = [np.arange(global_batch_size)[index] for _, index in _device_slices(mesh, axes, global_batch_size)]
    return np.unique(np.concatenate(rows))


def host_shards(mesh: Mesh, num_shards: int, axes: Sequence[str] = ("data",)) -> list[int]:
    """Return the numbers of the shards whose examples this process's devices need."""
    num_rows = math.lcm(num_shards, math.prod(mesh.shape[axis] for axis in axes))
    rows = process_rows(mesh, num_rows, axes)
    return np.unique(rows // (num_rows // num_shards)).tolist()


def place(
    batch: HostArrays, rows: np.ndarray, mesh: Mesh, global_batch_size: int, axes: Sequence[str]
) -> dict[str, jax.Array]:
    """Return the global arrays whose rows `rows` are those of `batch`, which must not change any more."""
    sharding = batch_sharding(mesh, axes)
    if sharding.is_fully_addressable:
        return jax.device_put(batch, sharding)
    # With several processes, device_put would first compare copies of the whole batch, so it is placed shard by shard.
    slices = _device_slices(mesh, axes, global_batch_size)
    devices = [device for device, _ in slices]
    # A device's rows are contiguous in the global batch, and so in `rows`, which has all of them in order.
    begins = [int(np.searchsorted(rows, index.start)) for _, index in slices]
    ends = [begin + index.stop - index.start for begin, (_, index) in zip(begins, slices)]
    shards = {name: [array[begin:end] for begin, end in zip(begins, ends)] for name, array in batch.items()}
    placed = jax.device_put(shards, dict.fromkeys(batch, devices))
    return {
        name: jax.make_array_from_single_device_arrays((global_batch_size, *array.shape[1:]), sharding, placed[name])
        for name, array in batch.items()
    }


def check_integers(batch: HostArrays, ids: Callable[[], np.ndarray]) -> None:
    """Raise ExampleError where a whole number would change its value on the devices; `ids` returns the rows' examples.

    Devices hold whole numbers of 64 bits as 32, unless `jax_enable_x64` is set.
    """
    for name, array in batch.items():
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


def _ids_of_batch(loader: Loader, number: int) -> np.ndarray:
    return next(itertools.islice(loader.plans(), number, None)).ids


def feed(
    loader: Loader, mesh: Mesh, axes: Sequence[str] = ("data",), prefetch: int = 2
) -> Iterator[tuple[dict[str, jax.Array], Position]]:
    """Yield (batch, Position after it), the batch as global arrays spread over `axes`; `prefetch` batches are placed
    ahead.

    Closing the iterator (or dropping it) ends its thread and those of the loader. An exception of the loader is raised
    here, in its turn.

    Raises:
      ValueError: global_batch_size does not divide over `axes`; the loader's rows are not those that this process
        needs.
    """
    rows = process_rows(mesh, loader.global_batch_size, axes)
    if loader.rows is not None and not np.array_equal(loader.rows, rows):
        raise ValueError(
            f"The loader supplies {len(loader.rows)} rows of the global batch, but this process's devices hold rows "
            f"{rows[0]} to {rows[-1]} ({len(rows)} of them). Leave the loader's `rows` out: feed finds them itself."
        )
    if prefetch < 1:
        raise ValueError(f"prefetch must be at least 1; got {prefetch}.")
    return _prefetched(loader.with_rows(rows), rows, mesh, tuple(axes), prefetch)


def _prefetched(
    loader: Loader, rows: np.ndarray, mesh: Mesh, axes: tuple[str, ...], prefetch: int
) -> Iterator[tuple[dict[str, jax.Array], Position]]:
    ready: queue.SimpleQueue = queue.SimpleQueue()
    room = threading.Semaphore(prefetch)
    stopped = threading.Event()
    arguments = (loader, rows, mesh, axes, ready, room, stopped)
    thread = threading.Thread(target=_place_ahead, args=arguments, name="jaxdist-feed", daemon=True)
    thread.start()
    try:
        while True:
            item = ready.get()
            if isinstance(item, BaseException):
                raise item
            if item is None:
                return
            room.release()
            yield item
    finally:
        stopped.set()
        room.release()
        thread.join()


def _place_ahead(
    loader: Loader,
    rows: np.ndarray,
    mesh: Mesh,
    axes: tuple[str, ...],
    ready: queue.SimpleQueue,
    room: threading.Semaphore,
    stopped: threading.Event,
) -> None:
    """Place batches while there is room for them; the last item is None, or the exception that ended it."""
    try:
        with contextlib.closing(iter(loader)) as batches:
            for count in itertools.count():
                if not room.acquire() or stopped.is_set():
                    break
                item = next(batches, None)
                if item is None:
                    break
                check_integers(item.batch, functools.partial(_ids_of_batch, loader, count))
                ready.put((place(item.batch, rows, mesh, loader.global_batch_size, axes), item.position))
        ready.put(None)
    except Exception as error:  # handed to the consumer, who raises it
        ready.put(error)


def _device_slices(mesh: Mesh, axes: Sequence[str], global_batch_size: int) -> list[tuple[jax.Device, slice]]:
    """Return this process's devices, each with its slice of the batch, start and stop filled in."""
    sharding = batch_sharding(mesh, axes)
    num_shards = int(np.prod([mesh.shape[axis] for axis in axes]))
    if global_batch_size < 1 or global_batch_size % num_shards:
        raise ValueError(
            f"The global batch must divide evenly over the mesh axes {tuple(axes)}: global_batch_size is "
            f"{global_batch_size}, the devices along them are {num_shards}. Choose a multiple of {num_shards}."
        )
    slices = []
    for device, index in sharding.addressable_devices_indices_map((global_batch_size,)).items():
        assert index is not None  # only devices of other processes have none
        slices.append((device, slice(*index[0].indices(global_batch_size)[:2])))
    return slices
