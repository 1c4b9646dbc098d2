"""Turns what users give as examples into a Source."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxdist import errors
from jaxdist.data import ArraySource, MapSource, Source
from jaxdist.data.sources.source import plain_array
from jaxdist.data.streams import equivalents
from jaxdist.errors import ConfigError
from jaxdist.setting_group import show

PAIR = ("image", "label")
"""The fields of a pair of arrays `(x, y)`: the names that `Experiment.inputs` and the losses expect by default."""

CALLED_WITH = {
    "example_fn": ("example", "random"),
    "eval_example_fn": ("example", "random"),
    "batch_fn": ("batch", "random", "rows"),
}
"""The settings of `Data` that are functions, and their arguments, which are passed by position."""


def check_call(function: Any, setting: str, arguments: Sequence[str]) -> None:
    """Raise ConfigError where a function does not take the arguments that it will be called with."""
    if not callable(function):
        return  # None, or what the check of its type refuses
    try:
        inspect.signature(function).bind(*arguments)
    except TypeError as error:
        raise ConfigError(
            f"{setting} is called with ({', '.join(arguments)}), and {errors.named(function)} cannot be: {error}. "
            "Change its parameters."
        ) from error
    except ValueError:
        return  # what is written in C may not say what it takes


def as_source(examples: Any, setting: str) -> Source:
    """Return `examples` as a Source; see `Data` for what may be given.

    Raises:
      ConfigError: these are not examples; the message names `setting` and what to write.
    """
    if isinstance(examples, Source):
        return examples
    if (sentence := equivalents.equivalent(examples)) is not None:
        raise ConfigError(f"{setting} cannot be used: {sentence}")
    try:
        arrays = _arrays(examples)
        return ArraySource(arrays) if arrays is not None else MapSource(examples)
    except ConfigError:
        raise
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{setting} cannot be used: {error}") from error


def as_sources(examples: Any, setting: str) -> Source | dict[str, Source]:
    """Return the held-out examples as a Source, or several sets of them, given in a dict, as Sources by name.

    Raises:
      ConfigError: these are no examples, or a name cannot be part of a metric's.
    """
    if not _are_sets(examples):
        return as_source(examples, setting)
    for name in examples:
        if name in ("train", "eval"):
            raise ConfigError(
                f"A set in {setting} has a name of its own: `jaxdist eval --data {name}` is something else. Rename it."
            )
        if not isinstance(name, str) or not name or "/" in name:
            raise ConfigError(f"A set in {setting} has a name without a slash, such as 'day'; got {name!r}. Rename it.")
    return {name: as_source(each, f"{setting}[{name!r}]") for name, each in examples.items()}


def named_sources(examples: Source | Mapping[str, Source] | None) -> dict[str, Source]:
    """Return the sets of examples by name; one that is alone has the name ''."""
    if examples is None:
        return {}
    return dict(examples) if isinstance(examples, Mapping) else {"": examples}


def setting_of_set(name: str) -> str:
    """Return what messages call a set of held-out examples: data.eval['night'], or data.eval for one alone."""
    return f"data.eval[{name!r}]" if name else "data.eval"


def _are_sets(examples: Any) -> bool:
    """Return whether a dict holds sets of examples, and not the arrays of one set."""
    if not isinstance(examples, Mapping) or not examples:
        return False

    def is_set(value: Any) -> bool:
        return isinstance(value, Source | Mapping | tuple) or hasattr(value, "columns")

    return any(map(is_set, examples.values()))


def _check_names(names: Sequence[Any]) -> None:
    """Raise ConfigError where two fields or columns would have the same name."""
    twice = sorted({str(name) for name in names if [*map(str, names)].count(str(name)) > 1})
    if twice:
        raise ConfigError(f"Each field has a name of its own, and {twice[0]!r} comes twice. Rename one.")


def _arrays(examples: Any) -> dict[str, np.ndarray] | None:
    """Return named arrays as a dict; None where something else was given."""
    if isinstance(examples, Mapping) or (hasattr(examples, "columns") and hasattr(examples, "to_numpy")):
        _check_names(list(examples))
    if isinstance(examples, Mapping):
        return {str(name): plain_array(str(name), values) for name, values in examples.items()}
    if hasattr(examples, "columns") and hasattr(examples, "to_numpy"):  # a DataFrame of pandas or polars
        return {str(name): np.asarray(examples[name].to_numpy()) for name in examples.columns}
    if isinstance(examples, tuple) and len(examples) == len(PAIR) and all(hasattr(part, "shape") for part in examples):
        return {name: plain_array(name, values) for name, values in zip(PAIR, examples, strict=True)}
    if isinstance(examples, str | bytes | tuple) or hasattr(examples, "shape") or not hasattr(examples, "__len__"):
        raise ConfigError(
            f"Examples are a Source, a dict of arrays, a DataFrame or a pair of arrays (x, y); got {show(examples)}. "
            'Write, for example, Data(train={"image": images, "label": labels}).'
        )
    return None
