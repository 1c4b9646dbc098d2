"""The input pipeline: sources, order, assembly of batches and placement on the mesh."""

from jaxdist.data.loader import Loader
from jaxdist.data.placement import feed, process_rows
from jaxdist.data.position import Position
from jaxdist.data.source import ArraySource, CorruptExample, Source

__all__ = ["ArraySource", "CorruptExample", "Loader", "Position", "Source", "feed", "process_rows"]
