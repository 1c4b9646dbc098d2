"""Layouts: the rule that says how each leaf of a state is cut over the mesh.

A layout is a function `layout(path, leaf) -> PartitionSpec`. `path` names the leaf with slashes, from the state down:
`params/Dense_0/kernel`, `opt_state/0/mu/Dense_0/kernel`. Sharding is data: no step asks which layout it got.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

Layout: TypeAlias = Callable[[str, jax.ShapeDtypeStruct], PartitionSpec]


def replicated(path: str, leaf: jax.ShapeDtypeStruct) -> PartitionSpec:
    """Lay every leaf out whole on every device: the ordinary data-parallel layout."""
    del path, leaf
    return PartitionSpec()


def path_name(path: tuple[Any, ...]) -> str:
    """Return a leaf's path in a tree as names joined by slashes."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def shardings(tree: Any, mesh: Mesh, layout: Layout) -> Any:
    """Return a tree of NamedSharding, one for each leaf of `tree` (arrays or ShapeDtypeStructs), chosen by `layout`."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: NamedSharding(mesh, layout(path_name(path), leaf)), tree)
