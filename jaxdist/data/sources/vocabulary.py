"""Names of numbers: which class or category each number of a field stands for.

A source may have a `vocabulary`: for each field whose numbers stand for names, the names by number.
"""

import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any


def listed(names: Any, *, what: str) -> tuple[Any, ...]:
    """Return names in their order; `what` says whose they are.

    Raises:
      ValueError: they are one text, whose letters would count; a set or a mapping, whose order says nothing of numbers;
        or two are alike, also where they differ in how an accent is encoded, which no one sees.
    """
    if isinstance(names, str | bytes | Mapping | set | frozenset):
        hint = f"({names!r},)" if isinstance(names, str) else "a list in the order of their numbers"
        raise ValueError(f"{what} are a list of names; got {names!r}, a {type(names).__name__}. Give {hint}.")
    found: dict[Any, Any] = {}
    for name in names:
        seen = unicodedata.normalize("NFC", name) if isinstance(name, str) else name
        if seen in found:
            raise ValueError(f"{what} are distinct names; got {found[seen]!r} and {name!r}, which look alike.")
        found[seen] = name
    return tuple(found.values())


def vocabulary_of(source: Any) -> dict[str, tuple[str, ...]]:
    """Return the vocabulary of a source; empty where it has none, or one of its own, such as a list of words."""
    known = getattr(source, "vocabulary", None)
    lists = isinstance(known, Mapping) and all(isinstance(names, list | tuple) for names in known.values())
    return {field: tuple(names) for field, names in known.items()} if lists and known else {}


def check_same_vocabulary(sources: Sequence[Any], *, what: str) -> dict[str, tuple[str, ...]]:
    """Return the vocabulary that all `sources` share; ValueError where a number has two meanings."""
    found: dict[str, tuple[str, ...]] = {}
    for source in sources:
        for field, names in vocabulary_of(source).items():
            known = found.setdefault(field, names)
            if known != names:
                number = next((i for i, (a, b) in enumerate(zip(known, names)) if a != b), min(len(known), len(names)))
                one, other = (values[number] if number < len(values) else "no name" for values in (known, names))
                raise ValueError(
                    f"{what} must number the names of field {field!r} alike: {number} is {one!r} in one and {other!r} "
                    f"in the other. Make the vocabulary once and pass it on, as in classes=train.classes (a folder) or "
                    f"categories=train.vocabulary (a table)."
                )
    return found
