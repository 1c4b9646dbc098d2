"""What an optimizer does with each param: whether it decays, the factor of its learning rate, whether it is frozen."""

import difflib
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from jaxdist.optimizers.described import Group, Optimizer
from jaxdist.spmd.layout import path_name

PyTree: TypeAlias = Any


class ParamSettings(NamedTuple):
    """What an optimizer does with one param: its path, whether it decays, and the factor of its learning rate."""

    path: str
    decays: bool
    learning_rate: float
    frozen: bool


def describe(optimizer: Optimizer, params: PyTree) -> list[ParamSettings]:
    """Return, for each param, whether it decays, the factor of its learning rate, and whether it is frozen.

    Args:
      optimizer: the description.
      params: arrays or ShapeDtypeStructs.

    Raises:
      ValueError: a group matches no param.
    """
    found = _settings(optimizer, params)
    check_groups(optimizer.groups, params)
    return found


def _settings(optimizer: Optimizer, params: PyTree) -> list[ParamSettings]:
    found = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = path_name(path)
        group = _group_of(optimizer.groups, name)
        asked = optimizer.decay_mask == "all" or decays(name, len(leaf.shape))
        decayed = asked if group is None or group.decay is None else group.decay
        rate, frozen = (1.0, False) if group is None else (group.learning_rate, group.frozen)
        found.append(ParamSettings(name, decayed and bool(optimizer.weight_decay) and not frozen, rate, frozen))
    return found


_OTHER_THAN_MATRICES = re.compile(
    r"^(b|bias(es)?|scale|gain|gamma|beta|offset|shift)\d*$|[_.](bias|scale|gain|gamma|beta)$"
)


_NORM = re.compile(r"norm", re.IGNORECASE)


def decays(path: str, num_dims: int) -> bool:
    """Return whether a param gets weight decay: matrices and embeddings, of any number of dims.

    A param is not one of these if it has fewer than two dims, if it is called bias, scale, gain, gamma, beta, offset or
    shift (attention biases have two dims, and under `nn.scan` every param has one dim more), or if it belongs to a
    module with `norm` in its name.
    """
    *modules, name = path.split("/")
    in_norm = bool(modules) and _NORM.search(modules[-1]) is not None
    return num_dims >= 2 and not in_norm and not _OTHER_THAN_MATRICES.search(name.lower())


def decay_mask(optimizer: Optimizer, params: PyTree) -> PyTree:
    """Return a tree like `params`, which may be some of all: whether each leaf decays."""
    settings = _settings(optimizer, params)
    return jax.tree.unflatten(jax.tree.structure(params), [each.decays for each in settings])


def _group_of(groups: Sequence[Group], path: str) -> Group | None:
    return next((group for group in groups if re.search(group.pattern, path)), None)


def check_groups(groups: Sequence[Group], params: PyTree) -> None:
    """Raise ValueError where a group matches none of the params."""
    paths = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    for group in groups:
        if not any(re.search(group.pattern, path) for path in paths):
            nearest = difflib.get_close_matches(group.pattern, paths, n=1, cutoff=0.0)
            raise ValueError(
                f"Every group of optimizer.groups must match a param; nothing matches {group.pattern!r}. "
                f"The nearest param is {nearest[0] if nearest else 'none'}."
            )


def freeze(groups: Sequence[Group]) -> optax.GradientTransformation:
    """Return what drops the gradients of frozen params, before a norm is taken of all gradients."""

    def frozen(group: Group, leaf: jax.Array) -> jax.Array:
        return jnp.zeros_like(leaf) if group.frozen else leaf

    return optax.stateless(lambda updates, params: _map_groups(groups, updates, frozen))


def scale_by_group(groups: Sequence[Group]) -> optax.GradientTransformation:
    """Return what multiplies the updates of each group's params by its factor of the learning rate."""

    def scaled(group: Group, leaf: jax.Array) -> jax.Array:
        if group.frozen:
            return jnp.zeros_like(leaf)
        return leaf if group.learning_rate == 1 else leaf * group.learning_rate

    return optax.stateless(lambda updates, params: _map_groups(groups, updates, scaled))


def scale_by_path(factors: Callable[[str], float]) -> optax.GradientTransformation:
    """Return what multiplies the update of each param by a factor of its path."""

    def scaled(path: Any, leaf: jax.Array) -> jax.Array:
        factor = factors(path_name(path))
        return leaf if factor == 1 else leaf * factor

    return optax.stateless(lambda updates, params: jax.tree_util.tree_map_with_path(scaled, updates))


def _map_groups(groups: Sequence[Group], tree: PyTree, function: Callable[[Group, jax.Array], jax.Array]) -> PyTree:
    def mapped(path: Any, leaf: jax.Array) -> jax.Array:
        group = _group_of(groups, path_name(path))
        return leaf if group is None else function(group, leaf)

    return jax.tree_util.tree_map_with_path(mapped, tree)
