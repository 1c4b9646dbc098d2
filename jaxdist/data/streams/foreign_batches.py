"""Batches that something else makes, a torch DataLoader or a generator for example, as `jaxdist.fit` takes them.

They are what they are: no order that is a function of the seed, and no position to resume from. `data.Loader` has both.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxdist.data import assembly, placement
from jaxdist.data.sources.source import plain_array

MASK = "mask"
UNKNOWN = 2**62
"""Examples of an epoch that has no known end."""


@dataclasses.dataclass(frozen=True)
class BatchPlace:
    """How far the batches are: the first `position` examples of `epoch` were trained on."""

    epoch: int
    position: int
    num_examples: int


def batches(
    made: Iterable[Any],
    mesh: Mesh,
    *,
    fields: Sequence[str] | None = None,
    num_epochs: int = 1,
    num_examples: int | None = None,
    axes: Sequence[str] = ("data",),
) -> Iterator[tuple[dict[str, jax.Array], BatchPlace]]:
    """Yield (batch on the mesh, place after it) for `jaxdist.fit`, each with a mask; a smaller batch is padded.

    >>> batches = data.batches(torch_loader, mesh, fields=("image", "label"), num_epochs=10)  # doctest: +SKIP

    Args:
      made: yields batches of at most as many examples as the first: dicts of arrays or tensors, or, with `fields`,
        tuples of them. For several epochs something that can be iterated again, which a generator cannot.
      mesh: where the batches go; its devices belong to this process.
      fields: the names of the parts of a tuple.
      num_epochs: how often `made` is iterated.
      num_examples: of an epoch. None: those of the data set of a DataLoader, else unknown, and all is one epoch.
      axes: of the mesh, that the examples are spread over.

    Raises:
      ValueError: a batch is none of these, is larger than the first, or does not divide over `axes`.
    """
    if jax.process_count() > 1:
        raise ValueError(
            "data.batches takes whole batches, in one process; a job of several divides them with data.Loader. Give "
            "that the data set."
        )
    if num_epochs > 1 and iter(made) is made:
        raise ValueError(f"A generator can be iterated once; got num_epochs={num_epochs}. Pass a list or a DataLoader.")
    length = _length(made) if num_examples is None else num_examples
    return _batches(made, mesh, fields, num_epochs, length, tuple(axes))


def _batches(
    made: Iterable[Any],
    mesh: Mesh,
    fields: Sequence[str] | None,
    num_epochs: int,
    num_examples: int,
    axes: tuple[str, ...],
) -> Iterator[tuple[dict[str, jax.Array], BatchPlace]]:
    size, seen = 0, 0
    for epoch in range(num_epochs):
        position = 0
        for item in made:
            batch = _named(item, fields, seen)
            count = len(next(iter(batch.values())))
            size = size or count
            placement.process_rows(mesh, size, axes)  # which refuses a size that does not divide
            position, seen = position + count, seen + count
            place = (0, seen) if num_examples == UNKNOWN else (epoch, position)
            placed = jax.device_put(_padded(batch, count, size), placement.batch_sharding(mesh, axes))
            yield placed, BatchPlace(*place, num_examples)


def _length(made: Any) -> int:
    try:
        return len(made.dataset)
    except (AttributeError, TypeError):
        return UNKNOWN


def _named(item: Any, fields: Sequence[str] | None, seen: int) -> dict[str, np.ndarray]:
    """Return a batch that comes after `seen` examples as a dict of arrays."""
    if isinstance(item, Mapping):
        found = dict(item)
    elif isinstance(item, tuple | list) and fields is not None and len(item) == len(fields):
        found = dict(zip(fields, item))
    else:
        parts = f"{type(item).__name__} of {len(item)}" if hasattr(item, "__len__") else type(item).__name__
        raise ValueError(
            f"A batch is a dict of arrays, or a tuple whose parts `fields` names; got a {parts} and fields={fields}. "
            'Pass fields=("image", "label"), for example.'
        )
    arrays = {name: assembly.native(plain_array(name, values)) for name, values in found.items()}
    lengths = {name: len(values) if values.ndim else None for name, values in arrays.items()}
    if not arrays or len(set(lengths.values())) != 1 or None in lengths.values():
        raise ValueError(f"All fields of a batch have a row for each example; got the lengths {lengths}.")
    assembly.check_fields(arrays, seen)
    placement.check_numbers(arrays, lambda: np.arange(seen, seen + len(next(iter(arrays.values())))))
    if MASK in arrays:
        raise ValueError("The field `mask` is jaxdist's own: it says which rows count. Rename yours.")
    return arrays


def _padded(batch: Mapping[str, np.ndarray], count: int, size: int) -> dict[str, np.ndarray]:
    """Return the batch with copies of its first example up to `size`, and its mask."""
    if count > size:
        raise ValueError(f"No batch may be larger than the first, of {size} examples; got one of {count}.")
    rows = np.concatenate([np.arange(count), np.zeros(size - count, int)])
    mask = (np.arange(size) < count).astype(np.float32)
    return {name: values[rows] for name, values in batch.items()} | {MASK: mask}
