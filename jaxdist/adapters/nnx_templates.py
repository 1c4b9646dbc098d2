"""An NNX module without its arrays, and the ways between its variables and nested dicts."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as flax_linen
from flax import nnx as flax_nnx
from flax import traverse_util

from jaxdist import errors
from jaxdist.adapters import first_calls
from jaxdist.adapters.flax_trees import unboxed
from jaxdist.adapters.functions import PyTree
from jaxdist.errors import ConfigError
from jaxdist.spmd.dependence import depends

MakeModule = Callable[[flax_nnx.Rngs], flax_nnx.Module]
"""`make_module(rngs) -> module`."""

_Flat = Mapping[tuple, Any]


class Template(NamedTuple):
    """A module without its arrays: its class, its graph, and its variables by their paths.

    `constants` are arrays among its attributes that are no variables, such as tables and masks: these have values.
    """

    module_type: type
    graph: Any
    params: _Flat
    random_state: _Flat
    state: _Flat
    constants: _Flat

    @classmethod
    def of(cls, make_module: MakeModule) -> "Template":
        """Return that of the module made. Nothing is computed but its constants.

        Raises:
          ConfigError: `make_module` makes no module, or one whose constants are drawn at random or cannot be found.
        """
        made: list[tuple[type, Any]] = []
        name = errors.named(make_module)
        make_module = _without_mesh(make_module)

        def split() -> list[flax_nnx.State]:
            module = _checked(make_module(flax_nnx.Rngs(0)), name)
            graph, *states = split_module(module)
            _check_all_found(module, states)
            made.append((type(module), graph))
            return states

        with first_calls.first_call(_RULE, name):
            params, random_state, rest = (dict(flax_nnx.to_flat_state(each)) for each in jax.eval_shape(split))
        state = {path: each for path, each in rest.items() if isinstance(each, flax_nnx.Variable)}
        [(module_type, graph)] = made
        constants = _constants(make_module, module_type.__name__, [path for path in rest if path not in state])
        return cls(module_type, graph, params, random_state, state, constants)

    def module(self, params: PyTree, model_state: PyTree, key: jax.Array, constants: PyTree) -> flax_nnx.Module:
        """Return the module with these arrays, trees of `arrays`, and random state made from the key."""
        made: flax_nnx.Module = flax_nnx.merge(
            self.graph,
            _from_tree(params, self.params),
            _random_state(key, self.random_state),
            _from_tree(model_state or {}, self.state),
            _from_tree(constants, self.constants),
        )
        return made

    def initial(self, make_module: MakeModule, key: jax.Array) -> tuple[PyTree, PyTree]:
        """Return the arrays of params and of the state of a module made with the key, as nested dicts."""
        _, params, _, state = split_module(_without_mesh(make_module)(flax_nnx.Rngs(key)))
        return arrays(params, self.params), arrays(state, self.state)


def split_module(module: flax_nnx.Module) -> tuple[Any, flax_nnx.State, flax_nnx.State, flax_nnx.State]:
    """Return the module's graph, params, random state and everything else."""
    graph, *states = flax_nnx.split(module, flax_nnx.Param, flax_nnx.RngState, ...)
    params, random_state, rest = states
    return graph, params, random_state, rest


def arrays(state: flax_nnx.State | _Flat, paths: _Flat) -> dict[str, Any]:
    """Return the arrays at these paths as nested dicts with string keys; drop everything else that the call returned.

    An array whose dims the module has named comes in the box that Linen puts around such a one; see `layout.by_names`.
    """
    flat = dict(flax_nnx.to_flat_state(state)) if isinstance(state, flax_nnx.State) else state
    return traverse_util.unflatten_dict({tuple(map(str, path)): _boxed(flat[path]) for path in paths})


_RULE = "A model that is no Linen module is a callable from nnx.Rngs to an NNX module"


def _without_mesh(make_module: MakeModule) -> MakeModule:
    """Return `make_module` for modules that name the dims of their params: Flax would look for a mesh at once."""

    def make(rngs: flax_nnx.Rngs) -> flax_nnx.Module:
        with flax_nnx.use_eager_sharding(False):
            return make_module(rngs)

    return make


def _checked(module: Any, name: str) -> flax_nnx.Module:
    """Return what was made, with its arrays marked as such: Flax takes those that are traced for settings."""
    if not isinstance(module, flax_nnx.Module):
        raise ConfigError(f"{_RULE}; {name} returns an object of the class {type(module).__name__}.")
    if not callable(module):
        raise ConfigError(f"A module is called with its inputs; {type(module).__name__} has no __call__. Add it.")
    for _, node, name, value in _attributes(module):
        if isinstance(value, jax.core.Tracer):
            setattr(node, name, flax_nnx.data(value))
    return module


def _check_all_found(module: flax_nnx.Module, states: list[flax_nnx.State]) -> None:
    """Raise ConfigError where an array made for an attribute is in none of the states, as in a plain list."""
    found = set(map(id, jax.tree.leaves(states)))
    for path, _, name, value in _attributes(module):
        if any(isinstance(leaf, jax.core.Tracer) and id(leaf) not in found for leaf in jax.tree.leaves(value)):
            raise ConfigError(
                f"NNX takes a {type(value).__name__} among the attributes of a module for a setting, without arrays; "
                f"{'/'.join(map(str, (*path, name)))} of {type(module).__name__} has some. Make it an nnx.List or "
                "nnx.Dict, or put it into nnx.data(...)."
            )


def _attributes(module: flax_nnx.Module) -> Iterator[tuple[tuple, Any, str, Any]]:
    """Yield the path of each node of a module, the node, and the name and value of each of its attributes."""
    for path, node in list(flax_nnx.iter_graph(module)):
        if isinstance(node, flax_nnx.Pytree):
            yield from ((path, node, name, value) for name, value in list(vars(node).items()))


def _constants(make_module: MakeModule, name: str, paths: list[tuple]) -> dict[tuple, Any]:
    """Return the values at these paths of a module; ConfigError where one depends on the key."""

    def make(key: jax.Array) -> list[Any]:
        flat = dict(flax_nnx.to_flat_state(split_module(_checked(make_module(flax_nnx.Rngs(key)), name))[3]))
        return [jnp.asarray(flat[path]) for path in paths]

    if not paths:
        return {}
    for path, drawn in zip(paths, depends(make, [jax.eval_shape(lambda: jax.random.key(0))], [True]), strict=True):
        if drawn:
            raise ConfigError(
                "An array of a module that is no variable is a constant, the same for every seed; "
                f"{'/'.join(map(str, path))} of {name} is drawn from its rngs. Make it a variable, such as "
                "nnx.BatchStat(...): checkpoints hold those."
            )
    return dict(zip(paths, jax.jit(make)(jax.random.key(0)), strict=True))


def _boxed(variable: Any) -> Any:
    if not isinstance(variable, flax_nnx.Variable):
        return variable
    named = variable.get_metadata("out_sharding", None)
    if named is None:
        return variable.get_value()
    names = getattr(named, "spec", named)  # A NamedSharding names mesh axes.
    return flax_linen.Partitioned(variable.get_value(), tuple(names))


def _from_tree(tree: Mapping[str, Any], template: _Flat) -> flax_nnx.State:
    flat = traverse_util.flatten_dict(unboxed(tree))

    def filled(path: tuple, like: Any) -> Any:
        value = flat[tuple(map(str, path))]
        return like.replace(value) if isinstance(like, flax_nnx.Variable) else value

    return flax_nnx.from_flat_state({path: filled(path, like) for path, like in template.items()})


def _random_state(key: jax.Array, template: _Flat) -> flax_nnx.State:
    """Return random state whose every stream has a key of its own, folded from `key`, and counts from zero."""

    def fresh(index: int, variable: Any) -> Any:
        shape = variable.get_value().shape
        if isinstance(variable, flax_nnx.RngCount):
            return variable.replace(jnp.zeros(shape, jnp.uint32))
        stream = jax.random.fold_in(key, index)
        return variable.replace(jax.random.split(stream, shape) if shape else stream)

    return flax_nnx.from_flat_state(
        {path: fresh(index, variable) for index, (path, variable) in enumerate(template.items())}
    )
