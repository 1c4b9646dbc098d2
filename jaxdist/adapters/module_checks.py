"""What can be known to be wrong with a module before it is trained: its call and its shapes show it."""

import contextlib
import functools
import inspect
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdist import errors
from jaxdist.adapters import first_calls
from jaxdist.adapters.flax_trees import unboxed
from jaxdist.adapters.functions import Forward, Loss, PyTree, Values, refuse_scalar, shape_of
from jaxdist.errors import ConfigError
from jaxdist.spmd.dependence import depends, marks
from jaxdist.spmd.layout import path_name
from jaxdist.spmd.metrics import MASK, SEGMENT_IDS, Batch, Mean, check_names


def input_fields(inputs: str | Sequence[str], example_batch: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names of a module's input fields; raise ValueError where the batch lacks one."""
    fields = (inputs,) if isinstance(inputs, str) else tuple(inputs)
    missing = [name for name in fields if name not in example_batch]
    if missing:
        raise ValueError(
            f"The model's inputs must be fields of the batch, but {missing} are not in {sorted(example_batch)}; "
            "pass inputs=<field or fields>."
        )
    return fields


def check_call(
    module_type: type,
    accepted: Mapping[str, inspect.Parameter],
    fields: Sequence[str],
    example_batch: Mapping[str, Any],
) -> None:
    """Raise ValueError where `__call__` lacks what the module is called with, or takes a switch that none sets."""
    name = f"{module_type.__name__}.__call__"
    if SEGMENT_IDS in example_batch and SEGMENT_IDS not in fields and SEGMENT_IDS not in accepted:
        taken = ", ".join(list(accepted)[1:]) or "nothing"
        raise ValueError(
            f"{name} takes {taken}, but the module gets rows of several packed examples, which it must keep apart; add "
            f"a parameter named {SEGMENT_IDS!r}."
        )
    unset = (
        [] if "train" in accepted else [each for each in accepted if each not in fields and _is_switch(accepted[each])]
    )
    if unset and _is_of_user(module_type):
        raise ValueError(
            f"{name} takes {', '.join(unset)}, which is not given: a module is called with its inputs and, where it "
            "names it, train, which is True in training and False in evaluation. Name this parameter train; for "
            "layers that ask for it, deterministic=not train."
        )


_SWITCH_NAMES = re.compile("train|determin|running_average|eval|infer")


def _is_switch(parameter: inspect.Parameter) -> bool:
    """Return whether a parameter, or one that it hides, may tell training from evaluation; None tells neither."""
    if parameter.kind is inspect.Parameter.VAR_KEYWORD:
        return True
    return bool(_SWITCH_NAMES.search(parameter.name)) and parameter.default is not None


def _is_of_user(module_type: type) -> bool:
    """Return whether a `__call__` is not Flax's own, whose layers raise where they are not told the mode."""
    return str(getattr(module_type.__call__, "__module__", "")).partition(".")[0] != "flax"


def check_begins_without_inputs(module_type: type, make: Any, row: Mapping[str, np.ndarray]) -> None:
    """Raise ConfigError where the first values of params depend on the inputs: `make(key, row) -> (params, state)`.

    There are none when a module is created.
    """
    marked = [False, dict.fromkeys(row, True)]
    dependent = depends(make, [jax.eval_shape(lambda: jax.random.key(0)), dict(row)], marked)[0]
    names = [path_name(path) for path, found in jax.tree_util.tree_leaves_with_path(dependent) if found]
    if names:
        raise ConfigError(
            f"{module_type.__name__} begins with params that depend on its inputs, such as {names[0]}, and no example "
            "is read when it is created: its inputs would be zeros. Let the params depend on the key alone, or give "
            "the model as adapters.Functions, whose init_fn may look at examples."
        )


def check_assigns_none(
    module_type: type, fixed_after: Any, fixed: PyTree, model_state: PyTree, example_batch: Mapping[str, Any]
) -> None:
    """Warn where a call assigns or makes params, or assigns constants, which holds for that call alone.

    `fixed` are both, or their shapes; `fixed_after(fixed, model_state, batch, key)` returns both by their paths after
    a call.
    """
    flat, structure = jax.tree_util.tree_flatten_with_path(unboxed(fixed))
    own = {path_name(path): _FIRST << index for index, (path, _) in enumerate(flat)}
    nothing = jax.tree.map(lambda _: 0, (model_state, dict(example_batch)))
    args = (
        jax.tree.unflatten(structure, [leaf for _, leaf in flat]),
        model_state,
        dict(example_batch),
        jax.random.key(0),
    )
    found = marks(fixed_after, args, [jax.tree.unflatten(structure, own.values()), *nothing, 0], _made_by)
    for name, mark in found.items():
        if mark != own.get(name) and not mark & _UNKNOWN:
            warnings.warn(
                f"{module_type.__name__}.__call__ {'assigns' if name in own else 'makes'} {name}, an nnx.Param or an "
                "array that is no variable. The optimizer alone changes params, so this holds for that call and is "
                "lost after it. What a call is to keep is another kind of nnx.Variable, such as nnx.BatchStat, that "
                "__init__ makes.",
                stacklevel=2,
            )
            return


_MADE, _UNKNOWN, _FIRST = 1, 2, 4


def _made_by(equation: Any, inputs: Sequence[int]) -> int:
    """Return the mark of what an equation computes; nothing is known of one with functions that are not looked into."""
    nested = any(hasattr(getattr(each, "jaxpr", each), "eqns") for each in jax.tree.leaves(equation.params))
    return _UNKNOWN if nested else _MADE


def check_module(
    module_type: type,
    accepted: Mapping[str, inspect.Parameter],
    forward: Forward,
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
            refuse_scalar(name, each)
        if twice is not None:
            _check_values(values, twice, size)
    except ValueError as error:
        raise ConfigError(f"{error} The loss is {errors.named(loss)}.") from error


def _trace(
    forward: Forward, loss: Loss, shapes: tuple[PyTree, PyTree], batch: Mapping[str, Any]
) -> tuple[Any, tuple[Values, dict[str, Values]]]:
    """Return the shapes of the module's outputs and of what the loss makes of them."""

    def run(params: PyTree, model_state: PyTree, batch: Batch, key: jax.Array) -> tuple[Any, Any]:
        outputs, _ = forward(params, model_state, batch, key, train=True)
        return outputs, first_calls.checked_loss(loss, outputs, batch)

    return jax.eval_shape(run, *shapes, dict(batch), jax.random.key(0))


def _resized(batch: Mapping[str, Any], rows: int) -> dict[str, jax.ShapeDtypeStruct]:
    # The dtype that the field has on the devices: 64-bit integers arrive there with 32.
    return {
        name: jax.ShapeDtypeStruct((rows, *leaf.shape[1:]), jax.dtypes.canonicalize_dtype(leaf.dtype))
        for name, leaf in batch.items()
    }


def _num_rows(batch: Mapping[str, Any]) -> int:
    return next(iter(batch.values())).shape[0]


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
        before, after = (shape_of(value) for value in (each, other))
        follows = [dim for dim, lengths in enumerate(zip(before, after, strict=True)) if lengths[0] != lengths[1]]
        if before and follows != [0]:
            which = " and ".join(f"dim {dim}" for dim in follows) or "no dim"
            raise ValueError(
                f"The values of a loss are per example (B,) or per token (B, T), but {name!r} has shape {before} for "
                f"{size} examples, and {which} of it follows the number of examples. Two shapes such as (B, 1) and "
                "(B,) broadcast to (B, B): give outputs and target the same shape."
            )


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
    module_type: type, forward: Forward, shapes: tuple[PyTree, PyTree], example_batch: Mapping[str, Any]
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
