"""Typed overrides of an experiment's settings: what the dataclasses declare can be set, by the type they declare.

An unknown name is an error that proposes the nearest one.
"""

import ast
import contextlib
import dataclasses
import typing
from collections.abc import Iterator, Sequence
from typing import Any

import pydantic
import pydantic_core

from jaxdist.config.experiment import Experiment
from jaxdist.errors import ConfigError
from jaxdist.setting_group import describe_kind, fits, nearest


def prepare() -> None:
    """Have pydantic look for its plugins, as it does once in a process, before others are forked from this one."""
    pydantic.TypeAdapter(int)


def override(experiment: Experiment, assignments: Sequence[str]) -> Experiment:
    """Return `experiment` with each `a.b=value` applied; values are parsed by the type the field declares.

    Raises:
      ConfigError: not an assignment, no such field (the nearest name is proposed), or a value of another type.
    """
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        if not equals or not path:
            raise ConfigError(f"--set takes NAME=VALUE, for example optimizer.learning_rate=3e-4; got {assignment!r}.")
        try:
            experiment = _replace(experiment, path.split("."), text, path)
        except _NoSuchSetting as missing:
            raise ConfigError(_explain(experiment, path, missing)) from None
    return experiment


def _replace(value: Any, names: list[str], text: str, path: str) -> Any:
    fields = _settable_fields(value)
    name = names[0]
    if name not in fields:
        raise _NoSuchSetting(value, name, fields)
    if len(names) == 1:
        new = _parse(typing.get_type_hints(type(value)).get(name, str), text, path, getattr(value, name))
    else:
        new = _replace(getattr(value, name), names[1:], text, path)
    try:
        return dataclasses.replace(value, **{name: new})
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{path}={text} is refused: {error}") from error


def _settable_fields(value: Any) -> list[str]:
    if not dataclasses.is_dataclass(value):
        return []
    names = [field.name for field in dataclasses.fields(value) if field.init]
    # Flax gives every Linen module the fields parent and name, which are not hyperparameters.
    return [name for name in names if name not in ("parent", "name")] if "parent" in names else names


class _NoSuchSetting(Exception):
    """A name that a group of settings does not have."""

    def __init__(self, owner: Any, name: str, fields: list[str]) -> None:
        super().__init__(owner, name, fields)
        self.owner, self.name, self.fields = type(owner).__name__, name, fields


def _explain(experiment: Experiment, path: str, missing: _NoSuchSetting) -> str:
    """Return why there is no setting `path`, and a proposal: the name in another group, or the nearest name here."""
    start = f"There is no setting {path!r}: {missing.owner}"
    if not missing.fields:
        return f"{start} has no settings of its own."
    elsewhere = [found for found in _all_paths(experiment) if found.rpartition(".")[2] == missing.name]
    proposal = f" Did you mean {elsewhere[0]!r}?" if elsewhere else nearest(missing.name, missing.fields)
    return f"{start} has no field {missing.name!r}.{proposal} It has: {', '.join(missing.fields)}."


def _all_paths(value: Any, prefix: str = "") -> Iterator[str]:
    for name in _settable_fields(value):
        yield prefix + name
        yield from _all_paths(getattr(value, name, None), f"{prefix}{name}.")


def _parse(hint: Any, text: str, path: str, current: Any) -> Any:
    as_text = hint is not Any and fits(hint, text)  # as init_from, which is a path or a group of settings
    if dataclasses.is_dataclass(current) and not isinstance(current, type) and not as_text:
        names = ", ".join(_settable_fields(current))
        raise ConfigError(f"{path} is a group of settings; set one of its fields: {names}.")
    if hint is Any:  # Says nothing; the value that is there may.
        hint = type(current)
    try:
        adapter = pydantic.TypeAdapter(hint, config=pydantic.ConfigDict(arbitrary_types_allowed=True))
    except (pydantic.errors.PydanticUserError, pydantic_core.SchemaError, TypeError) as error:
        raise ConfigError(f"{path} cannot be set on the command line; edit the experiment file.") from error
    for candidate in _readings(text):
        with contextlib.suppress(pydantic.ValidationError):
            return adapter.validate_python(candidate)
    raise ConfigError(f"{path} takes {describe_kind(hint)}; got {text!r}.")


def _readings(text: str) -> list[Any]:
    """Return what `text` may mean, most likely first: None, a Python tuple or dict, itself, words between commas."""
    readings: list[Any] = [None] if text.lower() in ("none", "null") else []
    with contextlib.suppress(ValueError, SyntaxError):
        literal = ast.literal_eval(text)
        # A field may take a string or a tuple of strings: brackets mean the tuple.
        return [*readings, literal, text] if isinstance(literal, (tuple, list, dict)) else [*readings, text, literal]
    words = [text.split(",")]
    return [*readings, *words, text] if "," in text else [*readings, text, *words]
