"""Whatever an experiment calls its model: which adapter takes it, and what no adapter takes."""

import functools
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from flax import linen as flax_linen
from flax import nnx as flax_nnx

from jaxdist import errors
from jaxdist.adapters.functions import Functions, Loss
from jaxdist.adapters.initial_shapes import InitialShapes
from jaxdist.adapters.linen_modules import linen
from jaxdist.adapters.nnx_modules import nnx
from jaxdist.errors import ConfigError
from jaxdist.spmd import precision as precisions
from jaxdist.spmd.precision import Precision


def from_model(
    model: Any,
    loss: Loss | None,
    example_batch: Mapping[str, Any],
    *,
    inputs: str | Sequence[str] = "image",
    precision: Precision = "float32",
    is_checked: bool = False,
    initial: InitialShapes | None = None,
) -> Functions:
    """Return the functions of whatever an experiment calls its model.

    Args:
      model: a Linen module, a callable from `nnx.Rngs` to an NNX module, or Functions.
      loss: see `Loss`; Functions have their own.
      example_batch: see `linen`.
      inputs: see `linen`; of Functions, the fields that are cast to the compute dtype.
      precision: the compute dtype.
      is_checked: whether it has been trained with these settings before, so that a module is not tried again.
      initial: finds the shapes of new params and model_state, of a Linen module; by default this process traces it.

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
        return linen(
            model, loss, example_batch, inputs=inputs, precision=precision, is_checked=is_checked, initial=initial
        )
    if callable(model):
        return nnx(model, loss, example_batch, inputs=inputs, precision=precision, is_checked=is_checked)
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
    if isinstance(model, Functions):
        _check_called(model)
    if not (isinstance(model, flax_linen.Module | Functions) or callable(model)):
        raise ConfigError(
            "Experiment.model takes a Linen module, a callable from nnx.Rngs to an NNX module, or adapters.Functions; "
            f"got an object of the class {kind}."
        )


_CALLS = {
    "init_fn": "key",
    "loss_fn": "params, batch, key[, model_state]",
    "eval_fn": "params, batch, key[, model_state]",
    "predict_fn": "params, batch[, model_state]",
}
"""How the functions of a model are called, those with a state with one argument more."""


def _check_called(functions: Functions) -> None:
    """Raise ConfigError where a function cannot be called with the arguments it gets."""
    for name, called in _CALLS.items():
        function, plain = getattr(functions, name), called.partition("[")[0].split(", ")
        if function is None:
            continue
        counts = {len(plain), len(plain) + called.count("[")}
        try:
            signature = inspect.signature(function)
        except (TypeError, ValueError):  # native code may have none
            continue
        if not any(_takes(signature, count) for count in counts):
            raise ConfigError(
                f"{name} of adapters.Functions is called as {name}({called}); {errors.named(function)} takes "
                f"{signature}. Change its parameters."
            )


def _takes(signature: inspect.Signature, count: int) -> bool:
    try:
        signature.bind(*range(count))
    except TypeError:
        return False
    return True
