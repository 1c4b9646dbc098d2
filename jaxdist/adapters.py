"""Flax modules, Linen or NNX, as the plain functions that a training step takes.

The one idea: a module is turned into functions of (params, batch, key, model_state) once, at the rim, and everything
behind it sees pytrees of arrays only. No other module outside `jaxdist.models` imports Flax.

A module is called as `module(*inputs, train=bool)`, where the inputs are batch fields. One that also takes `mask` gets
the batch's mask as booleans of shape (B,), or None, so that batch normalisation can leave padding rows out.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from flax import linen as flax_linen
from flax import nnx as flax_nnx
from flax import traverse_util

from jaxdist.errors import ConfigError
from jaxdist.spmd.metrics import MASK, Batch, Mean, masked_mean

PyTree: TypeAlias = Any

Loss: TypeAlias = Callable[[Any, Batch], tuple[jax.Array, dict[str, jax.Array]]]
"""`loss(outputs, batch) -> (values, {name: values})`, each per example (B,) or per token (B, T); not averaged."""

_Forward: TypeAlias = Callable[..., tuple[Any, PyTree]]
"""`forward(params, model_state, batch, key, train=bool) -> (outputs, new model_state)`; no state is None."""


class Functions(NamedTuple):
    """What a training run needs of a model.

    For a stateless model (no batch statistics or the like):
      init_fn(key) -> params; loss_fn and eval_fn: (params, batch, key) -> (loss, metrics).
    For a stateful one:
      init_fn(key) -> (params, model_state);
      loss_fn(params, batch, key, model_state) -> (loss, metrics, new model_state);
      eval_fn(params, batch, key, model_state) -> (loss, metrics).
    loss is a Mean over the true examples (or tokens) of the batch, metrics a flat dict of such.
    """

    init_fn: Callable[..., Any]
    loss_fn: Callable[..., Any]
    eval_fn: Callable[..., Any]


def from_model(
    model: Any, loss: Loss | None, example_batch: Mapping[str, Any], *, inputs: str | Sequence[str] = "image"
) -> Functions:
    """Return the functions of whatever an experiment calls its model.

    Args:
      model: a Linen module, a callable from `nnx.Rngs` to an NNX module, or Functions, which come back as they are.
      loss: see `Loss`; Functions have their own.
      example_batch: see `linen`.
      inputs: see `linen`.

    Raises:
      ValueError: the model is none of these, or its loss is missing.
    """
    if isinstance(model, Functions):
        return model
    if loss is None:
        raise ValueError("A Flax module needs a loss(outputs, batch); `jaxdist.losses` has the usual ones.")
    if isinstance(model, flax_linen.Module):
        return linen(model, loss, example_batch, inputs=inputs)
    if callable(model):
        return nnx(model, loss, example_batch, inputs=inputs)
    raise ValueError(
        "A model is a Linen module, a callable from nnx.Rngs to an NNX module, or adapters.Functions; "
        f"got {type(model).__name__}."
    )


def check_model(model: Any) -> None:
    """Raise ConfigError unless `model` may be one: the message says how to turn it into one."""
    kind = type(model).__name__
    if isinstance(model, type) and issubclass(model, flax_linen.Module):
        raise ConfigError(f"Experiment.model takes a module, not its class. Call the class: {model.__name__}(...).")
    if isinstance(model, flax_nnx.Module):
        raise ConfigError(
            f"Experiment.model takes a callable from nnx.Rngs to an NNX module, so that params can be created on the "
            f"devices; got a module that is made already. Write lambda rngs: {kind}(..., rngs=rngs)."
        )
    if not (isinstance(model, flax_linen.Module | Functions) or callable(model)):
        raise ConfigError(
            "Experiment.model takes a Linen module, a callable from nnx.Rngs to an NNX module, or adapters.Functions; "
            f"got an object of the class {kind}."
        )


def linen(
    module: flax_linen.Module, loss: Loss, example_batch: Mapping[str, Any], *, inputs: str | Sequence[str] = "image"
) -> Functions:
    """Return the functions of a Linen module.

    Every collection but `params` is model_state: a dict from the collection's name to its variables. All random streams
    (`dropout` and others) come from the key given to loss_fn.

    Args:
      module: called as `module(*inputs, train=bool)`, and with `mask=` if it takes one.
      loss: see `Loss`; `jaxdist.losses` has the usual ones.
      example_batch: arrays or jax.ShapeDtypeStructs with the shapes of a batch; only shapes and dtypes are used.
      inputs: the batch field, or fields in order, that the module is called with.

    Raises:
      ValueError: a field is missing, the module does not take `train`, or it has batch statistics and takes no `mask`.
    """
    fields = _input_fields(inputs, example_batch)
    accepted = inspect.signature(type(module).__call__).parameters
    _check_call(type(module), accepted, required="train")

    def init(key: jax.Array) -> tuple[PyTree, PyTree]:
        rows = [jnp.zeros((1, *example_batch[name].shape[1:]), example_batch[name].dtype) for name in fields]
        variables = module.init(key, *rows, train=False)
        model_state = {name: variables[name] for name in variables if name != "params"}
        return variables.get("params", {}), model_state

    collections = sorted(jax.eval_shape(init, jax.random.key(0))[1])
    if "batch_stats" in collections:
        _check_call(type(module), accepted, required="mask")

    def forward(
        params: PyTree, model_state: PyTree, batch: Batch, key: jax.Array, *, train: bool
    ) -> tuple[Any, PyTree]:
        return module.apply(
            {"params": _unboxed(params), **(model_state or {})},
            *(batch[name] for name in fields),
            rngs={"params": key},  # Linen draws from this stream whatever has none of its own name
            mutable=collections if train else [],
            **_switches(accepted, batch, train),
        )

    return _functions(init, forward, loss, stateful=bool(collections))


def nnx(
    make_module: Callable[[flax_nnx.Rngs], flax_nnx.Module],
    loss: Loss,
    example_batch: Mapping[str, Any],
    *,
    inputs: str | Sequence[str] = "image",
) -> Functions:
    """Return the functions of an NNX module.

    params and model_state are plain nested dicts keyed by the module's attribute names. `nnx.Param`s are params, all
    other variables model_state, save random state: that is made afresh from the key given to loss_fn, so that a step
    remains a function of its arguments and a checkpoint needs no hidden counters.

    Args:
      make_module: `make_module(rngs)` builds the module. It is called as `module(*inputs)`, with `train=` and `mask=`
        if it takes them, after `module.train()` or `module.eval()`.
      loss: see `Loss`; `jaxdist.losses` has the usual ones.
      example_batch: arrays or jax.ShapeDtypeStructs with the shapes of a batch; only its field names are used.
      inputs: the batch field, or fields in order, that the module is called with.

    Raises:
      ValueError: a field is missing, or the module has batch statistics and takes no `mask`.
    """
    fields = _input_fields(inputs, example_batch)
    make_module = _without_mesh(make_module)
    abstract = flax_nnx.eval_shape(lambda: make_module(flax_nnx.Rngs(0)))
    graph, *templates = _split(abstract)
    param_template, random_template, state_template = (dict(flax_nnx.to_flat_state(part)) for part in templates)
    accepted = inspect.signature(type(abstract).__call__).parameters
    if any(isinstance(variable, flax_nnx.BatchStat) for variable in state_template.values()):
        _check_call(type(abstract), accepted, required="mask")

    def init(key: jax.Array) -> tuple[PyTree, PyTree]:
        _, params, _, state = _split(make_module(flax_nnx.Rngs(key)))
        return _to_tree(params, param_template), _to_tree(state, state_template)

    def forward(
        params: PyTree, model_state: PyTree, batch: Batch, key: jax.Array, *, train: bool
    ) -> tuple[Any, PyTree]:
        module = flax_nnx.merge(
            graph,
            _from_tree(params, param_template),
            _random_state(key, random_template),
            _from_tree(model_state or {}, state_template),
        )
        module.train() if train else module.eval()
        outputs = module(*(batch[name] for name in fields), **_switches(accepted, batch, train))
        return outputs, _to_tree(_split(module)[3], state_template)

    return _functions(init, forward, loss, stateful=bool(state_template))


def _functions(
    init: Callable[[jax.Array], tuple[PyTree, PyTree]], forward: _Forward, loss: Loss, *, stateful: bool
) -> Functions:
    def loss_stateless(params: PyTree, batch: Batch, key: jax.Array) -> tuple[Mean, dict[str, Mean]]:
        outputs, _ = forward(params, None, batch, key, train=True)
        return _average(loss, outputs, batch)

    def eval_stateless(params: PyTree, batch: Batch, key: jax.Array) -> tuple[Mean, dict[str, Mean]]:
        outputs, _ = forward(params, None, batch, key, train=False)
        return _average(loss, outputs, batch)

    def loss_stateful(
        params: PyTree, batch: Batch, key: jax.Array, model_state: PyTree
    ) -> tuple[Mean, dict[str, Mean], PyTree]:
        outputs, new_state = forward(params, model_state, batch, key, train=True)
        return *_average(loss, outputs, batch), _keep_if_empty(batch, new_state, model_state)

    def eval_stateful(
        params: PyTree, batch: Batch, key: jax.Array, model_state: PyTree
    ) -> tuple[Mean, dict[str, Mean]]:
        outputs, _ = forward(params, model_state, batch, key, train=False)
        return _average(loss, outputs, batch)

    if stateful:
        return Functions(init, loss_stateful, eval_stateful)
    return Functions(lambda key: init(key)[0], loss_stateless, eval_stateless)


def _average(loss: Loss, outputs: Any, batch: Batch) -> tuple[Mean, dict[str, Mean]]:
    values, metrics = loss(outputs, batch)
    for name, each in {"loss": values, **metrics}.items():
        if jnp.ndim(each) == 0:
            raise ValueError(
                f"The loss passed to an adapter gives one value per example or token, but {name!r} is a scalar; "
                "return the values before averaging, so that padding rows can be left out."
            )
    mask = batch.get(MASK)
    return masked_mean(values, mask), {name: masked_mean(each, mask) for name, each in metrics.items()}


def _switches(accepted: Mapping[str, Any], batch: Batch, train: bool) -> dict[str, Any]:
    """Return `train` and `mask` for a module that takes them; in a batch of padding only, every row counts.

    Statistics over no rows would be NaN, and a NaN activation makes NaN gradients even where the loss is masked out.
    """
    mask = batch[MASK] > 0 if MASK in batch else None
    switches = {"train": train, "mask": None if mask is None else mask | ~mask.any()}
    return {name: value for name, value in switches.items() if name in accepted}


def _keep_if_empty(batch: Batch, new_state: PyTree, old_state: PyTree) -> PyTree:
    """Return `new_state`, or `old_state` where the batch holds padding only: it has nothing to teach."""
    if MASK not in batch:
        return new_state
    any_true = (batch[MASK] > 0).any()
    return jax.tree.map(lambda new, old: jnp.where(any_true, new, old), new_state, old_state)


def _input_fields(inputs: str | Sequence[str], example_batch: Mapping[str, Any]) -> tuple[str, ...]:
    fields = (inputs,) if isinstance(inputs, str) else tuple(inputs)
    missing = [name for name in fields if name not in example_batch]
    if missing:
        raise ValueError(
            f"The model's inputs must be fields of the batch, but {missing} are not in {sorted(example_batch)}; "
            "pass inputs=<field or fields>."
        )
    return fields


def _check_call(module_type: type, accepted: Mapping[str, Any], *, required: str) -> None:
    reason = {
        "train": "is called with train=True or train=False, which turns dropout and batch statistics on and off",
        "mask": "has batch statistics, which must leave padding rows out: hand the mask to its normalisation layers",
    }
    if required not in accepted:
        raise ValueError(
            f"{module_type.__name__}.__call__ takes {list(accepted)[1:]}, but the module {reason[required]}; "
            f"add a parameter named {required!r}."
        )


def _split(module: flax_nnx.Module) -> tuple[Any, flax_nnx.State, flax_nnx.State, flax_nnx.State]:
    """Return the module's graph, params, random state and everything else."""
    graph, *states = flax_nnx.split(module, flax_nnx.Param, flax_nnx.RngState, ...)
    params, random_state, rest = states
    return graph, params, random_state, rest


def _unboxed(params: PyTree) -> PyTree:
    """Return the arrays without the boxes that name their dims.

    Flax's own unboxing would lay an array out over the mesh axes of those names, which is the layout's business.
    """

    def is_box(node: Any) -> bool:
        return isinstance(node, flax_linen.meta.AxisMetadata)

    return jax.tree.map(lambda node: jax.tree.leaves(node)[0] if is_box(node) else node, params, is_leaf=is_box)


def _without_mesh(make_module: Callable[[flax_nnx.Rngs], flax_nnx.Module]) -> Callable[..., flax_nnx.Module]:
    """Return `make_module` for modules that name the dims of their params: Flax would look for a mesh at once."""

    def make(rngs: flax_nnx.Rngs) -> flax_nnx.Module:
        with flax_nnx.use_eager_sharding(False):
            return make_module(rngs)

    return make


def _to_tree(state: flax_nnx.State, template: Mapping[tuple, Any]) -> dict[str, Any]:
    """Return the arrays at the template's paths as nested dicts with string keys; drop what else the call has left.

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
    flat = traverse_util.flatten_dict(_unboxed(tree))
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
