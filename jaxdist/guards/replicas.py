"""The check for replicas that drift apart: it compares the bits of every copy, and names leaves and devices."""

import functools
import itertools
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxdist.guards import array_hash
from jaxdist.spmd.layout import path_name, spec_axes

PyTree: TypeAlias = Any

_MAX_SHOWN = 8


class ReplicaDriftError(RuntimeError):
    """Copies of an array that must be equal on several devices are not."""


def check_replicas(tree: PyTree, mesh: Mesh) -> None:
    """Check that every copy of every leaf, or of every shard of one, holds the same bits.

    JAX does not: an array made of unequal pieces still counts as replicated, and shows the copy of its first device.
    Each device condenses its own memory to 32 bits per leaf, which all of them exchange: reading the state once is
    what it costs, and waiting for it. A single changed element is always found; larger changes escape with a chance
    of 2**-32. Every process of the job must call it, and all get the same result.

    Arrays that are sharded over some axes of the mesh are compared along the others.

    Raises:
      ReplicaDriftError: copies differ; names leaves and devices.
      ValueError: a leaf is not laid out over `mesh`.
    """
    paths_and_leaves = jax.tree_util.tree_leaves_with_path(tree)
    paths = [path_name(path) for path, _ in paths_and_leaves]
    leaves = [leaf for _, leaf in paths_and_leaves]
    specs = tuple(_spec(path, leaf, mesh) for path, leaf in zip(paths, leaves))
    prints = np.asarray(_fingerprints_fn(mesh, specs)(leaves).addressable_data(0))
    differs = (prints != prints[0]).any(axis=0)  # elsewhere every copy and every shard is the same
    drifted = {
        path: _odd_devices(column, spec, mesh)
        for path, column, spec, looked in zip(paths, prints.T, specs, differs)
        if looked
    }
    drifted = {path: devices for path, devices in drifted.items() if devices}
    if drifted:
        shown = itertools.islice(drifted.items(), _MAX_SHOWN)
        named = "; ".join(f"{path} on {', '.join(devices)}" for path, devices in shown)
        more = f"; and {len(drifted) - _MAX_SHOWN} more" if len(drifted) > _MAX_SHOWN else ""
        raise ReplicaDriftError(
            f"The copies of an array must be equal on all devices that hold it; {len(drifted)} of {len(paths)} leaves "
            f"are not: {named}{more}. Training further would mix several models. Resume from the last checkpoint. The "
            "cause is a gradient or a statistic that is not averaged over the devices, data placed as replicated that "
            "differ per process, or, if it is neither, a broken device."
        )


def _spec(path: str, leaf: jax.Array, mesh: Mesh) -> PartitionSpec:
    sharding = leaf.sharding
    if not isinstance(sharding, NamedSharding) or sharding.mesh != mesh:
        raise ValueError(
            f"Only arrays laid out over the mesh {dict(mesh.shape)} can be compared; {path} has {sharding}. "
            "Pass the mesh that the state was created on."
        )
    return sharding.spec


@functools.lru_cache(maxsize=16)
def _fingerprints_fn(mesh: Mesh, specs: tuple[PartitionSpec, ...]) -> Callable[[list[jax.Array]], jax.Array]:
    """Return the program that maps leaves laid out as `specs` to uint32 [devices, leaves], the same on each device."""

    def local(leaves: list[jax.Array]) -> jax.Array:
        prints = jnp.stack([array_hash.of_array(leaf) for leaf in leaves])
        return jax.lax.all_gather(prints, mesh.axis_names)

    mapped = jax.shard_map(local, mesh=mesh, in_specs=(list(specs),), out_specs=PartitionSpec(), check_vma=False)
    return jax.jit(mapped)


def _odd_devices(prints: np.ndarray, spec: PartitionSpec, mesh: Mesh) -> list[str]:
    """Return the devices whose fingerprint is not the one most holders of the same shard have.

    `prints` are uint32 [devices], in the order of the mesh. Devices that differ in other axes than those of `spec` hold
    the same shard.
    """
    sharded = spec_axes(spec)
    kept = [dim for dim, axis in enumerate(mesh.axis_names) if axis in sharded]
    places = np.stack(np.unravel_index(np.arange(mesh.size), mesh.devices.shape), axis=-1)[:, kept]
    odd: list[int] = []
    for place in np.unique(places, axis=0):
        group = np.flatnonzero((places == place).all(axis=1))
        values, counts = np.unique(prints[group], return_counts=True)
        if len(values) == 1:
            continue
        # Without a majority it is unclear which value is right, and all of the devices are named.
        common = values[np.argmax(counts)] if np.max(counts) * 2 > len(group) else None
        odd += [int(index) for index in group if common is None or prints[index] != common]
    return [f"{device} (process {device.process_index})" for device in mesh.devices.flat[odd]]
