"""The island of a worker: computes the gradient sums of a lease, data-parallel over its devices."""

import dataclasses
import functools
import math
from collections.abc import Generator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxdist.data import Loader, placement
from jaxdist.data.loader import HostBatch
from jaxdist.guards import nonfinite
from jaxdist.paramserver.protocol import effects, messages
from jaxdist.paramserver.run.sharding import LeafPacking
from jaxdist.paramserver.run.shared_plan import Plan, rows_of_a_slice
from jaxdist.paramserver.run.sparse_push import sparse
from jaxdist.spmd import reduce
from jaxdist.spmd.state import TrainState
from jaxdist.spmd.step import GRAD_NORM

_NOTHING = (-1, -1, b"")


@functools.partial(jax.tree_util.register_dataclass, data_fields=["values"], meta_fields=["structure"])
@dataclasses.dataclass(frozen=True)
class _Numbers:
    """A tree of scalars as one array: each array that leaves a compiled program costs as much as a small operation."""

    values: jax.Array
    structure: Any

    @classmethod
    def of(cls, tree: Any) -> "_Numbers":
        leaves, structure = jax.tree.flatten(tree)
        dtype = jnp.result_type(jnp.float32, *(leaf.dtype for leaf in leaves))
        return cls(jnp.stack([leaf.astype(dtype) for leaf in leaves]), structure)

    def tree(self) -> Any:
        """Return the tree, with Python's numbers."""
        return jax.tree.unflatten(self.structure, np.asarray(self.values).tolist())


class Island:
    """Computes the gradient sums of leases on the devices of a worker."""

    def __init__(self, plan: Plan, devices: Sequence[jax.Device]) -> None:
        self.plan = plan
        self._placement = NamedSharding(Mesh(np.asarray(devices), ("data",)), PartitionSpec("data"))
        # A compiled program takes NumPy's arrays to the one CPU device itself, in a fifth of device_put's time.
        self._is_host = len(devices) == 1 and devices[0].platform == "cpu"
        self._key = plan.run_keys().train
        self._sums = jax.jit(self._compute_sums)
        self._packing = LeafPacking.of(plan.sharding)
        self._rows = rows_of_a_slice(plan, len(devices))
        self._prepared: tuple[messages.Lease, Any] | None = None
        self._reader: Generator[HostBatch, None, None] | None = None
        self._reads_next = _NOTHING  # epoch, position and rows of the batch that the reader yields next

    def _compute_sums(self, packed: Any, batch: Any, step: jax.Array, slice_: jax.Array) -> Any:
        plan = self.plan
        params, model_state = jax.tree.unflatten(plan.structure, self._packing.unpack(packed))
        microbatches = plan.experiment.num_microbatches
        sums = reduce.accumulate_sums(
            plan.functions.loss_fn,
            params,
            model_state,
            batch,
            jax.random.fold_in(self._key, step),
            num_microbatches=microbatches,
            first_index=slice_ * microbatches,
        )
        grads = jax.tree.leaves(sums.grads)
        finite = jnp.stack([jnp.isfinite(sums.loss.total), *(jnp.isfinite(leaf).all() for leaf in grads)]).all()
        squares = sum(jnp.vdot(leaf, leaf).real for leaf in grads)
        pushed = self._packing.pack([*grads, *jax.tree.leaves(reduce.with_unchanged(sums, model_state))])
        return pushed, _Numbers.of((sums.loss, sums.num_examples, sums.metrics, finite, squares))

    def prepare(self, lease: messages.Lease) -> None:
        """Place the examples of `lease` on the devices, while its params are still on their way."""
        if self._prepared is None or self._prepared[0] != lease:
            batch = self._batch(lease)
            self._prepared = lease, batch if self._is_host else jax.device_put(batch, self._placement)

    def gradient(self, compute: effects.Compute) -> messages.Computed:
        """Return the gradient sums of the lease, as the worker pushes them."""
        plan, lease = self.plan, compute.lease
        self.prepare(lease)
        assert self._prepared is not None
        _, batch = self._prepared
        packed = self._packing.join(compute.params)
        sums, numbers = self._sums(packed, batch, np.int32(lease.step), np.int32(lease.slice))
        loss, num_examples, metrics, finite, squares = numbers.tree()
        flat = self._packing.split([np.asarray(array) for array in sums])
        pieces = tuple(
            tuple(sparse(piece, block.row) for piece, block in zip(shard, blocks, strict=True))
            for shard, blocks in zip(flat, plan.sharding.shards, strict=True)
        )
        count = loss.count
        rows = [messages.Metric("loss", loss.total, count)]
        rows += [messages.Metric(name, mean.total, mean.count) for name, mean in metrics.items()]
        norm_squared = squares / count**2 if count > 0 else 0.0
        if count > 0 and not plan.settings.synchronous:
            # Such a push is a whole update. For slices of a batch, only the servers know the whole gradient.
            rows.append(messages.Metric(GRAD_NORM, math.sqrt(norm_squared), 1.0))
        return messages.Computed(
            compute.incarnation,
            compute.sequence,
            count,
            num_examples,
            bool(finite),
            norm_squared,
            pieces,
            tuple(rows),
        )

    def explain_nonfinite(self, compute: effects.Compute) -> nonfinite.NonFiniteReport:
        """Return a report on why the gradient of the lease is not finite; its loss is over the lease only."""
        plan, lease = self.plan, compute.lease
        params, model_state = jax.tree.unflatten(plan.structure, plan.sharding.join(compute.params))
        state = TrainState(jnp.asarray(lease.step, jnp.int32), params, model_state, (), self._key)
        batch = jax.device_put(self._batch(lease), self._placement)
        return nonfinite.explain_nonfinite(
            plan.functions.loss_fn, state, batch, step=lease.step + 1, first_row=self._first_row(lease)
        )

    def _first_row(self, lease: messages.Lease) -> int:
        """Return the row of the global batch at which the lease begins."""
        within = lease.step % self.plan.settings.steps_per_epoch
        return lease.start - within * self.plan.experiment.global_batch_size

    def _rows_of(self, lease: messages.Lease, begin: int) -> np.ndarray:
        """Return the rows of the global batch, which begins at position `begin`, that hold the lease's examples."""
        size, first = self.plan.experiment.global_batch_size, lease.start - begin
        rows = np.arange(first, first + max(lease.stop - lease.start, 1))
        if begin + size > self.plan.settings.num_examples:
            # The order says where the examples of a last, ragged batch are: those of streams are not its first rows.
            filled = np.flatnonzero(next(self._loader_at(lease.epoch, begin).plans()).mask)
            return filled[np.minimum(rows, len(filled) - 1)]
        return np.minimum(rows, size - 1)

    def _loader_at(self, epoch: int, begin: int) -> Loader:
        loader = self.plan.loader
        return loader.starting_at(dataclasses.replace(loader.beginning, epoch=epoch, position=begin))

    def _read(self, lease: messages.Lease) -> dict[str, np.ndarray]:
        """Return the examples of the lease; a lease that follows the last one continues where that one ended."""
        begin = lease.start - self._first_row(lease)
        rows = self._rows_of(lease, begin)
        if self._reads_next != (lease.epoch, begin, rows.tobytes()):
            if self._reader is not None:
                self._reader.close()
            loader = self._loader_at(lease.epoch, begin).with_rows(rows)
            loader.read_ahead, loader.num_threads = 0, 0
            self._reader = iter(loader)
        assert self._reader is not None
        self._reads_next = _NOTHING  # unless it can: a reader that raises has ended
        batch, after = next(self._reader)
        self._reads_next = after.epoch, after.position, rows.tobytes()
        placement.check_numbers(batch, lambda: next(self._loader_at(lease.epoch, begin).with_rows(rows).plans()).ids)
        return batch

    def _batch(self, lease: messages.Lease) -> dict[str, np.ndarray]:
        """Return the examples of the lease, padded to a fixed size, so that the gradient is compiled once."""
        padded = {
            name: np.concatenate([array, np.repeat(array[:1], self._rows - len(array), axis=0)])
            for name, array in self._read(lease).items()
        }
        padded["mask"] = padded["mask"] * (np.arange(self._rows) < lease.stop - lease.start)
        return padded
