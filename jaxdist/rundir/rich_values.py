"""Values other than numbers that can be logged: images, histograms, tables and texts, for writers that take them."""

import dataclasses
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np

_SHAPES = "(height, width), (height, width, 1) or (height, width, 3)"
_MOST_BINS = 64


@dataclasses.dataclass(frozen=True)
class Image:
    """An image of shape (height, width), or with 1 or 3 channels: bytes from 0 to 255, or floats from 0 to 1."""

    pixels: Any

    def to_bytes(self) -> np.ndarray:
        """Return the pixels as bytes, (height, width, 3).

        Raises:
          ValueError: the shape is another, or a value is outside of the range.
        """
        pixels = np.asarray(self.pixels)
        if pixels.ndim == 2:
            pixels = pixels[..., None]
        if pixels.ndim != 3 or pixels.shape[2] not in (1, 3) or not pixels.size:
            raise ValueError(f"An image needs the shape {_SHAPES}; got {np.shape(self.pixels)}.")
        if pixels.dtype != np.uint8:
            pixels = pixels.astype(np.float64)
            if not (np.isfinite(pixels).all() and pixels.min() >= 0 and pixels.max() <= 1):
                raise ValueError(
                    "The values of an image must be bytes (uint8), or floats from 0 to 1; some are outside. Scale them."
                )
            pixels = np.round(pixels * 255).astype(np.uint8)
        return np.broadcast_to(pixels, (*pixels.shape[:2], 3))


@dataclasses.dataclass(frozen=True)
class Histogram:
    """The distribution of values; values that are not finite are left out."""

    values: Any

    def count(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the counts of at most 64 bins of equal width, and the edges of the bins.

        Raises:
          ValueError: no value is finite.
        """
        values = np.asarray(self.values, np.float64).ravel()
        values = values[np.isfinite(values)]
        if not values.size:
            raise ValueError("A histogram needs a finite value; got none. Leave it out.")
        return np.histogram(values, bins=min(_MOST_BINS, max(values.size, 1)))


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of cells under the names of their columns."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(
                    f"Each row of this table needs {len(self.columns)} cells, one per column; got {len(row)}."
                )

    def to_markdown(self) -> str:
        """Return the table as Markdown."""
        lines = [self.columns, ["---"] * len(self.columns), *self.rows]
        return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


@dataclasses.dataclass(frozen=True)
class Text:
    """A text; some writers show it as Markdown."""

    text: str


RichValue: TypeAlias = Image | Histogram | Table | Text
