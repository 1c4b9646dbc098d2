"""Meshes of devices, and the arithmetic that divides a batch over them, in equal parts or by logical shards."""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from jaxdist.spmd.metrics import Batch

DATA_AXIS = "data"


def make_mesh(axes: Mapping[str, int] | None = None, *, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Return a mesh with the named axes, all of them Auto.

    Args:
      axes: axis name -> size, outermost first; one size may be -1 and takes the devices that are left.
        None is `{"data": -1}`: every device on the data axis.
      devices: the devices to use, in order; all of the job's devices by default.

    Raises:
      ValueError: the sizes do not multiply to the number of devices.

    >>> make_mesh({"data": -1}).shape["data"] == jax.device_count()
    True
    """
    axes = {DATA_AXIS: -1} if axes is None else dict(axes)
    devices = jax.devices() if devices is None else list(devices)
    sizes = _fill_sizes(axes, len(devices))
    # jax.make_mesh may reorder devices to fit a torus; the caller's order is kept here because canonical reduction
    # assigns logical shards to devices by their place in the mesh, and data order follows the same places.
    return Mesh(np.asarray(devices).reshape(sizes), tuple(axes), axis_types=(AxisType.Auto,) * len(axes))


def _fill_sizes(axes: Mapping[str, int], num_devices: int) -> tuple[int, ...]:
    wildcards = [name for name, size in axes.items() if size == -1]
    wrong = {name: size for name, size in axes.items() if size < 1 and size != -1}
    if wrong or len(wildcards) > 1 or not axes:
        raise ValueError(
            f"Mesh axes need positive sizes, at most one of them -1; got {dict(axes)}. "
            'Give each axis its number of devices, for example {"data": -1}.'
        )
    known = math.prod(size for size in axes.values() if size != -1)
    if num_devices % known or (not wildcards and known != num_devices):
        raise ValueError(
            f"The axis sizes of a mesh must multiply to the number of devices; got {dict(axes)} (product {known}) "
            f"for {num_devices} devices. Change a size, set one of them to -1, or choose the devices to use."
        )
    return tuple(num_devices // known if size == -1 else size for size in axes.values())


@dataclasses.dataclass(frozen=True)
class BatchSizes:
    """Examples per step, at each level of the mesh. Every field but the counts is in examples."""

    global_batch_size: int
    host_batch_size: int
    device_batch_size: int
    microbatch_size: int
    num_microbatches: int


def batch_sizes(
    global_batch_size: int,
    mesh: Mesh,
    *,
    axes: Sequence[str] = (DATA_AXIS,),
    num_microbatches: int = 1,
    logical_shards: int | None = None,
) -> BatchSizes:
    """Return how many examples of a global batch each host, device and microbatch gets.

    The batch is sharded over `axes` and replicated over the others. `num_microbatches` are parts of a device's batch
    whose gradients are summed before the update; `logical_shards` are the fixed slices of the batch under canonical
    reduction.

    Raises:
      ValueError: the batch does not divide; the message proposes the nearest sizes that do.
    """
    num_shards = math.prod(mesh.shape[axis] for axis in axes)
    parts = (logical_shards or num_shards) * num_microbatches
    if global_batch_size < 1 or num_microbatches < 1 or global_batch_size % parts:
        over = f"{num_shards} devices" if logical_shards is None else f"{logical_shards} logical shards"
        raise ValueError(
            f"global_batch_size must be a positive multiple of {parts} ({over} x {num_microbatches} microbatches); "
            f"got {global_batch_size}. Nearest valid: {_nearest_multiples(global_batch_size, parts)}."
        )
    device_batch_size = global_batch_size // num_shards
    if logical_shards is not None:
        device_batch_size = global_batch_size // logical_shards * Dealing(logical_shards, num_shards).num_slots
    return BatchSizes(
        global_batch_size=global_batch_size,
        host_batch_size=device_batch_size * _num_local_shards(mesh, axes),
        device_batch_size=device_batch_size,
        microbatch_size=device_batch_size // num_microbatches,
        num_microbatches=num_microbatches,
    )


def _nearest_multiples(number: int, divisor: int) -> str:
    below = number // divisor * divisor
    return f"{below} or {below + divisor}" if below > 0 else f"{divisor}"


def _num_local_shards(mesh: Mesh, axes: Sequence[str]) -> int:
    """Return how many different slices of the batch the devices of this process hold."""
    dims = [mesh.axis_names.index(axis) for axis in axes]
    process = jax.process_index()
    places = np.argwhere(np.vectorize(lambda device: device.process_index == process, otypes=[bool])(mesh.devices))
    return len({tuple(place[dims]) for place in places})


class Dealing(NamedTuple):
    """How `logical_shards` shards of a batch are dealt to `num_devices` devices, at most one device for each shard.

    Device d of N computes the shards floor(d V / N) to floor((d + 1) V / N) - 1 of V. Where N does not divide V, some
    have one more than others; each has as many slots as the largest share, and fills the rest with its last shard
    again, whose second result is dropped.
    """

    logical_shards: int
    num_devices: int

    @property
    def num_slots(self) -> int:
        """How many shards the programs of each device compute."""
        return -(-self.logical_shards // self.num_devices)

    @property
    def is_even(self) -> bool:
        """Whether all devices have as many shards: a batch is then placed in its own order."""
        return self.logical_shards % self.num_devices == 0

    def slots(self) -> np.ndarray:
        """Return the number of the logical shard in each slot, int32, shape (num_devices, num_slots)."""
        bounds = np.arange(self.num_devices + 1, dtype=np.int64) * self.logical_shards // self.num_devices
        first, last = bounds[:-1, None], bounds[1:, None] - 1
        return np.minimum(first + np.arange(self.num_slots), last).astype(np.int32)

    def slot_of_shards(self) -> list[int]:
        """Return, for each logical shard, its place in `slots().reshape(-1)`."""
        _, places = np.unique(self.slots().reshape(-1), return_index=True)
        return [int(place) for place in places]

    def rows(self, global_batch_size: int) -> np.ndarray:
        """Return which row of the global batch each row of the placed batch is, int64.

        Raises:
          ValueError: the batch does not divide into the logical shards.
        """
        if global_batch_size % self.logical_shards:
            raise ValueError(
                f"A batch is divided into {self.logical_shards} equal logical shards; got {global_batch_size} "
                f"examples. Choose a multiple of {self.logical_shards}."
            )
        shards = np.arange(global_batch_size, dtype=np.int64).reshape(self.logical_shards, -1)
        return shards[self.slots()].reshape(-1)


class DealtBatch(dict[str, Any]):
    """A batch placed by `dealing`, not in its own order and longer: only what knows that may compute with it."""

    def __init__(self, fields: Batch, dealing: Dealing):
        super().__init__(fields)
        self.dealing = dealing


def _flatten(batch: DealtBatch) -> tuple[tuple[Any, ...], tuple[tuple[str, ...], Dealing]]:
    names = tuple(sorted(batch))
    return tuple(batch[name] for name in names), (names, batch.dealing)


def _flatten_with_keys(batch: DealtBatch) -> tuple[tuple[tuple[Any, Any], ...], tuple[tuple[str, ...], Dealing]]:
    fields, form = _flatten(batch)
    return tuple(zip(map(jax.tree_util.DictKey, form[0]), fields, strict=True)), form


def _unflatten(form: tuple[tuple[str, ...], Dealing], fields: Iterable[Any]) -> DealtBatch:
    return DealtBatch(dict(zip(form[0], fields, strict=True)), form[1])


jax.tree_util.register_pytree_with_keys(DealtBatch, _flatten_with_keys, _unflatten, _flatten)


def is_power_of_two(number: int) -> bool:
    """Return whether a positive number is a power of two."""
    return number & (number - 1) == 0
