"""NNX modules as functions of arrays: variables become nested dicts, random state is made anew in each call."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as flax_linen
from flax import nnx as flax_nnx
from flax import traverse_util

from jaxdist import errors
from jaxdist.adapters import first_calls, functions, module_checks
from jaxdist.adapters.flax_trees import unboxed
from jaxdist.adapters.functions import Functions, Loss, PyTree
from jaxdist.errors import ConfigError
from jaxdist.spmd.metrics import Batch
from jaxdist.spmd.precision import Precision


def nnx(
    make_module: Callable[[flax_nnx.Rngs], flax_nnx.Module],
    loss: Loss,
    example_batch: Mapping[str, Any],
    *,
    inputs: str | Sequence[str] = "image",
    precision: Precision = "float32",
    is_checked: bool = False,
) -> Functions:
    """Return the functions of an NNX module.

    params and model_state are plain nested dicts keyed by the module's attribute names. `nnx.Param`s are params, all
    other variables model_state, except random state: that is created from the key given to loss_fn in each call, so
    that a step remains a function of its arguments and a checkpoint needs no hidden counters.

    `make_module(rngs)` builds the module. It is called as `module(*inputs)`, with `train=` and `mask=` if it takes
    them, after `module.train()` or `module.eval()`. Of the example batch only the field names are used; for the rest
    see `linen`.

    Raises:
      ValueError: see `linen`; but `train` need not be taken.
    """
    fields = module_checks.input_fields(inputs, example_batch)
    name, make_module = errors.named(make_module), _without_mesh(make_module)
    abstract = _abstract_module(make_module, name)
    template = _Template.of(abstract)
    accepted = inspect.signature(type(abstract).__call__).parameters
    module_checks.check_call(type(abstract), accepted, fields, example_batch)

    def init(key: jax.Array) -> tuple[PyTree, PyTree]:
        _, params, _, state = _split(make_module(flax_nnx.Rngs(key)))
        return _to_tree(params, template.params), _to_tree(state, template.state)

    def call(
        params: PyTree, model_state: PyTree, batch: Batch, key: jax.Array, *, train: bool
    ) -> tuple[Any, flax_nnx.Module]:
        module = template.module(params, model_state, key)
        module.train() if train else module.eval()
        return module(*(batch[name] for name in fields), **functions.switches(accepted, batch, train)), module

    def forward(
        params: PyTree, model_state: PyTree, batch: Batch, key: jax.Array, *, train: bool
    ) -> tuple[Any, PyTree]:
        outputs, module = call(params, model_state, batch, key, train=train)
        return outputs, _to_tree(_split(module)[3], template.state)

    def params_after(params: PyTree, model_state: PyTree, batch: Batch, key: jax.Array) -> dict[str, Any]:
        flat = flax_nnx.to_flat_state(_split(call(params, model_state, batch, key, train=True)[1])[1])
        return {"/".join(map(str, path)): variable.get_value() for path, variable in flat}

    forward = functions.in_precision(forward, precision)
    if not is_checked:
        shapes = jax.eval_shape(init, jax.random.key(0))
        module_checks.check_module(type(abstract), accepted, forward, loss, shapes, example_batch)
        module_checks.check_params_stay(type(abstract), params_after, shapes, example_batch)
    return functions.make_functions(init, forward, loss, stateful=bool(template.state))


class _Template(NamedTuple):
    """A module without its arrays: its graph, and its variables by their paths."""

    graph: Any
    params: Mapping[tuple, Any]
    random_state: Mapping[tuple, Any]
    state: Mapping[tuple, Any]

    @classmethod
    def of(cls, module: flax_nnx.Module) -> "_Template":
        """Return that of a module."""
        graph, *states = _split(module)
        return cls(graph, *(dict(flax_nnx.to_flat_state(each)) for each in states))

    def module(self, params: PyTree, model_state: PyTree, key: jax.Array) -> flax_nnx.Module:
        """Return the module with these arrays, and random state made from the key."""
        made: flax_nnx.Module = flax_nnx.merge(
            self.graph,
            _from_tree(params, self.params),
            _random_state(key, self.random_state),
            _from_tree(model_state or {}, self.state),
        )
        return made


def _abstract_module(make_module: Callable[[flax_nnx.Rngs], flax_nnx.Module], name: str) -> flax_nnx.Module:
    """Return the module with shapes in place of arrays; ConfigError where `make_module` makes none."""
    rule = "A model that is no Linen module is a callable from nnx.Rngs to an NNX module"
    with first_calls.first_call(rule, name):
        abstract = flax_nnx.eval_shape(lambda: make_module(flax_nnx.Rngs(0)))
    if not isinstance(abstract, flax_nnx.Module):
        raise ConfigError(f"{rule}; {name} returns an object of the class {type(abstract).__name__}.")
    if not callable(abstract):
        raise ConfigError(f"A module is called with its inputs; {type(abstract).__name__} has no __call__. Add it.")
    return abstract


def _split(module: flax_nnx.Module) -> tuple[Any, flax_nnx.State, flax_nnx.State, flax_nnx.State]:
    """Return the module's graph, params, random state and everything else."""
    graph, *states = flax_nnx.split(module, flax_nnx.Param, flax_nnx.RngState, ...)
    params, random_state, rest = states
    return graph, params, random_state, rest


def _without_mesh(make_module: Callable[[flax_nnx.Rngs], flax_nnx.Module]) -> Callable[..., flax_nnx.Module]:
    """Return `make_module` for modules that name the dims of their params: Flax would look for a mesh at once."""

    def make(rngs: flax_nnx.Rngs) -> flax_nnx.Module:
        with flax_nnx.use_eager_sharding(False):
            return make_module(rngs)

    return make


def _to_tree(state: flax_nnx.State, template: Mapping[tuple, Any]) -> dict[str, Any]:
    """Return the arrays at the template's paths as nested dicts with string keys; drop everything else that the call
    returned.

    An array whose dims the module has named comes in the box that Linen puts around such a one; see `layout.by_names`.
    """
    flat = dict(flax_nnx.to_flat_state(state))
    return traverse_util.unflatten_dict({tuple(map(str, path)): _boxed(flat[path]) for path in template})


def _boxed(variable: Any) -> Any:
    named = variable.get_metadata("out_sharding", None)
    if named is None:
        return variable.get_value()
    names = getattr(named, "spec", named)  # A NamedSharding names mesh axes.
    return flax_linen.Partitioned(variable.get_value(), tuple(names))


def _from_tree(tree: Mapping[str, Any], template: Mapping[tuple, Any]) -> flax_nnx.State:
    flat = traverse_util.flatten_dict(unboxed(tree))
    return flax_nnx.from_flat_state(
        {path: variable.replace(flat[tuple(map(str, path))]) for path, variable in template.items()}
    )


def _random_state(key: jax.Array, template: Mapping[tuple, Any]) -> flax_nnx.State:
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
