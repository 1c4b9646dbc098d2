"""Groups of settings: frozen dataclasses whose fields are checked against their declared types when one is made.

A wrong name is refused with the nearest right one, a value of the wrong kind with the kind that is expected. Numbers
are not converted, so that a setting is what the user wrote.
"""

import collections.abc
import dataclasses
import difflib
import functools
import inspect
import numbers
import types
import typing
from typing import Any, Literal

import numpy as np

from jaxdist.errors import ConfigError


@typing.dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(dataclasses.field,))
def setting_group(cls: type) -> Any:
    """Return `cls` as a frozen, keyword-only dataclass whose names and kinds of values are checked.

    A static method `accept(values) -> values` of the class sees them first, and may turn what users type into what is
    meant.
    """
    made: Any = dataclasses.dataclass(frozen=True, kw_only=True)(cls)
    fields = {field.name: field for field in dataclasses.fields(made)}
    required = [
        name
        for name, field in fields.items()
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    init = made.__init__
    accept = getattr(made, "accept", dict)

    @functools.wraps(init)
    def checked_init(self: Any, *positional: Any, **values: Any) -> None:
        if positional:
            raise ConfigError(
                f"{cls.__name__} takes its settings by name, as in {cls.__name__}({next(iter(fields))}=...)."
            )
        for name in values.keys() - fields.keys():
            raise ConfigError(f"{cls.__name__} has no setting {name!r}.{nearest(name, fields)}")
        values, hints = accept(values), typing.get_type_hints(made)
        values = {name: _as_declared(hints[name], value) for name, value in values.items()}
        missing = [name for name in required if name not in values]
        if missing:
            raise ConfigError(f"{cls.__name__} needs the required setting {missing[0]!r}. Give it one.")
        for name, value in values.items():
            if not fits(hints[name], value):
                raise ConfigError(f"{cls.__name__}.{name} takes {describe_kind(hints[name])}; got {show(value)}.")
        init(self, **values)

    made.__init__ = checked_init
    return made


def _as_declared(hint: Any, value: Any) -> Any:
    """Return a list as the tuple that is declared, and a number of NumPy as Python's, which JSON can hold."""
    if isinstance(value, np.generic) and value.dtype.kind in "biuf":
        return value.item()
    declared = {typing.get_origin(each) for each in (hint, *typing.get_args(hint))}
    return tuple(value) if isinstance(value, list) and tuple in declared and list not in declared else value


def nearest(name: str, known: collections.abc.Iterable[str]) -> str:
    """Return " Did you mean ...?" with the nearest known name; "" where none is near."""
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean {found[0]!r}?" if found else ""


def show(value: Any) -> str:
    """Return a value for a message: its kind where it is an object, shortened where it is long."""
    if inspect.isclass(value):
        return f"the class {value.__name__}"
    if inspect.ismodule(value):
        return f"the module {value.__name__}"
    if inspect.isroutine(value):
        return f"the function {getattr(value, '__name__', value)}"
    if not isinstance(value, str | numbers.Number | tuple | list | dict | None):
        return f"an object of the class {type(value).__name__}"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def whole_number(name: str, value: Any, *, least: int = 1) -> int:
    """Return a count that a user gave as `name`; ValueError where it is none: 2.0, "2" and True are none either."""
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} is a whole number of at least {least}; got {show(value)}.")
    return int(value)


def fits(hint: Any, value: Any) -> bool:
    """Return whether `value` is of the kind that a type hint declares."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(fits(each, value) for each in arguments)
    if origin is Literal:
        return any(value == each and type(value) is type(each) for each in arguments)
    if origin is tuple:
        return isinstance(value, tuple) and _elements_fit(arguments, value)
    if origin is dict:
        return isinstance(value, dict) and all(
            fits(arguments[0], k) and fits(arguments[1], v) for k, v in value.items()
        )
    if origin is collections.abc.Callable:
        return callable(value)
    return _is_of(hint, value)


def _elements_fit(arguments: tuple[Any, ...], values: tuple[Any, ...]) -> bool:
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        return all(fits(arguments[0], value) for value in values)
    return len(arguments) == len(values) and all(map(fits, arguments, values))


def _is_of(kind: type, value: Any) -> bool:
    if getattr(kind, "_is_protocol", False) and not getattr(kind, "_is_runtime_protocol", False):
        members = {*vars(kind), *getattr(kind, "__annotations__", {})}
        return all(hasattr(value, name) for name in members if not name.startswith("_"))
    if kind is bool:
        return isinstance(value, bool | np.bool_)
    if kind is int:
        return isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if kind is float:
        return isinstance(value, numbers.Real) and not isinstance(value, bool)
    return isinstance(value, kind)


def describe_kind(hint: Any) -> str:
    """Return a type hint in words."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(map(str, arguments))
    if origin in (typing.Union, types.UnionType):
        return " or ".join("None" if each is type(None) else describe_kind(each) for each in arguments)
    if origin is collections.abc.Callable:
        return "a function"
    if origin is tuple and arguments[-1] is Ellipsis:
        return "a tuple of which each is " + describe_kind(arguments[0])
    words = {int: "a whole number", float: "a number", bool: "True or False", str: "a string"}
    if hint in words:
        return words[hint]
    if isinstance(hint, type) and not arguments:
        return f"{'an' if hint.__name__[0] in 'AEIOU' else 'a'} {hint.__name__}"
    return str(hint).replace("typing.", "")
