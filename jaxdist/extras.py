"""Optional packages: imported when first needed, and named, with the extra that brings them, when missing."""

import importlib
from types import ModuleType


class MissingExtra(ImportError, ValueError):
    """A package that an optional part of jaxdist needs is not installed; the message says how to install it."""


def require(module: str, *, extra: str = "data") -> ModuleType:
    """Return the imported module; MissingExtra where it is not installed."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise MissingExtra(
            f"{module} is not installed, it comes with the extra {extra!r}: pip install 'jaxdist[{extra}]'."
        ) from error
