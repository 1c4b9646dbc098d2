"""Layouts: the rule that says how each leaf of a state is sharded over the mesh.

A layout is a function `layout(path, leaf) -> PartitionSpec`. `path` names the leaf with slashes, from the state down:
`params/Dense_0/kernel`, `opt_state/0/mu/Dense_0/kernel`. Sharding is data: models and losses do
not depend on the layout, and the step derives every collective from it.
"""

import dataclasses
import difflib
import math
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxdist.spmd import keys

PyTree: TypeAlias = Any

MIN_SIZE = 1024
"""Elements from which sharding a leaf pays: below it a collective's latency costs more than the memory saved."""


Layout: TypeAlias = Callable[[str, Any], PartitionSpec]
Rules: TypeAlias = Sequence[tuple[str, PartitionSpec | tuple[Any, ...]]]
"""(regular expression, spec) pairs: the first whose expression is found in a leaf's path decides. A spec may be written
as a plain tuple of mesh axes."""


@dataclasses.dataclass(frozen=True)
class NamedLeaf:
    """A leaf whose dims its module has named (Flax's partitioning metadata); None is a dim without a name."""

    shape: tuple[int, ...]
    dtype: Any
    names: tuple[Any, ...]

    def each_name(self) -> list[str]:
        """Return all names; a dim may have several, as a tuple."""
        return [name for entry in self.names for name in _entries(entry)]


Leaf: TypeAlias = jax.Array | jax.ShapeDtypeStruct | NamedLeaf
"""What a layout sees of a leaf: its shape and dtype."""


def replicated(path: str, leaf: Leaf) -> PartitionSpec:
    """Return the spec that keeps every leaf whole on every device: the ordinary data-parallel layout."""
    del path, leaf
    return PartitionSpec()


def zero1(mesh: Mesh, *, axis: str = "data", min_size: int = MIN_SIZE) -> Layout:
    """Return the layout that shards the optimizer state over `axis`, and nothing else.

    ZeRO's first stage (Rajbhandari et al., 2020): each device updates its part of the params, which are then gathered.
    """
    return LargestDim(("opt_state/",), _axis_size(mesh, axis), axis, min_size)


def fsdp(mesh: Mesh, *, axis: str = "data", min_size: int = MIN_SIZE) -> Layout:
    """Return the layout that shards params, and so their gradients, and the optimizer state over `axis`.

    Each leaf of at least `min_size` elements is sharded along its largest dim that is divisible by the size of the
    axis; smaller ones are whole. A batch sharded over a second axis too gives replicas of such groups (hybrid, `hsdp`).
    ZeRO's third stage (Rajbhandari et al., 2020); PyTorch FSDP (Zhao et al., 2023).

    Where a tree is laid out, a warning counts the leaves that are large enough, have no divisible dim, and stay whole.
    """
    return LargestDim(("params/", "opt_state/"), _axis_size(mesh, axis), axis, min_size)


@dataclasses.dataclass(frozen=True)
class LargestDim:
    """The layout that `zero1` and `fsdp` return; `tell_whole` warns of leaves that it could not shard, once."""

    prefixes: tuple[str, ...]
    num_shards: int
    axis: str
    min_size: int
    _told: set[str] = dataclasses.field(default_factory=set, compare=False)

    def __call__(self, path: str, leaf: Leaf) -> PartitionSpec:
        """Return the spec that shards the largest dim that is divisible, if the leaf is large enough."""
        dims = self._divisible(leaf)
        if not self._concerns(path, leaf) or not dims:
            return PartitionSpec()
        best = max(dims, key=lambda dim: (leaf.shape[dim], dim))
        return PartitionSpec(*[self.axis if dim == best else None for dim in range(best + 1)])

    def tell_whole(self, leaves: Mapping[str, Leaf]) -> None:
        """Warn of the leaves that stay whole although they are large enough, in one sentence."""
        whole = {
            path: leaf
            for path, leaf in leaves.items()
            if leaf.shape and self._concerns(path, leaf) and not self._divisible(leaf) and path not in self._told
        }
        if not whole:
            return
        self._told.update(whole)
        path, leaf = max(whole.items(), key=lambda each: math.prod(each[1].shape))
        first = f"{path} of shape {tuple(leaf.shape)}"
        stays = f"{len(whole)} leaves, such as {first}, stay" if len(whole) > 1 else f"{first} stays"
        warnings.warn(
            f"{stays} whole on every device: none of {'the' if len(whole) > 1 else 'its'} dims is divisible by "
            f"{self.num_shards}, the size of the mesh axis {self.axis!r}.",
            stacklevel=2,
        )

    def _concerns(self, path: str, leaf: Leaf) -> bool:
        is_large = math.prod(leaf.shape) >= self.min_size
        return path.startswith(self.prefixes) and is_large and self.num_shards > 1

    def _divisible(self, leaf: Leaf) -> list[int]:
        # Among equal dims the last: a row-major leaf is then sharded within its rows, by columns.
        return [dim for dim, length in enumerate(leaf.shape) if length % self.num_shards == 0]


@dataclasses.dataclass(frozen=True)
class ByPath:
    """The layout that `by_path` returns; `unmatched` returns the rules that match no leaf."""

    rules: tuple[tuple[str, PartitionSpec], ...]
    otherwise: Layout
    for_any_model: bool

    def __call__(self, path: str, leaf: Leaf) -> PartitionSpec:
        """Return the spec of the first rule found in `path`, or what `otherwise` says."""
        for pattern, spec in self.rules:
            if re.search(pattern, path) and _concerns(spec, path, leaf):
                return spec
        return self.otherwise(path, leaf)

    def unmatched(self, paths: Iterable[str]) -> list[str]:
        """Return the expressions that are found in none of `paths`."""
        paths = list(paths)
        return [pattern for pattern, _ in self.rules if not any(re.search(pattern, path) for path in paths)]


def _concerns(spec: PartitionSpec, path: str, leaf: Leaf) -> bool:
    # An optimizer keeps other things under a param's name, too: for example factored moments, with fewer dims.
    return path.startswith("params/") or len(leaf.shape) >= len(spec)


def by_path(rules: Rules, *, otherwise: Layout = replicated, for_any_model: bool = False) -> ByPath:
    """Return a layout given by rules on paths: for tensor-parallel axes, where each matrix is sharded along a dim of
    its own.

    The optimizer state of a param has the param's path in its own, so a rule covers both. A rule that matches no leaf
    is refused when a tree is laid out.

    Args:
      rules: see `Rules`.
      otherwise: decides about leaves that no rule matches.
      for_any_model: the rules were not written for the model at hand: where its modules name their dims, which takes
        precedence over rules, they may match nothing.

    >>> layout = by_path([("mlp_in/kernel$", PartitionSpec(None, "model"))])
    >>> layout("params/block_0/mlp_in/kernel", jax.ShapeDtypeStruct((4, 16), "float32"))
    PartitionSpec(None, 'model')
    """
    for pattern, _ in rules:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(
                f"A rule begins with a regular expression; {pattern!r} is not one: {error}. Correct it."
            ) from error
    return ByPath(tuple((pattern, PartitionSpec(*spec)) for pattern, spec in rules), otherwise, for_any_model)


def transformer_rules(model_axis: str = "model", *, shard_axis: str | None = None) -> Rules:
    """Return the rules that split our GPT and ViT over `model_axis`: column, then row (Shoeybi et al., 2019).

    The first matrix of each branch is sharded by its outputs and the second by its inputs, so that the computation
    between them needs no communication, and one sum ends the branch. `shard_axis` shards the other dim of each matrix
    (FSDP).
    """
    return (
        (r"attention/qkv/kernel", PartitionSpec(shard_axis, model_axis)),
        (r"attention/qkv/bias", PartitionSpec(model_axis)),
        (r"attention/out/kernel", PartitionSpec(model_axis, shard_axis)),
        (r"mlp_in/kernel", PartitionSpec(shard_axis, model_axis)),
        (r"mlp_in/bias", PartitionSpec(model_axis)),
        (r"mlp_out/kernel", PartitionSpec(model_axis, shard_axis)),
    )


@dataclasses.dataclass(frozen=True)
class ByNames:
    """The layout that `by_names` returns; `unmatched` returns the names in its rules that no param has."""

    mesh_axes: tuple[str, ...]
    axis_rules: Mapping[str, str | None]
    otherwise: Layout

    def __call__(self, path: str, leaf: Leaf) -> PartitionSpec:
        """Return the spec that the leaf's names give, or what `otherwise` says where they shard nothing."""
        spec = PartitionSpec(*map(self._axes, leaf.names)) if isinstance(leaf, NamedLeaf) else PartitionSpec()
        return spec if any(spec) and _concerns(spec, path, leaf) else self.otherwise(path, leaf)

    def unmatched(self, names: Iterable[str]) -> list[str]:
        """Return the names that have a rule and are not among `names`."""
        return sorted(set(self.axis_rules) - set(names))

    def _axes(self, entry: Any) -> Any:
        own = {axis: axis for axis in self.mesh_axes}
        axes = [axis for name in _entries(entry) if (axis := {**own, **self.axis_rules}.get(name)) is not None]
        return None if not axes else axes[0] if len(axes) == 1 else tuple(axes)


def by_names(
    mesh: Mesh, axis_rules: Mapping[str, str | None] | None = None, *, otherwise: Layout = replicated
) -> ByNames:
    """Return a layout that follows the names which modules have given to the dims of their params (Flax metadata).

    Args:
      mesh: a name that is an axis of it needs no rule.
      axis_rules: name -> mesh axis, or None for a dim that is not sharded. Other names without a rule are not sharded
        either.
      otherwise: decides about leaves without names, or with none that has a rule.
    """
    return ByNames(mesh.axis_names, dict(axis_rules or {}), otherwise)


def path_name(path: tuple[Any, ...], separator: str = "/") -> str:
    """Return a leaf's path in a tree as names joined by slashes, or by another separator."""
    return jax.tree_util.keystr(path, simple=True, separator=separator)


def host_value(leaf: Any) -> np.ndarray | None:
    """Return the whole of a leaf as a NumPy array, a key as its integers; None if it is sharded over processes.

    Of a replicated leaf it is this process's first replica. On CPU the result may share the memory of the leaf.
    """
    if not isinstance(leaf, jax.Array):
        return np.asarray(leaf)
    leaf = keys.plain(leaf)
    if leaf.is_fully_addressable:
        return np.asarray(leaf)
    return np.asarray(leaf.addressable_data(0)) if leaf.is_fully_replicated else None


def specs(tree: PyTree, mesh: Mesh, layout: Layout) -> PyTree:
    """Return a tree of PartitionSpec, one for each leaf of `tree`, chosen by `layout` and checked against `mesh`.

    Raises:
      ValueError: a spec names an axis that the mesh lacks, or one that does not divide the leaf's dim, or has more dims
        than the leaf; or a rule of `by_path` matches no leaf; or two leaves have one name.
    """
    leaves: dict[str, Leaf] = {}
    whole: dict[str, Leaf] = {}

    def spec_of(path: tuple[Any, ...], node: Any) -> Any:
        name = path_name(path)
        if name in leaves:
            raise ValueError(
                f"Each leaf of a state has a name of its own, and two are called {name}, because the key of one "
                "contains a slash. Rename it."
            )
        leaf = leaves[name] = _named_leaf(node) if _has_names(node) else node
        spec = layout(name, leaf)
        check_spec(name, leaf, spec, mesh)
        if not any(spec):
            whole[name] = leaf
        return jax.tree.map(lambda _: spec, node) if _has_names(node) else spec

    chosen = jax.tree_util.tree_map_with_path(spec_of, tree, is_leaf=_has_names)
    _check_rules(layout, leaves)
    while isinstance(layout, ByNames | ByPath):
        layout = layout.otherwise
    if isinstance(layout, LargestDim):
        layout.tell_whole(whole)
    return chosen


def _check_rules(layout: Layout, leaves: Mapping[str, Leaf]) -> None:
    """Raise ValueError where a rule of `layout` matches no leaf."""
    names = sorted({name for leaf in leaves.values() if isinstance(leaf, NamedLeaf) for name in leaf.each_name()})
    if isinstance(layout, ByNames):
        _check_names(layout, names)
        layout = layout.otherwise
    if isinstance(layout, ByPath) and (unmatched := layout.unmatched(leaves)) and not (names and layout.for_any_model):
        nearest = _nearest_path(unmatched[0], leaves)
        if layout.for_any_model:
            raise ValueError(
                "The rules of this strategy are for the package's GPT, and no param here matches "
                f"{', '.join(map(repr, unmatched))}. Write layout.rules for its params, name the dims in its modules, "
                f"or choose another strategy. Its params are, for example, {', '.join(list(leaves)[:8])}."
            )
        raise ValueError(
            f"Every rule of a layout must match a leaf; nothing matches {', '.join(map(repr, unmatched))}. "
            f"Change or remove it; the nearest to {unmatched[0]!r} is {nearest} of shape {leaves[nearest].shape}. "
            f"There are, for example, {', '.join(list(leaves)[:8])}."
        )


def _check_names(layout: ByNames, names: Sequence[str]) -> None:
    if unmatched := layout.unmatched(names):
        known = "They name none."
        if names:
            nearest = difflib.get_close_matches(unmatched[0], names, n=1, cutoff=0.0)[0]
            known = f"Did you mean {nearest!r}? They are {', '.join(map(repr, names))}."
        raise ValueError(
            "Every name with a mesh axis must be one that the model's modules give to a dim; "
            f"{', '.join(map(repr, unmatched))} is not one. {known} Change or remove it."
        )


def _nearest_path(pattern: str, paths: Iterable[str]) -> str:
    """Return the path with an end that is most similar to `pattern`."""

    def likeness(path: str) -> float:
        parts = path.split("/")
        ends = ["/".join(parts[start:]) for start in range(len(parts))]
        return max(difflib.SequenceMatcher(None, pattern, end).ratio() for end in ends)

    return max(paths, key=likeness)


def shardings(tree: PyTree, mesh: Mesh, layout: Layout) -> PyTree:
    """Return a tree of NamedSharding, one for each leaf of `tree` (arrays or ShapeDtypeStructs), chosen by `layout`.

    Axes of one device are left out: the compiler leaves them out of what a step returns, and the next step would be
    compiled again for another sharding.

    Raises:
      ValueError: see `specs`.
    """
    several = [axis for axis, size in mesh.shape.items() if size > 1]
    return map_specs(lambda spec: NamedSharding(mesh, keep_axes(spec, several)), specs(tree, mesh, layout))


def constrain(tree: PyTree, mesh: Mesh, layout: Layout) -> PyTree:
    """Return, inside jit, `tree` laid out by `layout`."""
    return jax.lax.with_sharding_constraint(tree, shardings(tree, mesh, layout))


def map_specs(function: Callable[[PartitionSpec], Any], specs: PyTree) -> PyTree:
    """Return a tree of `function` of each PartitionSpec in a tree of them."""
    return jax.tree.map(function, specs, is_leaf=lambda node: isinstance(node, PartitionSpec))


def _has_names(node: Any) -> bool:
    """Return whether `node` is a box, of any class, that Flax puts around an array to name its dims."""
    return hasattr(node, "names") and hasattr(node, "replace_boxed")


def _named_leaf(box: Any) -> NamedLeaf:
    (value,) = jax.tree.leaves(box)
    return NamedLeaf(tuple(value.shape), value.dtype, tuple(box.names))


def spec_axes(spec: PartitionSpec) -> tuple[str, ...]:
    """Return the mesh axes that `spec` names, in the order of dims."""
    return tuple(axis for entry in spec for axis in _entries(entry))


def _entries(entry: Any) -> tuple[Any, ...]:
    """Return what one dim is sharded over, or named by, as a tuple of none, one or several."""
    return () if entry is None else entry if isinstance(entry, tuple) else (entry,)


def keep_axes(spec: PartitionSpec, axes: Sequence[str]) -> PartitionSpec:
    """Return `spec` with all mesh axes but `axes` left out."""

    def kept(entry: Any) -> Any:
        named = [axis for axis in spec_axes(PartitionSpec(entry)) if axis in axes]
        return None if not named else named[0] if len(named) == 1 else tuple(named)

    return PartitionSpec(*map(kept, spec))


def check_spec(path: str, leaf: Leaf, spec: PartitionSpec, mesh: Mesh) -> None:
    """Raise ValueError where `leaf` cannot be sharded over `mesh` by `spec`; the message proposes alternatives."""
    if len(spec) > len(leaf.shape):
        raise ValueError(
            f"{path} has shape {tuple(leaf.shape)}, but its spec {spec} is for {len(spec)} dims. "
            f"Give it at most {len(leaf.shape)} entries."
        )
    axes = spec_axes(spec)
    twice = sorted({axis for axis in axes if axes.count(axis) > 1})
    if twice:
        raise ValueError(
            f"{path} of shape {tuple(leaf.shape)} cannot be sharded as {spec}: it names the mesh axis {twice[0]!r} "
            "twice, and an axis shards one dim only. Leave it out of all dims but one."
        )
    for dim, entry in enumerate(spec):
        axes = spec_axes(PartitionSpec(entry))
        num_shards = math.prod(_axis_size(mesh, axis, path) for axis in axes)
        length = leaf.shape[dim]
        if length % num_shards:
            fitting = [other for other, each in enumerate(leaf.shape) if each % num_shards == 0]
            advice = [f"shard dim {fitting[0]} instead" if fitting else "leave this leaf whole"]
            below = length // num_shards * num_shards
            advice += [f"make the dim {' or '.join(str(each) for each in (below, below + num_shards) if each)}"]
            raise ValueError(
                f"{path} of shape {tuple(leaf.shape)} cannot be sharded as {spec}: dim {dim} has length {length}, "
                f"which is not divisible by {num_shards}, the size of mesh axis {', '.join(map(repr, axes))}. "
                f"{' or '.join(advice).capitalize()}."
            )


def _axis_size(mesh: Mesh, axis: str, path: str | None = None) -> int:
    if axis not in mesh.shape:
        where = "A layout" if path is None else f"The spec of {path}"
        raise ValueError(
            f"{where} names the mesh axis {axis!r}, but the mesh has {dict(mesh.shape)}. "
            "Rename the axis or give the mesh one of that name."
        )
    return mesh.shape[axis]


@dataclasses.dataclass(frozen=True)
class LeafPlace:
    """Where a leaf is placed: its path, shape, dtype, spec and the bytes that one device holds of it."""

    path: str
    shape: tuple[int, ...]
    dtype: str
    spec: PartitionSpec
    device_bytes: int


def places(tree: PyTree) -> list[LeafPlace]:
    """Return a LeafPlace for each leaf of `tree`: arrays on a mesh, or ShapeDtypeStructs with shardings."""
    found = []
    for path, node in jax.tree_util.tree_leaves_with_path(tree, is_leaf=_has_names):
        (leaf,) = jax.tree.leaves(node)
        shard_shape = leaf.sharding.shard_shape(leaf.shape)
        # The dtype of a key does not show its size: the bytes are those of the plain integers in it.
        data = jax.eval_shape(keys.plain, leaf)
        num_bytes = math.prod(shard_shape) * math.prod(data.shape[len(leaf.shape) :]) * data.dtype.itemsize
        found.append(LeafPlace(path_name(path), tuple(leaf.shape), str(leaf.dtype), leaf.sharding.spec, num_bytes))
    return found


def describe(tree: PyTree) -> str:
    """Return a table of a state's leaves: path, shape, dtype, spec and bytes on each device; the last line adds up."""
    rows = [("leaf", "shape", "dtype", "spec", "bytes per device")]
    found = places(tree)
    for place in found:
        shape = "x".join(map(str, place.shape)) or "scalar"
        rows.append((place.path, shape, place.dtype, _short(place.spec), f"{place.device_bytes:,}"))
    rows.append(("total", "", "", "", f"{sum(place.device_bytes for place in found):,}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        *cells, last = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        lines.append("  ".join([*cells, last.strip().rjust(widths[-1])]))
    return "\n".join(lines)


def _short(spec: PartitionSpec) -> str:
    return ", ".join("-" if axes is None else str(axes) for axes in spec) if any(spec) else "replicated"
