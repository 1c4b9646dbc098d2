"""Checks for what goes wrong without a word: replicas that drift apart, a second compile, a value that is not finite.

Each names the culprit: the leaf and the devices, the argument and what of it changed, the step and the rows of the
batch.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxdist.spmd.metrics import MASK, Batch, Mean
from jaxdist.spmd.state import TrainState

PyTree: TypeAlias = Any

_MAX_SHOWN = 8


class ReplicaDriftError(RuntimeError):
    """Copies of an array that must be equal on several devices are not."""


def check_replicas(tree: PyTree, mesh: Mesh) -> None:
    """Check that every copy of every leaf, or of every shard of one, holds the same bits.

    JAX does not: an array made of unequal pieces still calls itself replicated, and shows what its first device has.
    Each device condenses its own memory to 32 bits per leaf, which all of them exchange: reading the state once is
    what it costs, and waiting for it. A single changed element is always found; larger changes escape with a chance
    of 2**-32. Every process of the job must call it, and all come to the same verdict.

    Args:
      tree: arrays laid out over `mesh`; those cut over some axes are compared along the others.
      mesh: the mesh.

    Raises:
      ReplicaDriftError: copies differ; names leaves and devices.
      ValueError: a leaf is not laid out over `mesh`.
    """
    paths_and_leaves = jax.tree_util.tree_leaves_with_path(tree)
    paths = [jax.tree_util.keystr(path) for path, _ in paths_and_leaves]
    leaves = [leaf for _, leaf in paths_and_leaves]
    specs = tuple(_spec(path, leaf, mesh) for path, leaf in zip(paths, leaves))
    prints = np.asarray(_fingerprints_fn(mesh, specs)(leaves).addressable_data(0))
    drifted = {path: _odd_devices(column, spec, mesh) for path, column, spec in zip(paths, prints.T, specs)}
    drifted = {path: devices for path, devices in drifted.items() if devices}
    if drifted:
        named = "; ".join(
            f"{path.removeprefix('.')} on {', '.join(devices)}" for path, devices in _first(drifted.items())
        )
        more = f"; and {len(drifted) - _MAX_SHOWN} more" if len(drifted) > _MAX_SHOWN else ""
        raise ReplicaDriftError(
            f"The copies of an array must be equal on all devices that hold it; {len(drifted)} of {len(paths)} leaves "
            f"are not: {named}{more}. Training on would mix several models. Go back to the last checkpoint; look for "
            "a gradient or a statistic that is not averaged over the devices, for data that was placed as replicated "
            "and differs per process, and, if neither is there, for a broken device."
        )


def _spec(path: str, leaf: jax.Array, mesh: Mesh) -> PartitionSpec:
    sharding = leaf.sharding
    if not isinstance(sharding, NamedSharding) or sharding.mesh != mesh:
        raise ValueError(
            f"Replicas can be compared of arrays laid out over the mesh {dict(mesh.shape)} only; {path} has "
            f"{sharding}. Pass the mesh the state was created on."
        )
    return sharding.spec


@functools.lru_cache(maxsize=16)
def _fingerprints_fn(mesh: Mesh, specs: tuple[PartitionSpec, ...]) -> Callable[[list[jax.Array]], jax.Array]:
    """Return the program that maps leaves laid out as `specs` to uint32 [devices, leaves], the same on each device."""

    def local(leaves: list[jax.Array]) -> jax.Array:
        prints = jnp.stack([_fingerprint(leaf) for leaf in leaves])
        return jax.lax.all_gather(prints, mesh.axis_names)

    mapped = jax.shard_map(local, mesh=mesh, in_specs=(list(specs),), out_specs=PartitionSpec(), check_vma=False)
    return jax.jit(mapped)


def _fingerprint(leaf: jax.Array) -> jax.Array:
    """Return 32 bits that depend on every bit of `leaf` and on where it stands."""
    words = _words(leaf).reshape(-1)
    place = jax.lax.iota(jnp.uint32, words.size) * jnp.uint32(0x9E3779B9)
    # The finalizer of MurmurHash3 (Appleby) is a bijection, so changing one word always changes its term of the sum.
    mixed = words ^ place
    mixed = (mixed ^ (mixed >> 16)) * jnp.uint32(0x85EBCA6B)
    mixed = (mixed ^ (mixed >> 13)) * jnp.uint32(0xC2B2AE35)
    return jnp.sum(mixed ^ (mixed >> 16), dtype=jnp.uint32)


def _words(leaf: jax.Array) -> jax.Array:
    """Return the bits of `leaf` as uint32; narrower elements take one word each."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
        leaf = jnp.stack([leaf.real, leaf.imag])
    if leaf.dtype == jnp.bool_ or leaf.dtype.name in ("int4", "uint4", "int2", "uint2"):
        return leaf.astype(jnp.uint32)
    unsigned = {1: jnp.uint8, 2: jnp.uint16}.get(leaf.dtype.itemsize, jnp.uint32)
    return jax.lax.bitcast_convert_type(leaf, unsigned).astype(jnp.uint32)


def _odd_devices(prints: np.ndarray, spec: PartitionSpec, mesh: Mesh) -> list[str]:
    """Return the devices whose fingerprint is not the one most holders of the same shard have.

    Args:
      prints: uint32 [devices], in the order of the mesh.
      spec: says which axes cut the leaf; devices that differ in other axes only hold the same shard.
      mesh: the mesh.
    """
    cut = {axis for entry in spec if entry is not None for axis in ((entry,) if isinstance(entry, str) else entry)}
    kept = [dim for dim, axis in enumerate(mesh.axis_names) if axis in cut]
    places = np.stack(np.unravel_index(np.arange(mesh.size), mesh.devices.shape), axis=-1)[:, kept]
    odd: list[int] = []
    for place in np.unique(places, axis=0):
        group = np.flatnonzero((places == place).all(axis=1))
        values, counts = np.unique(prints[group], return_counts=True)
        if len(values) == 1:
            continue
        # Where no value is in the majority nobody knows who is right, and all of them are named.
        common = values[np.argmax(counts)] if np.max(counts) * 2 > len(group) else None
        odd += [int(index) for index in group if common is None or prints[index] != common]
    return [f"{device} (process {device.process_index})" for device in mesh.devices.flat[odd]]


@dataclasses.dataclass(frozen=True)
class Change:
    """What of one argument differs from an earlier call: `what` is dtype, weak type, shape, sharding or presence."""

    path: str
    what: str
    old: str
    new: str

    def __str__(self) -> str:
        return f"{self.path} changed {self.what}: {self.old} -> {self.new}"


@dataclasses.dataclass(frozen=True)
class Recompile:
    """A second compile of the step: the `count`-th in all, and how its arguments differ from the nearest known ones."""

    count: int
    changes: tuple[Change, ...]

    def __str__(self) -> str:
        more = f"; and {len(self.changes) - _MAX_SHOWN} more" if len(self.changes) > _MAX_SHOWN else ""
        return (
            f"The step was compiled again (compile {self.count}): {'; '.join(map(str, _first(self.changes)))}{more}. "
            "Give every call arguments of one form: create the state with its final shardings, pad the last batch, "
            "cast inputs to one dtype."
        )


@dataclasses.dataclass(frozen=True)
class _Form:
    """What of an argument decides whether a compiled program fits it."""

    dtype: str
    weak_type: bool
    shape: tuple[int, ...]
    sharding: str

    def changes(self, path: str, new: "_Form") -> list[Change]:
        pairs = {
            field.name: (getattr(self, field.name), getattr(new, field.name)) for field in dataclasses.fields(self)
        }
        return [
            Change(path, name.replace("_", " "), str(before), str(after))
            for name, (before, after) in pairs.items()
            if before != after
        ]


class RecompileSentinel:
    """Notices when a step is compiled a second time, and which argument is to blame.

    Costs a look at the jitted function's cache per step, under a microsecond; for a step that is no jitted function
    (several programs, say) a look at the form of every argument.

    >>> sentinel = RecompileSentinel()
    >>> double = jax.jit(lambda x: 2 * x)
    >>> for x in (jnp.ones(2), jnp.ones(3)):
    ...     _ = double(x)
    ...     recompile = sentinel.observe(double, (x,), names=("x",))
    >>> print(recompile.changes[0])
    x changed shape: (2,) -> (3,)
    """

    def __init__(self) -> None:
        self.compile_count = 0
        self._cache_size: int | None = None
        self._last: list[Any] | None = None
        self._known: list[dict[str, _Form]] = []

    def observe(
        self, step_fn: Callable[..., Any], args: Sequence[Any], *, names: Sequence[str] = ("state", "batch")
    ) -> Recompile | None:
        """Return what changed if the call just made was the first of its form, so that the step was compiled again.

        Args:
          step_fn: the step; one sentinel watches one step.
          args: what it was called with. Donated arrays are fine: only their form is looked at.
          names: of the arguments, for the report.
        """
        if not self._may_have_compiled(step_fn, args):
            return None
        # The cache grows also where nothing is compiled (a key's data is described in another way, say).
        forms = _forms(args, names)
        if forms in self._known:
            return None
        nearest = min((_compare(known, forms) for known in self._known), key=len, default=None)
        self._known.append(forms)
        self.compile_count = len(self._known)
        return None if nearest is None else Recompile(self.compile_count, tuple(nearest))

    def _may_have_compiled(self, step_fn: Callable[..., Any], args: Sequence[Any]) -> bool:
        cache_size = getattr(step_fn, "_cache_size", None)
        if cache_size is not None:
            before, self._cache_size = self._cache_size, cache_size()
            return before != self._cache_size
        # The outputs of a program share their types and shardings from call to call, so comparing is comparing
        # addresses, for all but the arguments that did change.
        last, self._last = self._last, [_quick_form(leaf) for leaf in jax.tree.leaves(args)]
        return last != self._last


def _forms(args: Sequence[Any], names: Sequence[str]) -> dict[str, _Form]:
    forms: dict[str, _Form] = {}
    for name, arg in zip(names, args, strict=True):
        for path, leaf in jax.tree_util.tree_leaves_with_path(arg):
            forms[name + jax.tree_util.keystr(path)] = _form(leaf)
    return forms


def _quick_form(leaf: Any) -> tuple[Any, Any]:
    # Not isinstance: asking whether something is a jax.Array takes longer than all the rest.
    return (leaf.aval, leaf.sharding) if hasattr(leaf, "aval") else (jax.typeof(leaf), None)


def _form(leaf: Any) -> _Form:
    aval = jax.typeof(leaf)
    # What is not committed to devices (numpy arrays never are) goes where the program goes, and decides nothing.
    sharding = _show_sharding(leaf.sharding) if getattr(leaf, "committed", False) else "uncommitted"
    return _Form(str(aval.dtype), bool(getattr(aval, "weak_type", False)), tuple(aval.shape), sharding)


def _show_sharding(sharding: jax.sharding.Sharding) -> str:
    if not isinstance(sharding, NamedSharding):
        return str(sharding)
    entries = list(sharding.spec)
    while entries and entries[-1] is None:
        entries.pop()
    ids = [device.id for device in sharding.mesh.devices.flat]
    return f"{PartitionSpec(*entries)} on mesh {dict(sharding.mesh.shape)} of devices {ids[0]} to {ids[-1]}"


def _compare(old: Mapping[str, _Form], new: Mapping[str, _Form]) -> list[Change]:
    changes = [Change(path, "presence", "there", "gone") for path in old if path not in new]
    for path, form in new.items():
        changes += old[path].changes(path, form) if path in old else [Change(path, "presence", "not there", "there")]
    return changes


def _first(items: Any) -> list[Any]:
    return list(items)[:_MAX_SHOWN]


@dataclasses.dataclass(frozen=True)
class NonFiniteReport:
    """Where a step's loss or gradient ceased to be finite.

    Attributes:
      step: the step it happened in.
      loss: of the whole batch.
      leaf: the first leaf of the params, in tree order, whose gradient is not finite; None if all gradients are.
      positions: rows of the global batch whose own loss or gradient is not finite.
      fields: field of the batch -> rows of true examples in which it is not finite.
      integers: field that holds one integer a row, a label say -> its values in `positions`.
      params: leaves of the params that are not finite themselves.
    """

    step: int
    loss: float
    leaf: str | None
    positions: tuple[int, ...]
    fields: Mapping[str, tuple[int, ...]]
    integers: Mapping[str, tuple[int, ...]]
    params: tuple[str, ...]

    @property
    def found(self) -> bool:
        """Whether anything that is not finite was found."""
        return bool(self.leaf or self.positions or self.params or not np.isfinite(self.loss))

    def __str__(self) -> str:
        if not self.found:
            return (
                f"Step {self.step} reported a value that is not finite, and computing it again gives finite ones "
                f"(loss {self.loss:g}). It depends on the random key (dropout, say), on the order of the additions, "
                "or on a device that computes wrongly."
            )
        lines = [f"Step {self.step}: the loss is {self.loss:g}."]
        lines += [f"First gradient that is not finite: {self.leaf}."] if self.leaf else ["All gradients are finite."]
        if self.positions:
            lines.append(f"Rows of the batch whose own loss or gradient is not finite: {_show(self.positions)}.")
        else:
            lines.append("No row has a loss or gradient that is not finite by itself: the rows overflow together.")
        for field, values in self.integers.items():
            lines.append(f"Their {field!r}: {_show(values)}.")
        for field, rows in self.fields.items():
            lines.append(f"The batch's {field!r} holds values that are not finite in rows {_show(rows)}.")
        if self.params:
            lines.append(f"Not finite before the step already: {', '.join(_first(self.params))}.")
        return "\n".join(lines)


def _show(numbers: tuple[int, ...]) -> str:
    more = f" and {len(numbers) - 2 * _MAX_SHOWN} more" if len(numbers) > 2 * _MAX_SHOWN else ""
    return ", ".join(map(str, numbers[: 2 * _MAX_SHOWN])) + more


def explain_nonfinite(
    loss_fn: Callable[..., Any], state: TrainState, batch: Batch, *, step: int | None = None, first_row: int = 0
) -> NonFiniteReport:
    """Find out why the step from `state` with `batch` had a loss or gradient that is not finite.

    Computes the gradient of the whole batch and that of each row by itself, the rows on the devices they lie on, one
    after the other: slow, meant for the end of a run. Rows whose mask is 0 are left out. Every process must call it.

    Args:
      loss_fn: `loss_fn(params, batch, key)`, or with model_state if the state has one. Its key is not the one a
        device would have folded, so with dropout other values are dropped than in the step.
      state: the state before the step.
      batch: the global batch of the step.
      step: its number; by default the one after `state.step`.
      first_row: where in the global batch `batch` begins, if it is a part of it.
    """
    shards = _RowShards(batch)
    loss, leaves = jax.jit(functools.partial(_finite_gradients, loss_fn), out_shardings=shards.replicated)(state, batch)
    rows = shards.each_row(functools.partial(_rows_are_finite, loss_fn))(state, batch)
    params = jax.jit(_finite_leaves, out_shardings=shards.replicated)(state.params)
    integers = jax.jit(_integers, out_shardings=shards.replicated)(batch)
    found = jax.tree.map(_local, (loss, leaves, rows, params, integers))
    loss, leaves, rows, params, integers = jax.device_get(found)
    names = [f"params{jax.tree_util.keystr(path)}" for path, _ in jax.tree_util.tree_leaves_with_path(state.params)]
    bad_leaves = [name for name, finite in zip(names, leaves, strict=True) if not finite]
    used = rows[MASK]
    bad_rows = {name: _positions(used & ~finite) for name, finite in rows.items() if name != MASK}
    own = bad_rows.pop(_OWN)
    return NonFiniteReport(
        step=int(_local(state.step)) + 1 if step is None else step,
        loss=float(loss),
        leaf=bad_leaves[0] if bad_leaves else None,
        positions=_from(first_row, own),
        fields={name: _from(first_row, rows) for name, rows in bad_rows.items() if rows},
        integers={name: tuple(values[list(own)].tolist()) for name, values in integers.items() if own},
        params=tuple(name for name, finite in zip(names, params, strict=True) if not finite),
    )


_OWN = ""  # The key of a row's own loss and gradient, among those of the batch's fields.


def _local(array: jax.Array) -> jax.Array:
    return array.addressable_data(0)


def _integers(batch: Batch) -> Batch:
    """Return the fields that hold one integer a row."""
    return {name: each for name, each in batch.items() if each.ndim == 1 and jnp.issubdtype(each.dtype, jnp.integer)}


def _positions(flags: np.ndarray) -> tuple[int, ...]:
    return tuple(np.flatnonzero(flags).tolist())


def _from(first: int, rows: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(first + row for row in rows)


class _RowShards:
    """How the rows of a batch lie over devices."""

    def __init__(self, batch: Batch):
        sharding = next(iter(batch.values())).sharding
        self.mesh = sharding.mesh if isinstance(sharding, NamedSharding) else None
        self.spec = PartitionSpec(*sharding.spec[:1]) if isinstance(sharding, NamedSharding) else PartitionSpec()
        self.replicated = sharding if self.mesh is None else NamedSharding(self.mesh, PartitionSpec())

    def each_row(self, rows_fn: Callable[..., Any]) -> Callable[..., Any]:
        """Return `rows_fn(state, batch)` as a program in which every device works on its own rows."""
        if self.mesh is None:
            return jax.jit(rows_fn)
        specs = (PartitionSpec(), self.spec)
        mapped = jax.shard_map(rows_fn, mesh=self.mesh, in_specs=specs, out_specs=self.spec, check_vma=False)
        return jax.jit(mapped, out_shardings=self.replicated)


def _rows_are_finite(loss_fn: Callable[..., Any], state: TrainState, batch: Batch) -> dict[str, jax.Array]:
    """Return bool [rows]: whether the row counts, whether it has a finite loss and gradient, and so for its fields."""

    def row_is_finite(row: Batch) -> jax.Array:
        loss, leaves = _finite_gradients(loss_fn, state, jax.tree.map(lambda value: value[None], row))
        return jnp.isfinite(loss) & leaves.all()

    num_rows = next(iter(batch.values())).shape[0]
    flags = {
        name: jnp.isfinite(field).reshape(num_rows, -1).all(axis=1)
        for name, field in batch.items()
        if jnp.issubdtype(field.dtype, jnp.inexact)
    }
    flags[_OWN] = jax.lax.map(row_is_finite, dict(batch))
    flags[MASK] = batch[MASK] > 0 if MASK in batch else jnp.ones(num_rows, bool)
    return flags


def _finite_gradients(loss_fn: Callable[..., Any], state: TrainState, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Return the loss (float32, scalar), and bool [leaves]: whether each leaf's gradient is finite."""
    key = jax.random.fold_in(state.key, state.step)
    extra = () if state.model_state is None else (state.model_state,)

    def scalar_loss(params: PyTree) -> jax.Array:
        loss = loss_fn(params, batch, key, *extra)[0]
        return (loss.value if isinstance(loss, Mean) else loss).astype(jnp.float32)

    loss, grads = jax.value_and_grad(scalar_loss)(state.params)
    return loss, _finite_leaves(grads)


def _finite_leaves(tree: PyTree) -> jax.Array:
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)])
