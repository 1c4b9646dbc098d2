"""Layouts: the rule that says how each leaf of a state is cut over the mesh.

A layout is a function `layout(path, leaf) -> PartitionSpec`. `path` names the leaf with slashes, from the state down:
`params/Dense_0/kernel`, `opt_state/0/mu/Dense_0/kernel`. Sharding is data: no model and no loss asks which layout it
got, and the step derives every collective from it.
"""

import dataclasses
import math
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

PyTree: TypeAlias = Any

MIN_SIZE = 1024
"""Elements from which cutting a leaf pays: below it a collective's latency costs more than the memory is worth."""


Layout: TypeAlias = Callable[[str, Any], PartitionSpec]
Rules: TypeAlias = Sequence[tuple[str, PartitionSpec]]
"""(regular expression, spec) pairs: the first whose expression is found in a leaf's path decides."""


@dataclasses.dataclass(frozen=True)
class NamedLeaf:
    """A leaf whose dims its module has named (Flax's partitioning metadata); None is a dim without a name."""

    shape: tuple[int, ...]
    dtype: Any
    names: tuple[Any, ...]


Leaf: TypeAlias = jax.Array | jax.ShapeDtypeStruct | NamedLeaf
"""What a layout sees of a leaf: its shape and dtype."""


def replicated(path: str, leaf: Leaf) -> PartitionSpec:
    """Lay every leaf out whole on every device: the ordinary data-parallel layout."""
    del path, leaf
    return PartitionSpec()


def zero1(mesh: Mesh, *, axis: str = "data", min_size: int = MIN_SIZE) -> Layout:
    """Return the layout that cuts the optimizer state over `axis`, and nothing else.

    ZeRO's first stage (Rajbhandari et al., 2020): each device updates its part of the params, which are then gathered.
    """
    return _largest_dim(("opt_state/",), mesh, axis, min_size)


def fsdp(mesh: Mesh, *, axis: str = "data", min_size: int = MIN_SIZE) -> Layout:
    """Return the layout that cuts params, hence gradients, and optimizer state over `axis`.

    Each leaf of at least `min_size` elements is cut along its largest dim that divides; smaller ones are whole. With
    the batch cut over a second axis besides, replicas of such groups of devices are kept (hybrid sharding, `hsdp`).
    ZeRO's third stage (Rajbhandari et al., 2020); PyTorch FSDP (Zhao et al., 2023).

    Warns:
      UserWarning: a leaf that is large enough has no dim that divides, and stays whole.
    """
    return _largest_dim(("params/", "opt_state/"), mesh, axis, min_size)


def _largest_dim(prefixes: tuple[str, ...], mesh: Mesh, axis: str, min_size: int) -> Layout:
    num_shards = _axis_size(mesh, axis)

    def layout(path: str, leaf: Leaf) -> PartitionSpec:
        size = math.prod(leaf.shape)
        if not path.startswith(prefixes) or size < min_size or num_shards == 1:
            return PartitionSpec()
        # Among equal dims the last: a row-major leaf is then cut inside its rows, as a matrix's columns are.
        dims = [dim for dim, length in enumerate(leaf.shape) if length % num_shards == 0]
        if not dims:
            warnings.warn(
                f"{path} of shape {tuple(leaf.shape)} stays whole on every device: none of its dims divides by "
                f"{num_shards}, the size of the mesh axis {axis!r}.",
                stacklevel=2,
            )
            return PartitionSpec()
        best = max(dims, key=lambda dim: (leaf.shape[dim], dim))
        return PartitionSpec(*[axis if dim == best else None for dim in range(best + 1)])

    return layout


@dataclasses.dataclass(frozen=True)
class ByPath:
    """The layout that `by_path` returns; `unmatched` tells which rules found no leaf."""

    rules: tuple[tuple[str, PartitionSpec], ...]
    otherwise: Layout

    def __call__(self, path: str, leaf: Leaf) -> PartitionSpec:
        """Return the spec of the first rule found in `path`, or what `otherwise` says."""
        for pattern, spec in self.rules:
            # An optimizer keeps other things under a param's name, too: factored moments, say, with fewer dims.
            if re.search(pattern, path) and (path.startswith("params/") or len(leaf.shape) >= len(spec)):
                return spec
        return self.otherwise(path, leaf)

    def unmatched(self, paths: Iterable[str]) -> list[str]:
        """Return the expressions that are found in none of `paths`."""
        paths = list(paths)
        return [pattern for pattern, _ in self.rules if not any(re.search(pattern, path) for path in paths)]


def by_path(rules: Rules, *, otherwise: Layout = replicated) -> ByPath:
    """Return a layout given by rules on paths: for tensor-parallel axes, where each matrix wants its own dim.

    The optimizer state of a param has the param's path in its own, so a rule covers both.

    >>> layout = by_path([("mlp_in/kernel$", PartitionSpec(None, "model"))])
    >>> layout("params/block_0/mlp_in/kernel", jax.ShapeDtypeStruct((4, 16), "float32"))
    PartitionSpec(None, 'model')
    """
    return ByPath(tuple((pattern, spec) for pattern, spec in rules), otherwise)


def transformer_rules(model_axis: str = "model", *, shard_axis: str | None = None) -> Rules:
    """Return the rules that split our GPT and ViT over `model_axis`: column, then row (Shoeybi et al., 2019).

    The first matrix of each branch is cut by its outputs and the second by its inputs, so that what lies between them
    needs no communication, and one sum ends the branch. `shard_axis` cuts the other dim of each matrix, too (FSDP).
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
    """The layout that `by_names` returns."""

    axis_rules: Mapping[str, str | None]
    otherwise: Layout

    def __call__(self, path: str, leaf: Leaf) -> PartitionSpec:
        """Return the spec that the leaf's names give, or what `otherwise` says where they cut nothing."""
        names = leaf.names if isinstance(leaf, NamedLeaf) else ()
        axes = [self.axis_rules.get(name) if name is not None else None for name in names]
        return PartitionSpec(*axes) if any(axes) else self.otherwise(path, leaf)


def by_names(axis_rules: Mapping[str, str | None], *, otherwise: Layout = replicated) -> ByNames:
    """Return a layout that follows the names which modules have given to the dims of their params (Flax metadata).

    Args:
      axis_rules: name -> mesh axis, or None for a dim that is not cut. A name without a rule is not cut either.
      otherwise: decides about leaves without names, or with none that has a rule.
    """
    return ByNames(dict(axis_rules), otherwise)


def path_name(path: tuple[Any, ...]) -> str:
    """Return a leaf's path in a tree as names joined by slashes."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def specs(tree: PyTree, mesh: Mesh, layout: Layout) -> PyTree:
    """Return a tree of PartitionSpec, one for each leaf of `tree`, chosen by `layout` and checked against `mesh`.

    Raises:
      ValueError: a spec names an axis the mesh has not, or one that does not divide the leaf's dim, or has more dims
        than the leaf; or a rule of `by_path` matches no leaf.
    """
    paths = []

    def spec_of(path: tuple[Any, ...], node: Any) -> Any:
        leaf = _named_leaf(node) if _has_names(node) else node
        name = path_name(path)
        paths.append(name)
        spec = layout(name, leaf)
        check_spec(name, leaf, spec, mesh)
        return jax.tree.map(lambda _: spec, node) if _has_names(node) else spec

    chosen = jax.tree_util.tree_map_with_path(spec_of, tree, is_leaf=_has_names)
    named = isinstance(layout, ByNames) and any(map(_has_names, jax.tree.leaves(tree, is_leaf=_has_names)))
    if not named:  # Names take the place of rules.
        _check_rules(layout, paths)
    return chosen


def _check_rules(layout: Layout, paths: list[str]) -> None:
    rules = layout.otherwise if isinstance(layout, ByNames) else layout
    if isinstance(rules, ByPath) and (unmatched := rules.unmatched(paths)):
        raise ValueError(
            f"Every rule of a layout must match a leaf; nothing matches {', '.join(map(repr, unmatched))}. "
            f"Change or remove it. There are, for example, {', '.join(paths[:8])}."
        )


def shardings(tree: PyTree, mesh: Mesh, layout: Layout) -> PyTree:
    """Return a tree of NamedSharding, one for each leaf of `tree` (arrays or ShapeDtypeStructs), chosen by `layout`.

    Raises:
      ValueError: see `specs`.
    """
    return map_specs(lambda spec: NamedSharding(mesh, spec), specs(tree, mesh, layout))


def constrain(tree: PyTree, mesh: Mesh, layout: Layout) -> PyTree:
    """Return, inside jit, `tree` laid out by `layout`."""
    return jax.lax.with_sharding_constraint(tree, shardings(tree, mesh, layout))


def map_specs(function: Callable[[PartitionSpec], Any], specs: PyTree) -> PyTree:
    """Return a tree of `function` of each PartitionSpec in a tree of them."""
    return jax.tree.map(function, specs, is_leaf=lambda node: isinstance(node, PartitionSpec))


def _has_names(node: Any) -> bool:
    """Say whether `node` is a box that Flax has put around an array to name its dims, whatever its class."""
    return hasattr(node, "names") and hasattr(node, "replace_boxed")


def _named_leaf(box: Any) -> NamedLeaf:
    (value,) = jax.tree.leaves(box)
    return NamedLeaf(tuple(value.shape), value.dtype, tuple(box.names))


def spec_axes(spec: PartitionSpec) -> tuple[str, ...]:
    """Return the mesh axes that `spec` names, in the order of dims."""
    entries = [entry if isinstance(entry, tuple) else (entry,) for entry in spec if entry is not None]
    return tuple(axis for entry in entries for axis in entry)


def keep_axes(spec: PartitionSpec, axes: Sequence[str]) -> PartitionSpec:
    """Return `spec` with all mesh axes but `axes` left out."""

    def kept(entry: Any) -> Any:
        named = [axis for axis in spec_axes(PartitionSpec(entry)) if axis in axes]
        return None if not named else named[0] if len(named) == 1 else tuple(named)

    return PartitionSpec(*map(kept, spec))


def check_spec(path: str, leaf: Leaf, spec: PartitionSpec, mesh: Mesh) -> None:
    """Raise ValueError where `leaf` cannot be cut over `mesh` as `spec` says; the message proposes what would do."""
    if len(spec) > len(leaf.shape):
        raise ValueError(
            f"{path} has shape {tuple(leaf.shape)}, but its spec {spec} is for {len(spec)} dims. "
            f"Give it at most {len(leaf.shape)} entries."
        )
    for dim, entry in enumerate(spec):
        axes = spec_axes(PartitionSpec(entry))
        num_shards = math.prod(_axis_size(mesh, axis, path) for axis in axes)
        length = leaf.shape[dim]
        if length % num_shards:
            fitting = [other for other, each in enumerate(leaf.shape) if each % num_shards == 0]
            advice = [f"cut dim {fitting[0]} instead" if fitting else "leave this leaf whole"]
            below = length // num_shards * num_shards
            advice += [f"make the dim {' or '.join(str(each) for each in (below, below + num_shards) if each)}"]
            raise ValueError(
                f"{path} of shape {tuple(leaf.shape)} cannot be cut as {spec}: dim {dim} ({length}) does not divide by "
                f"{num_shards}, the size of mesh axis {', '.join(map(repr, axes))}. {' or '.join(advice).capitalize()}."
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
    """Where a leaf lies: its path, shape, dtype, spec and the bytes that one device holds of it."""

    path: str
    shape: tuple[int, ...]
    dtype: str
    spec: PartitionSpec
    device_bytes: int


def places(tree: PyTree) -> list[LeafPlace]:
    """Return a LeafPlace for each leaf of `tree`: arrays on a mesh, or ShapeDtypeStructs with shardings."""
    found = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        shard_shape = leaf.sharding.shard_shape(leaf.shape)
        # A key's dtype says nothing of its data: the bytes are those of an eval_shape of it.
        data = jax.eval_shape(jax.random.key_data, leaf) if _is_key(leaf) else leaf
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


def _is_key(leaf: Any) -> bool:
    return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
