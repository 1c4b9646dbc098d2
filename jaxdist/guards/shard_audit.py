"""The check for a device that computes wrongly: one logical shard is computed on every device, and the bits compared.

In canonical mode every device must get the same bits, for it runs the same machine code on equal numbers. With three
devices or more, the one that is alone with its result is named; two can only disagree. What the step itself made of the
same shard is compared as well, so that a fault is found that passed before the audit, or after it.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxdist.guards import array_hash, step_hashes
from jaxdist.spmd import device_program, reduce
from jaxdist.spmd import layout as layouts
from jaxdist.spmd.canonical import adding, canonical_step, state_update
from jaxdist.spmd.mesh import DATA_AXIS
from jaxdist.spmd.metrics import Batch
from jaxdist.spmd.state import TrainState


class ShardAudit:
    """Computes one logical shard on every device of a mesh; the arguments are those of the step.

    Under a layout that shards the state, devices gather equal copies, so a fault in a shard is not found.
    """

    def __init__(
        self,
        loss_fn: reduce.LossFn,
        mesh: Mesh,
        *,
        logical_shards: int,
        num_microbatches: int,
        batch_axes: Sequence[str] = (DATA_AXIS,),
        layout: layouts.Layout = layouts.replicated,
    ):
        sums = canonical_step.logical_shard_sums(
            loss_fn,
            mesh,
            logical_shards=logical_shards,
            num_microbatches=num_microbatches,
            batch_axes=batch_axes,
            hashing=step_hashes.StepHashing(),
        )
        whole, sharded = PartitionSpec(), PartitionSpec(tuple(batch_axes))

        def vote(shared: Any, flat: jax.Array, index: jax.Array) -> jax.Array:
            own = canonical_step.hashes_in(sums.unravel(flat[0])[1])[index[0]]
            return jnp.concatenate([array_hash.of_arrays(jax.tree.leaves(shared))[None], own])[None]

        def take(batch: Batch, slot: jax.Array) -> Batch:
            num_slots = sums.dealing.num_slots * sums.dealing.num_devices
            parts = {name: leaf.reshape(num_slots, -1, *leaf.shape[1:]) for name, leaf in batch.items()}
            return {name: jax.lax.dynamic_index_in_dim(leaf, slot, keepdims=False) for name, leaf in parts.items()}

        self._place = adding.Site(mesh, sums.axes, sums.dealing)
        self._choose = canonical_step.adding_for(mesh, layout)
        self._slots = sums.dealing.slot_of_shards()
        self._compute = sums.everywhere()
        self._vote = device_program.PerDeviceProgram(vote, mesh, in_specs=(whole, sharded, whole), out_spec=sharded)
        self._everywhere = NamedSharding(mesh, whole)
        self._take = jax.jit(take, out_shardings=self._everywhere)
        self._gather = jax.jit(lambda votes: votes, out_shardings=self._everywhere)
        self._whole = state_update.gathering(mesh)

    def votes(self, state: TrainState, batch: Batch, shard: int) -> np.ndarray:
        """Return what each device computes of a logical shard of the step from `state`: uint32 [devices, 2].

        They are the hashes of the device's copy of what all shards share, and of the shard's sums. Waits for the
        devices, and every process of the job must call it: programs with collectives and programs of single devices
        that are in flight at once can block each other on CPU devices.
        """
        index = jax.device_put(np.array([shard], np.int32), self._everywhere)
        slot = jax.device_put(np.int32(self._slots[shard]), self._everywhere)
        shared = jax.block_until_ready(self._whole(canonical_step.shared_by_shards(state)))
        rows = jax.block_until_ready(self._take(dict(batch), slot))
        sums = self._compute(shared, rows, index)
        self._size = sums.shape[1]
        found = jax.block_until_ready(self._vote(shared, sums, index))
        return np.asarray(self._gather(found).addressable_data(0))

    def owner(self, shard: int) -> int:
        """Return the position of the device that computes a logical shard in the step; known after the first votes."""
        turns = self._choose(self._place, self._size).shards.T
        return int(np.argwhere(turns == shard)[0, 1])


@dataclasses.dataclass(frozen=True)
class Finding:
    """Devices that do not agree.

    Attributes:
      step: the audited step.
      shard: the audited logical shard.
      suspects: positions of devices in the mesh: the one that computes wrongly, or all that disagree.
      named: whether more devices agree than not, so that the suspects are known to be wrong.
      what: `params`, a copy of what all shards share; `computation`; or `step`, where the step itself made something
        else of the shard than all devices in the audit.
    """

    step: int
    shard: int
    suspects: tuple[int, ...]
    named: bool
    what: str

    def tell(self, devices: Sequence[jax.Device]) -> str:
        """Return the finding as a sentence; `devices` are those of the mesh, in its order."""
        shown = ", ".join(f"{devices[each]} (process {devices[each].process_index})" for each in self.suspects)
        plural = len(self.suspects) > 1
        how = {
            "params": f"{'their' if plural else 'its'} copy of the params is not that of the others",
            "computation": f"{'they' if plural else 'it'} computed logical shard {self.shard} with other bits than the "
            "others, from equal params",
            "step": f"the step itself had other bits of logical shard {self.shard} than all devices in the audit, a "
            "fault that has passed",
        }[self.what]
        if self.named:
            return f"{shown} compute{'' if plural else 's'} wrongly: in the audit of step {self.step}, {how}."
        unclear = (
            "With three devices or more, the odd one would be named" if len(devices) < 3 else "There is no majority"
        )
        return f"{shown} disagree{'' if plural else 's'} in the audit of step {self.step}: {how}. {unclear}."


def judge(votes: np.ndarray, *, step: int, shard: int) -> Finding | None:
    """Return what the devices' votes say, see `ShardAudit.votes`; None where they agree."""
    for column, what in enumerate(("params", "computation")):
        values, counts = np.unique(votes[:, column], return_counts=True)
        if len(values) == 1:
            continue
        named = bool(max(counts) * 2 > len(votes))
        odd = votes[:, column] != values[np.argmax(counts)] if named else np.ones(len(votes), bool)
        return Finding(step, shard, tuple(int(place) for place in np.flatnonzero(odd)), named, what)
    return None


def judge_step(votes: np.ndarray, own: int, owner: int, *, step: int, shard: int) -> Finding | None:
    """Return what it says that in the step itself the shard's sums, of the device at position `owner`, have the hash
    `own`, where the votes of all devices agree; None if it is theirs.
    """
    return None if own == int(votes[0, 1]) else Finding(step, shard, (owner,), len(votes) > 1, "step")


def chosen_shard(number: int, *, logical_shards: int, seed: int) -> int:
    """Return the logical shard of the audit `number`: each of them once in as many audits, in an order by chance."""
    turn, place = divmod(number, logical_shards)
    return int(np.random.default_rng([seed, turn]).permutation(logical_shards)[place])
