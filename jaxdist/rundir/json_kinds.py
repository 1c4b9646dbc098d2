"""Whether what a file of JSON holds is of the kinds that its reader takes: those of annotations.

It is checked once, where the file can still be named, and not wherever one of its values is used.
"""

import dataclasses
import functools
import sys
import types
import typing
from collections.abc import Mapping
from typing import Any

_NAMES = {int: "a whole number", float: "a number", str: "text", bool: "true or false", types.NoneType: "null"}
_BOUNDS: dict[Any, float] = {int: (1 << 63) - 1, float: sys.float_info.max}
_MOST_CHARACTERS = 40


def misfit(value: Any, kind: Any, name: str) -> str | None:
    """Return what of `value` is not of `kind`: "best.step must be a whole number, got 'six'"; None if all of it is.

    Args:
      value: read from JSON.
      kind: an annotation: of a number (finite, of at most 64 bits), text, `bool`, `None`, `Any`, a `Literal`, a `list`,
        a `tuple` of any length, a `dict` or `Mapping` from text, a dataclass, a `TypedDict`, or a union of these.
      name: of the value, for the message.
    """
    origin, parts = typing.get_origin(kind) or kind, typing.get_args(kind)
    if origin is Any:
        return None
    if origin in (typing.Union, types.UnionType):
        found = [misfit(value, part, name) for part in parts]
        return None if None in found else found[0]
    if origin is typing.Literal:
        return None if value in parts else _must_be(" or ".join(map(repr, parts)), value, name)
    if origin in _BOUNDS:
        fits = isinstance(value, int if origin is int else int | float) and abs(value) <= _BOUNDS[origin]
        return None if fits else _must_be(_NAMES[origin], value, name)
    if origin in _NAMES:
        return None if isinstance(value, origin) else _must_be(_NAMES[origin], value, name)
    if origin in (list, tuple):
        if not isinstance(value, list):
            return _must_be("a list", value, name)
        return first_misfit(value, dict.fromkeys(range(len(value)), parts[0]), name)
    if not isinstance(value, dict):
        return _must_be("an object", value, name)
    if origin in (dict, Mapping):
        return first_misfit(value, dict.fromkeys(value, parts[1]), name)
    needed, kinds = _members(origin)
    missing = [key for key in needed if key not in value]
    return f"{name or 'it'} lacks {', '.join(missing)}" if missing else first_misfit(value, kinds, name)


@functools.cache
def _members(kind: Any) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Return the names that a `TypedDict` or a dataclass must have, and the annotations of all."""
    if not dataclasses.is_dataclass(kind):
        return tuple(sorted(kind.__required_keys__)), typing.get_type_hints(kind)
    without = (dataclasses.MISSING, dataclasses.MISSING)
    needed = (each.name for each in dataclasses.fields(kind) if (each.default, each.default_factory) == without)
    return tuple(needed), typing.get_type_hints(kind)


def first_misfit(value: Any, kinds: Mapping[Any, Any], name: str = "") -> str | None:
    """Return what of the members that `value`, an object or a list, has is not of its kind; see `misfit`."""
    members = [(key, kind) for key, kind in kinds.items() if isinstance(value, list) or key in value]
    found = (misfit(value[key], kind, f"{name}.{key}" if name else str(key)) for key, kind in members)
    return next((each for each in found if each), None)


def _must_be(what: str, value: Any, name: str) -> str:
    shown = repr(value)
    return f"{name or 'it'} must be {what}, got {shown[:_MOST_CHARACTERS]}{'...' * (len(shown) > _MOST_CHARACTERS)}"
