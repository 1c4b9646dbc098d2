"""The update of the state, with the same bits whether devices hold the state whole or its shards.

A program on shards would not give the bits of a program on the whole: XLA compiles another shape in another way. So
every leaf is updated whole, on every device, by the same program on each. A small state is updated by one program. Of a
large one, whatever its layout, some leaves are updated at a time, so that a device holds its shards and few whole
leaves. Which leaves must be updated together, the jaxpr of the update tells: a param with its moments, for example, but
not with another param. All gradients are there whole, so that what looks at all of them (a global norm) has them.
"""

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxdist.spmd import dependence, device_program
from jaxdist.spmd.state import TrainState
from jaxdist.spmd.step import STEP_HASHES

PyTree: TypeAlias = Any
Update: TypeAlias = Callable[[TrainState, jax.Array | None, jax.Array], tuple[TrainState, dict[str, jax.Array]]]
"""`update(state, inputs of the optimizer, sums of the gradients) -> (state, metrics)`."""

WHOLE_BYTES = 1 << 26
"""Up to so many bytes a state is updated by one program."""
PARTS = 8
"""The groups of a larger one have about this part of its bytes. Both numbers decide bits: they are not to change."""


def gathering(mesh: Mesh) -> Callable[[PyTree], PyTree]:
    """Return the function that gives every device the whole of a tree that may be sharded; on CPU devices, waits."""
    gather = jax.jit(lambda tree: tree, out_shardings=NamedSharding(mesh, PartitionSpec()))

    def whole(tree: PyTree) -> PyTree:
        leaves, structure = jax.tree.flatten(tree)
        sharded = [place for place, leaf in enumerate(leaves) if not leaf.sharding.is_fully_replicated]
        gathered = device_program.settled(gather([leaves[place] for place in sharded]), mesh) if sharded else []
        for place, leaf in zip(sharded, gathered, strict=True):
            leaves[place] = leaf
        return jax.tree.unflatten(structure, leaves)

    return whole


class StateUpdate:
    """Updates a state, which it donates, and keeps its layout. What it compiles, it compiles at the first call.

    `update` is pure, and traced for the whole state. `hash_step(total, params, model_state)` gives the hashes of a
    step, whole numbers, each by what it may be given as `applied`; None for no hashes.
    """

    def __init__(self, update: Update, mesh: Mesh, hash_step: Callable[..., jax.Array] | None = None):
        self._update, self._mesh, self._gather = update, mesh, gathering(mesh)
        everywhere = PartitionSpec()
        # The hashes are sums of whole numbers: the same however XLA divides them.
        self._hash = hash_step and jax.jit(hash_step, out_shardings=NamedSharding(mesh, everywhere))
        self.at_once = update if hash_step is None else _with_hashes(update, hash_step)
        self._at_once = device_program.PerDeviceProgram(
            self.at_once, mesh, in_specs=(everywhere,) * 3, out_spec=everywhere, donate_argnums=(0,)
        )
        self._in_turns: list[_GroupProgram] | None = None
        self._is_whole: bool | None = None

    @staticmethod
    def is_at_once(state: TrainState) -> bool:
        """Return whether one program updates the whole of such a state: `at_once`, a function of what a call takes."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(state)) <= WHOLE_BYTES

    def __call__(self, state: TrainState, inputs: jax.Array | None, total: jax.Array) -> Any:
        """Return (state, metrics), with the metric STEP_HASHES if the step is hashed; on CPU devices, waits for them
        where the state is sharded.
        """
        if self._is_whole is None:
            self._is_whole = all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(state))
            if not self.is_at_once(state):
                self._in_turns = self._make_groups(state, inputs, total)
        if self._in_turns is not None:
            return self._updated_in_turns(state, inputs, total)
        if self._is_whole:
            return self._at_once(state, inputs, total)
        whole, shard = self._whole(state)
        new_state, metrics = self._at_once(whole, inputs, total)
        return shard(new_state), metrics

    def _whole(self, tree: PyTree) -> tuple[PyTree, Callable[[PyTree], PyTree]]:
        """Return a donated tree whole, and what shards a tree like it again."""
        leaves = jax.tree.leaves(tree)
        shardings = tuple(leaf.sharding for leaf in leaves)
        if all(each.is_fully_replicated for each in shardings):
            return tree, lambda whole: whole
        whole = self._gather(tree)
        for leaf in leaves:
            if not leaf.sharding.is_fully_replicated:
                leaf.delete()

        def shard(whole: PyTree) -> PyTree:
            own, structure = jax.tree.flatten(self._settled(whole))
            return jax.tree.unflatten(structure, self._settled(_shard(own, shardings)))

        return whole, shard

    def _updated_in_turns(self, state: TrainState, inputs: jax.Array | None, total: jax.Array) -> Any:
        assert self._in_turns is not None
        leaves = jax.tree.leaves(state)
        found: dict[int, jax.Array] = {}
        for program in self._in_turns:
            whole, shard = self._whole([leaves[place] for place in program.group.leaves])
            updated, rest = program(whole, leaves, inputs, total)
            found |= zip(program.group.leaves, shard(updated), strict=True)
            found |= zip(program.group.others, rest, strict=True)
        new_state, metrics = jax.tree.unflatten(self._results, [found[place] for place in range(len(found))])
        if self._hash is None:
            return new_state, metrics
        hashes = self._hash(total, new_state.params, new_state.model_state)
        return new_state, {**metrics, STEP_HASHES: hashes if self._is_whole else self._settled(hashes)}

    def _settled(self, tree: PyTree) -> PyTree:
        return device_program.settled(tree, self._mesh)

    def _make_groups(self, state: TrainState, inputs: jax.Array | None, total: jax.Array) -> list["_GroupProgram"]:
        leaves, structure = jax.tree.flatten(state)
        places = [place for place, leaf in enumerate(leaves) if leaf.ndim]
        bits = [1 << place if place in places else 0 for place in range(len(leaves))]
        marked = (jax.tree.unflatten(structure, bits), jax.tree.map(lambda _: 0, inputs), 0)
        results = dependence.marks(self._update, (state, inputs, total), marked)
        self._results = jax.tree.structure(results)
        made: Any = jax.tree.structure(results[0])
        assert made == structure, "a step returns a state like the one it was given"
        num_bytes = {place: leaves[place].nbytes for place in places}
        groups = grouped(jax.tree.leaves(results), num_bytes, sum(num_bytes.values()) // PARTS)
        return [_GroupProgram(self._update, self._mesh, leaves, structure, group) for group in groups]


def _with_hashes(update: Update, hash_step: Callable[..., jax.Array]) -> Update:
    """Return the update that hashes what it returns, by itself, so that XLA fuses what it would without."""

    def update_and_hash(state: TrainState, inputs: jax.Array | None, total: jax.Array) -> Any:
        new_state, metrics = update(state, inputs, total)
        always = state.step != jnp.iinfo(jnp.int32).min
        one_by_one = functools.partial(hash_step, applied=_hashed_by_one_kernel)
        hashes = device_program.by_itself(one_by_one, always, total, new_state.params, new_state.model_state)
        return new_state, {**metrics, STEP_HASHES: hashes}

    return update_and_hash


def _hashed_by_one_kernel(function: Callable[[jax.Array], jax.Array], vector: jax.Array) -> jax.Array:
    """Return the hash of a leaf, that of a small one by one kernel: XLA divides the hash of several thousand elements
    among all its threads, and to wake those takes longer than to compute it.
    """
    is_plain = vector.size and vector.dtype == jnp.float32
    return device_program.hashed(function, jnp.bool_(True), vector) if is_plain else function(vector)


@functools.partial(jax.jit, static_argnums=1)
def _shard(leaves: list[jax.Array], shardings: tuple[NamedSharding, ...]) -> list[jax.Array]:
    return jax.lax.with_sharding_constraint(leaves, list(shardings))


class LeafGroup(NamedTuple):
    """Leaves that are updated together: their places in the flat state, and those of other results."""

    leaves: tuple[int, ...]
    others: tuple[int, ...]


def grouped(needs: Sequence[int], num_bytes: dict[int, int], least_bytes: int) -> list[LeafGroup]:
    """Return groups of leaves, such that no result needs leaves of two groups.

    Args:
      needs: for each result, the leaves that it depends on: 1 << place, joined. The results begin with those of
        the leaves, in their order.
      num_bytes: of the leaves, by their place.
      least_bytes: of a group; the last has what is left.
    """
    together = [1 << place for place in num_bytes]
    for place, need in enumerate(needs):
        need |= 1 << place if place in num_bytes else 0
        joined = [each for each in together if each & need]
        together = [each for each in together if not each & need]
        together.extend([_union(joined)] if joined else [])
    parts = [[place for place in num_bytes if each >> place & 1] for each in together]
    packed: list[list[int]] = [[]]
    for part in sorted(parts):
        if sum(num_bytes[place] for place in packed[-1]) >= least_bytes:
            packed.append([])
        packed[-1] += part
    return [
        LeafGroup(tuple(part), tuple(_others(needs, num_bytes, part, takes_free=part is packed[0]))) for part in packed
    ]


def _union(masks: Sequence[int]) -> int:
    return functools.reduce(operator.or_, masks)


def _others(needs: Sequence[int], num_bytes: dict[int, int], part: Sequence[int], *, takes_free: bool) -> list[int]:
    """Return the results besides leaves that need a leaf of `part`, or, if it takes these, no leaf."""
    own = sum(1 << place for place in part)
    chosen = [place for place, need in enumerate(needs) if (need & own if need else takes_free)]
    return [place for place in chosen if place not in num_bytes]


class _GroupProgram:
    """The update of one group, compiled at the first call."""

    def __init__(self, update: Update, mesh: Mesh, leaves: Sequence[jax.Array], structure: Any, group: LeafGroup):
        self.group = group
        self._scalars = [place for place, leaf in enumerate(leaves) if not leaf.ndim]
        shapes = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves]

        def update_group(whole: list[Any], scalars: list[Any], inputs: Any, total: Any) -> Any:
            given = dict(zip((*group.leaves, *self._scalars), (*whole, *scalars), strict=True))
            # Nothing that is returned depends on the leaves of other groups.
            state = [given[place] if place in given else jnp.zeros(s.shape, s.dtype) for place, s in enumerate(shapes)]
            results = jax.tree.leaves(update(jax.tree.unflatten(structure, state), inputs, total))
            return [results[place] for place in group.leaves], [results[place] for place in group.others]

        everywhere = PartitionSpec()
        self._program = device_program.PerDeviceProgram(
            update_group, mesh, in_specs=(everywhere,) * 4, out_spec=everywhere, donate_argnums=(0,)
        )

    def __call__(
        self, whole: list[jax.Array], leaves: Sequence[jax.Array], inputs: jax.Array | None, total: jax.Array
    ) -> tuple[list[jax.Array], list[jax.Array]]:
        """Return the new leaves of the group and its other results; donates `whole`, its leaves."""
        updated, others = self._program(whole, [leaves[place] for place in self._scalars], inputs, total)
        return updated, others
