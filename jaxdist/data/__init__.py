"""The input pipeline: sources, order, assembly of batches and placement on the mesh.

Only `placement` needs JAX. `feed` and `process_rows` are imported from it when first used, so that worker processes
start without JAX.
"""

import importlib
from typing import Any

from jaxdist.data.loader import Loader
from jaxdist.data.position import Position
from jaxdist.data.sources.source import ArraySource, CorruptExample, Source

__all__ = ["ArraySource", "CorruptExample", "Loader", "Position", "Source"]


def __getattr__(name: str) -> Any:
    if name not in ("feed", "process_rows"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("jaxdist.data.placement"), name)
