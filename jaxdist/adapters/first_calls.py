"""The first call of a user's functions: what a loss returns is checked, and what a call raises is explained."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdist import errors
from jaxdist.adapters.functions import Loss, Values
from jaxdist.errors import ConfigError
from jaxdist.setting_group import show
from jaxdist.spmd.metrics import Batch, Mean, Weighted, check_rows_left_out, unshared


@contextlib.contextmanager
def first_call(rule: str, name: str) -> Iterator[None]:
    """Turn what a call of a user's function raises at once into a ConfigError that says how it is called."""
    try:
        yield
    except Exception as error:
        if errors.place_of(error) or isinstance(error, ValueError):
            raise
        said = " ".join(str(error).split())
        raise ConfigError(f"{rule}. Called so, {name} raises {type(error).__name__}: {said}") from error


def checked_loss(loss: Loss, outputs: Any, batch: Batch) -> tuple[Values, dict[str, Values]]:
    """Call a loss for the first time, and check that it returns what it should.

    Raises:
      ConfigError: it does not; the message names the loss and its place.
    """
    name = errors.named(loss)
    kind = _kind(outputs)
    rule = f"A loss is called as loss(outputs, batch): with what the model returns, here {kind}, and a dict of fields"
    try:
        with first_call(rule, name):
            result = loss(*unshared((outputs, batch)))
    except KeyError as error:
        if error.args[:1] and error.args[0] in batch:
            raise
        fields = ", ".join(sorted(batch))
        raise ConfigError(f"{name} fails with KeyError: {error}. The fields of the batch are: {fields}.") from error
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
