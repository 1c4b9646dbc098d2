"""Flax modules, Linen or NNX, as the plain functions that a training step takes.

The one idea: a module is turned into functions of (params, batch, key, model_state) once, at the rim, and everything
behind it sees pytrees of arrays only. No other module outside `jaxdist.models` imports Flax.

A module is called as `module(*inputs, train=bool)`, where the inputs are batch fields. One that also takes `mask` gets
the batch's mask as booleans of shape (B,), or None, so that batch normalisation can leave padding rows out. One that
takes `segment_ids` gets the field of that name, which packed rows have, so that attention keeps their examples apart.

Every module is traced once when its functions are made, at two batch sizes: what can be known to be wrong is refused
there.
"""

import contextlib
import functools
import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from flax import errors as flax_errors
from flax import linen as flax_linen
from flax import nnx as flax_nnx
from flax import serialization, traverse_util

from jaxdist import errors
from jaxdist.errors import ConfigError
from jaxdist.setting_group import show
from jaxdist.spmd import precision as precisions
from jaxdist.spmd.dependence import depends
from jaxdist.spmd.layout import path_name
from jaxdist.spmd.metrics import (
    MASK,
    SEGMENT_IDS,
    Batch,
    Mean,
    Weighted,
    check_names,
    check_rows_left_out,
    masked_mean,
)
from jaxdist.spmd.precision import Precision

PyTree: TypeAlias = Any

Values: TypeAlias = jax.Array | Weighted | Mean
"""Per example (B,) or per token (B, T), not averaged; with weights; or a mean whose count the loss knows itself."""

Loss: TypeAlias = Callable[[Any, Batch], tuple[Values, dict[str, Values]]]
"""`loss(outputs, batch) -> (values, {name: values})`."""


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
    predict_fn(params, batch[, model_state]) -> outputs, a row for each example; None where it is not given.
    loss is a Mean over the true examples (or tokens) of the batch, metrics a flat dict of such.
    """

    init_fn: Callable[..., Any]
    loss_fn: Callable[..., Any]
    eval_fn: Callable[..., Any]
    predict_fn: Callable[..., Any] | None = None


def from_model(
    model: Any,
    loss: Loss | None,
    example_batch: Mapping[str, Any],
    *,
    inputs: str | Sequence[str] = "image",
    precision: Precision = "float32",
) -> Functions:
    """Return the functions of whatever an experiment calls its model.

    Args:
      model: a Linen module, a callable from `nnx.Rngs` to an NNX module, or Functions.
      loss: see `Loss`; Functions have their own.
      example_batch: see `linen`.
      inputs: see `linen`; of Functions, the fields that are cast to the compute dtype.
      precision: the compute dtype.

    Raises:
      ValueError: the model is none of these, or its loss is missing.
    """
    if isinstance(model, Functions):
        fields = (inputs,) if isinstance(inputs, str) else tuple(inputs)
        cast = functools.partial(precisions.apply_precision, precision=precision, inputs=fields)
        return model._replace(loss_fn=cast(model.loss_fn), eval_fn=cast(model.eval_fn))
    if loss is None:
        raise ValueError("A Flax module needs a loss(outputs, batch); `jaxdist.losses` has the usual ones.")
    if isinstance(model, flax_linen.Module):
        return linen(model, loss, example_batch, inputs=inputs, precision=precision)
    if callable(model):
        return nnx(model, loss, example_batch, inputs=inputs, precision=precision)
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
    if isinstance(model, Functions) and not all(map(callable, model[:3])):
        raise ConfigError(f"adapters.Functions needs three functions, init_fn, loss_fn and eval_fn; got {model[:3]}.")
    if not (isinstance(model, flax_linen.Module | Functions) or callable(model)):
        raise ConfigError(
            "Experiment.model takes a Linen module, a callable from nnx.Rngs to an NNX module, or adapters.Functions; "
            f"got an object of the class {kind}."
        )


def linen(
    module: flax_linen.Module,
    loss: Loss,
    example_batch: Mapping[str, Any],
    *,
    inputs: str | Sequence[str] = "image",
    precision: Precision = "float32",
) -> Functions:
    """Return the functions of a Linen module.

    Every collection but `params` is model_state: a dict from the collection's name to its variables. Each random stream
    that the module draws from (`dropout` and others) has a key of its own, made of the key given to loss_fn.

    Args:
      module: called as `module(*inputs, train=bool)`, and with `mask=` if it takes one.
      loss: see `Loss`; `jaxdist.losses` has the usual ones.
      example_batch: arrays or jax.ShapeDtypeStructs with the shapes of a batch; only shapes and dtypes are used.
      inputs: the batch field, or fields in order, that the module is called with.
      precision: the dtype that the module computes in; params, statistics and the loss are float32 always.

    Raises:
      ValueError: a field is missing; the module does not take `train`, or has statistics of the batch and takes no
        `mask`, or takes no `segment_ids` of packed rows; or the loss does not give values of examples or tokens.
    """
    fields = _input_fields(inputs, example_batch)
    accepted = inspect.signature(type(module).__call__).parameters
    _check_call(type(module), accepted, fields, example_batch, required="train")

    def init(key: jax.Array) -> tuple[PyTree, PyTree]:
        rows = [jnp.zeros((1, *example_batch[name].shape[1:]), example_batch[name].dtype) for name in fields]
        variables = module.init(key, *rows, train=False)
        model_state = {name: variables[name] for name in variables if name != "params"}
        return variables.get("params", {}), model_state

    with _first_call(f"A module is called with its inputs, here {', '.join(fields)}, and train", type(module).__name__):
        shapes = jax.eval_shape(init, jax.random.key(0))
    collections = sorted(shapes[1])
    streams: list[str] = []

    def forward(
        params: PyTree, model_state: PyTree, batch: Batch, key: jax.Array, *, train: bool
    ) -> tuple[Any, PyTree]:
        outputs, new_state = module.apply(
            {"params": unboxed(params), **(model_state or {})},
            *(batch[name] for name in fields),
            rngs=_stream_keys(streams, key) if train else {},
            mutable=collections if train else [],
            **_switches(accepted, batch, train),
        )
        return outputs, new_state

    forward = _in_precision(forward, precision)
    _find_streams(streams, forward, shapes, example_batch)
    _check_model(type(module), accepted, forward, loss, shapes, example_batch)
    return _functions(init, forward, loss, stateful=bool(collections))


def _stream_keys(streams: Sequence[str], key: jax.Array) -> dict[str, jax.Array]:
    """Return a key for each random stream. The first one has the step's key itself."""
    return {name: jax.random.fold_in(key, index) if index else key for index, name in enumerate(streams)}


def _find_streams(
    streams: list[str], forward: _Forward, shapes: tuple[PyTree, PyTree], example_batch: Mapping[str, Any]
) -> None:
    """Fill `streams` with the names of the random streams that a Linen module draws from in training.

    With no stream given, Linen raises an error that names the one it asked for. Given the stream `params` alone, it
    would draw from that in place of every other, and lifted transformations (`nn.scan`, `nn.vmap`, `nn.RNN`), which
    split streams by name, would not find the one they are to split: every time step would drop the same features.
    """
    while True:
        looked_for: list[str] = []
        try:
            with _noting_has_rng(looked_for):
                jax.eval_shape(functools.partial(forward, train=True), *shapes, dict(example_batch), jax.random.key(0))
        except flax_errors.InvalidRngError as error:
            asked = re.search(r'PRNG for "([^"]+)"', str(error))
            if asked is None or asked[1] in streams:
                raise
            streams.append(asked[1])
            continue
        # A module that draws only where it finds a stream raises nothing, and would never draw.
        missing = [name for name in dict.fromkeys(looked_for) if name not in (*streams, "params")]
        if not missing:
            return
        streams += missing


@contextlib.contextmanager
def _noting_has_rng(names: list[str]) -> Iterator[None]:
    """Append the streams that Linen modules look for with `has_rng` to `names` while the context lasts."""
    has_rng = flax_linen.Module.has_rng

    def noting(module: flax_linen.Module, name: str) -> bool:
        names.append(name)
        return has_rng(module, name)

    with mock.patch.object(flax_linen.Module, "has_rng", noting):
        yield


def nnx(
    make_module: Callable[[flax_nnx.Rngs], flax_nnx.Module],
    loss: Loss,
    example_batch: Mapping[str, Any],
    *,
    inputs: str | Sequence[str] = "image",
    precision: Precision = "float32",
) -> Functions:
    """Return the functions of an NNX module.

    params and model_state are plain nested dicts keyed by the module's attribute names. `nnx.Param`s are params, all
    other variables model_state, except random state: that is created from the key given to loss_fn in each call, so
    that a step remains a function of its arguments and a checkpoint needs no hidden counters.

    Args:
      make_module: `make_module(rngs)` builds the module. It is called as `module(*inputs)`, with `train=` and `mask=`
        if it takes them, after `module.train()` or `module.eval()`.
      loss: see `Loss`; `jaxdist.losses` has the usual ones.
      example_batch: arrays or jax.ShapeDtypeStructs with the shapes of a batch; only its field names are used.
      inputs: the batch field, or fields in order, that the module is called with.
      precision: see `linen`.

    Raises:
      ValueError: see `linen`; but `train` need not be taken.
    """
    fields = _input_fields(inputs, example_batch)
    rule, name = (
        "A model that is no Linen module is a callable from nnx.Rngs to an NNX module",
        errors.named(make_module),
    )
    make_module = _without_mesh(make_module)
    with _first_call(rule, name):
        abstract = flax_nnx.eval_shape(lambda: make_module(flax_nnx.Rngs(0)))
    if not isinstance(abstract, flax_nnx.Module):
        raise ConfigError(f"{rule}; {name} returns an object of the class {type(abstract).__name__}.")
    if not callable(abstract):
        raise ConfigError(f"A module is called with its inputs; {type(abstract).__name__} has no __call__. Add it.")
    graph, *templates = _split(abstract)
    param_template, random_template, state_template = (dict(flax_nnx.to_flat_state(part)) for part in templates)
    accepted = inspect.signature(type(abstract).__call__).parameters
    _check_call(type(abstract), accepted, fields, example_batch)

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

    forward = _in_precision(forward, precision)
    shapes = jax.eval_shape(init, jax.random.key(0))
    _check_model(type(abstract), accepted, forward, loss, shapes, example_batch)
    return _functions(init, forward, loss, stateful=bool(state_template))


def _in_precision(forward: _Forward, precision: Precision) -> _Forward:
    """Return `forward` computed in `precision`; outputs come back in float32, and statistics keep their dtypes."""
    if precision == "float32":
        return forward
    dtype = jnp.dtype(precision)

    def narrow(params: PyTree, model_state: PyTree, batch: Batch, key: jax.Array, *, train: bool) -> tuple[Any, PyTree]:
        fields = {
            name: field if name == MASK else precisions.cast_floating(field, dtype) for name, field in batch.items()
        }
        params = precisions.cast_floating(params, dtype)
        outputs, new_state = forward(params, model_state, fields, key, train=train)
        outputs = precisions.cast_floating(outputs, jnp.float32)
        return outputs, precisions.with_dtypes_of(model_state or {}, new_state)

    return narrow


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

    def predict(params: PyTree, batch: Batch, model_state: PyTree = None) -> Any:
        return forward(params, model_state, batch, jax.random.key(0), train=False)[0]

    if stateful:
        return Functions(init, loss_stateful, eval_stateful, predict)
    return Functions(lambda key: init(key)[0], loss_stateless, eval_stateless, predict)


def _average(loss: Loss, outputs: Any, batch: Batch) -> tuple[Mean, dict[str, Mean]]:
    values, metrics = loss(outputs, batch)
    mask = batch.get(MASK)

    def average(name: str, each: Values) -> Mean:
        _refuse_scalar(name, each)
        return each if isinstance(each, Mean) else masked_mean(each, _mask_of(_shape(each), mask))

    return average("loss", values), {name: average(name, each) for name, each in metrics.items()}


def _mask_of(shape: tuple[int, ...], mask: jax.Array | None) -> jax.Array | None:
    """Return the batch's mask for values of this shape: that of its rows, where its elements are of another shape."""
    if mask is None or mask.shape == shape[: mask.ndim]:
        return mask
    return mask.reshape(mask.shape[0], -1).max(axis=1)


def _refuse_scalar(name: str, values: Values) -> None:
    if not isinstance(values, Mean) and not _shape(values):
        raise ValueError(
            f"The loss passed to an adapter gives one value per example or token, but {name!r} is a scalar; "
            "return the values before averaging, so that padding rows can be left out."
        )


def _switches(accepted: Mapping[str, Any], batch: Batch, train: bool) -> dict[str, Any]:
    """Return `train`, `mask` and `segment_ids` for a module that takes them; in a batch of padding, every row counts.

    Statistics over no rows would be NaN, and a NaN activation makes NaN gradients even where the loss is masked out.
    """
    mask = _mask_of(batch[MASK].shape[:1], batch[MASK]) if MASK in batch else None
    mask = None if mask is None else mask > 0
    switches = {"train": train, "mask": None if mask is None else mask | ~mask.any()}
    switches |= {SEGMENT_IDS: batch[SEGMENT_IDS]} if SEGMENT_IDS in batch else {}
    return {name: value for name, value in switches.items() if name in accepted}


def _check_model(
    module_type: type,
    accepted: Mapping[str, Any],
    forward: _Forward,
    loss: Loss,
    shapes: tuple[PyTree, PyTree],
    example_batch: Mapping[str, Any],
) -> None:
    """Raise ValueError for what tracing shows to be wrong with a module and its loss; nothing is computed."""
    args = (*shapes, dict(example_batch), jax.random.key(0))
    _check_same_leaves(module_type, shapes[1], jax.eval_shape(functools.partial(forward, train=True), *args)[1])
    if shapes[1] and "mask" not in accepted:
        _check_statistics(module_type, forward, shapes, example_batch)
    size = _num_rows(example_batch)
    outputs, values = _trace(forward, loss, shapes, _resized(example_batch, size))
    _check_outputs(module_type, outputs)
    check_names(values[1])
    twice = None
    with contextlib.suppress(TypeError, ValueError):  # a module that is made for one batch size
        twice = _trace(forward, loss, shapes, _resized(example_batch, 2 * size))[1]
    try:
        for name, each in {"loss": values[0], **values[1]}.items():
            _refuse_scalar(name, each)
        if twice is not None:
            _check_values(values, twice, size)
    except ValueError as error:
        raise ConfigError(f"{error} The loss is {errors.named(loss)}.") from error


def _trace(
    forward: _Forward, loss: Loss, shapes: tuple[PyTree, PyTree], batch: Mapping[str, Any]
) -> tuple[Any, tuple[Values, dict[str, Values]]]:
    """Return the shapes of the module's outputs and of what the loss makes of them."""

    def run(params: PyTree, model_state: PyTree, batch: Batch, key: jax.Array) -> tuple[Any, Any]:
        outputs, _ = forward(params, model_state, batch, key, train=True)
        return outputs, _checked_loss(loss, outputs, batch)

    return jax.eval_shape(run, *shapes, dict(batch), jax.random.key(0))


@contextlib.contextmanager
def _first_call(rule: str, name: str) -> Iterator[None]:
    """Turn what a call of a user's function raises at once into a ConfigError that says how it is called."""
    try:
        yield
    except Exception as error:
        if errors.place_of(error) or isinstance(error, ValueError):
            raise
        said = " ".join(str(error).split())
        raise ConfigError(f"{rule}. Called so, {name} raises {type(error).__name__}: {said}") from error


def _checked_loss(loss: Loss, outputs: Any, batch: Batch) -> tuple[Values, dict[str, Values]]:
    """Call a loss for the first time, and check that it returns what it should.

    Raises:
      ConfigError: it does not; the message names the loss and its place.
    """
    name = errors.named(loss)
    kind = _kind(outputs)
    rule = f"A loss is called as loss(outputs, batch): with what the model returns, here {kind}, and a dict of fields"
    with _first_call(rule, name):
        result = loss(outputs, batch)
    if not isinstance(result, tuple) or len(result) != 2 or not isinstance(result[1], Mapping):
        kinds = ", ".join(map(_kind, result)) if type(result) is tuple else _kind(result)
        raise ConfigError(
            "A loss returns (values, metrics), where metrics is a dict such as {'accuracy': correct}, or {} for none; "
            f"{name} returns {kinds}. Change its return statement."
        )
    for metric in result[1]:
        if not isinstance(metric, str) or not metric:
            raise ConfigError(f"The names of metrics are strings; {name} returns one named {metric!r}. Rename it.")
    for metric, values in {"loss": result[0], **result[1]}.items():
        _check_numbers(name, metric, values)
    _check_means(loss, outputs, batch, result)
    return result


def _check_means(loss: Loss, outputs: Any, batch: Batch, result: tuple[Values, dict[str, Values]]) -> None:
    """Raise ConfigError where a Mean, whose count the loss knows itself, counts rows of padding."""
    means = {name: each for name, each in {"loss": result[0], **result[1]}.items() if isinstance(each, Mean)}

    def of_fields(_: Any, fields: Mapping[str, Any]) -> Any:
        return loss(fields[_OUTPUTS], {name: field for name, field in fields.items() if name != _OUTPUTS})

    try:
        check_rows_left_out(means, of_fields, ((), {**batch, _OUTPUTS: outputs}))
    except ValueError as error:
        raise ConfigError(f"{error} The loss is {errors.named(loss)}.") from error


_OUTPUTS = "the model's outputs"


def _kind(value: Any) -> str:
    return "an array" if isinstance(value, jax.Array) else show(value)


def _check_numbers(loss: str, name: str, values: Any) -> None:
    """Raise ConfigError unless the values of a loss or metric are numbers of a kind that has a mean."""
    leaves = jax.tree.leaves(values)
    kinds = jax.Array | np.ndarray | np.generic | int | float
    is_tree = isinstance(values, Mapping | tuple | list) and not isinstance(values, Weighted | Mean)
    if is_tree or not leaves or not all(isinstance(leaf, kinds) for leaf in leaves):
        raise ConfigError(
            f"A loss and its metrics are arrays with one value per example or token; {name!r} of {loss} is "
            f"{show(values)}. Return an array."
        )
    dtype = jnp.result_type(leaves[0])
    if jnp.issubdtype(dtype, jnp.complexfloating) or (name == "loss" and not jnp.issubdtype(dtype, jnp.floating)):
        raise ConfigError(
            f"The values of a loss are real floating numbers, and those of a metric real numbers; {name!r} of {loss} "
            f"is {dtype}. Return real numbers through which gradients flow."
        )


def _num_rows(batch: Mapping[str, Any]) -> int:
    return next(iter(batch.values())).shape[0]


def _resized(batch: Mapping[str, Any], rows: int) -> dict[str, jax.ShapeDtypeStruct]:
    # The dtype that the field has on the devices: 64-bit integers arrive there with 32.
    return {
        name: jax.ShapeDtypeStruct((rows, *leaf.shape[1:]), jax.dtypes.canonicalize_dtype(leaf.dtype))
        for name, leaf in batch.items()
    }


def _check_outputs(module_type: type, outputs: Any) -> None:
    dtypes = sorted({str(leaf.dtype) for leaf in jax.tree.leaves(outputs)})
    if not any(jnp.issubdtype(dtype, jnp.inexact) for dtype in map(np.dtype, dtypes)):
        raise ValueError(
            f"{module_type.__name__} returns {', '.join(dtypes) or 'nothing'}, through which no gradient flows; return "
            "floating outputs, for example logits in place of class indices."
        )


def _check_values(once: tuple[Values, dict[str, Values]], twice: tuple[Values, dict[str, Values]], size: int) -> None:
    """Check that the first dim of each value is examples, and that no other dim follows the number of examples."""
    for name, each in {"loss": once[0], **once[1]}.items():
        other = {"loss": twice[0], **twice[1]}[name]
        if isinstance(each, Mean):
            continue
        before, after = (_shape(value) for value in (each, other))
        follows = [dim for dim, lengths in enumerate(zip(before, after, strict=True)) if lengths[0] != lengths[1]]
        if before and follows != [0]:
            which = " and ".join(f"dim {dim}" for dim in follows) or "no dim"
            raise ValueError(
                f"The values of a loss are per example (B,) or per token (B, T), but {name!r} has shape {before} for "
                f"{size} examples, and {which} of it follows the number of examples. Two shapes such as (B, 1) and "
                "(B,) broadcast to (B, B): give outputs and target the same shape."
            )


def _shape(values: Any) -> tuple[int, ...]:
    return (values.values if isinstance(values, Weighted) else values).shape


def _check_same_leaves(module_type: type, old: PyTree, new: PyTree) -> None:
    names = [
        {path_name(path): (tuple(leaf.shape), leaf.dtype) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
        for tree in (old or {}, new or {})
    ]
    differing = sorted(name for name in {**names[0], **names[1]} if names[0].get(name) != names[1].get(name))
    if differing:
        raise ValueError(
            "The variables of a module besides its params must keep their names, shapes and dtypes from step to step; "
            f"{differing[0]} of {module_type.__name__} does not. A value that `sow` collects belongs in the collection "
            "'intermediates', which training leaves out; a value that the loss needs must be returned by __call__."
        )


def _check_statistics(
    module_type: type, forward: _Forward, shapes: tuple[PyTree, PyTree], example_batch: Mapping[str, Any]
) -> None:
    """Check that no variable of a module without `mask` depends on the rows of the batch, padding among them."""
    batch = {name: leaf for name, leaf in example_batch.items() if name != MASK}
    args = (*shapes, batch, jax.random.key(0))
    marked: list[Any] = [jax.tree.map(lambda _: False, arg) for arg in args]
    marked[2] = jax.tree.map(lambda _: True, batch)
    dependent = depends(lambda *args: forward(*args, train=True)[1], args, marked)
    names = [path_name(path) for path, found in jax.tree_util.tree_leaves_with_path(dependent) if found]
    if names:
        raise ValueError(
            f"{module_type.__name__} keeps statistics of the batch, {names[0]}, which must leave padding rows out: "
            "add a parameter named 'mask' to its __call__ and hand it to its normalisation layers."
        )


def _keep_if_empty(batch: Batch, new_state: PyTree, old_state: PyTree) -> PyTree:
    """Return `new_state`, or `old_state` where the batch holds padding only: there is nothing to learn from."""
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


def _check_call(
    module_type: type,
    accepted: Mapping[str, Any],
    fields: Sequence[str],
    example_batch: Mapping[str, Any],
    *,
    required: str | None = None,
) -> None:
    reasons = {
        "train": "is called with train=True or train=False, which turns dropout and batch statistics on and off",
        SEGMENT_IDS: "gets rows of several packed examples, which it must keep apart",
    }
    packed = SEGMENT_IDS in example_batch and SEGMENT_IDS not in fields
    for name in [*([required] if required else []), *([SEGMENT_IDS] if packed else [])]:
        if name not in accepted:
            raise ValueError(
                f"{module_type.__name__}.__call__ takes {list(accepted)[1:]}, but the module {reasons[name]}; "
                f"add a parameter named {name!r}."
            )


def _split(module: flax_nnx.Module) -> tuple[Any, flax_nnx.State, flax_nnx.State, flax_nnx.State]:
    """Return the module's graph, params, random state and everything else."""
    graph, *states = flax_nnx.split(module, flax_nnx.Param, flax_nnx.RngState, ...)
    params, random_state, rest = states
    return graph, params, random_state, rest


def unboxed(params: PyTree) -> PyTree:
    """Return the arrays without the boxes that name their dims.

    Flax's own unboxing would lay an array out over the mesh axes of those names, which the layout decides.
    """

    def is_box(node: Any) -> bool:
        return isinstance(node, flax_linen.meta.AxisMetadata)

    return jax.tree.map(lambda node: jax.tree.leaves(node)[0] if is_box(node) else node, params, is_leaf=is_box)


def from_msgpack(content: bytes, name: str) -> PyTree:
    """Return the tree that `flax.serialization.to_bytes` wrote; raise UserError if `content` is not such a tree."""
    try:
        return serialization.msgpack_restore(content)
    except Exception as error:  # of many kinds: its parser meets arbitrary bytes
        raise errors.UserError(
            f"{name} is no whole file of flax.serialization.to_bytes: {errors.describe(error)}. Write or copy it again."
        ) from error


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
