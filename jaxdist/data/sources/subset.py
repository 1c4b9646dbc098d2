"""Parts of a source: some of its examples by number, held-out sets, folds, and classes drawn equally often.

Who belongs to which part is a pure function of (seed, number of examples, id): every process and restart agrees.
"""

import functools
import numbers
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from jaxdist.data import order
from jaxdist.data.sources.source import (
    Example,
    Source,
    checked_ids,
    checked_index,
    fingerprint_array,
    fingerprint_text,
    location_of,
    reads_batches,
)
from jaxdist.data.sources.vocabulary import vocabulary_of
from jaxdist.data.sources.wrap import as_source
from jaxdist.setting_group import show, whole_number

Labels = Sequence[Any] | np.ndarray


class Subset:
    """The examples `ids` of a source, in that order; an id may occur several times."""

    def __init__(self, source: Source, ids: Sequence[int] | np.ndarray):
        self.source, self.ids = as_source(source), np.array(ids)  # a copy: the fingerprint is of these ids
        self.parts = (self.source,)
        if self.ids.ndim != 1 or (self.ids.size and self.ids.dtype.kind not in "iu"):
            raise ValueError(
                f"ids are a list of whole numbers; got an array of {self.ids.dtype} and shape {self.ids.shape}. "
                "np.flatnonzero turns a mask into ids."
            )
        wrong = self.ids[(self.ids < 0) | (self.ids >= len(self.source))]
        if wrong.size:
            raise ValueError(f"There is no example {wrong[0]}: the source has {len(self.source)}.")
        self.vocabulary = vocabulary_of(self.source)
        is_plain = type(self).__getitem__ is Subset.__getitem__
        if is_plain and reads_batches(self.source):  # only then: the loader asks whether a source reads whole batches
            self.__getitems__ = functools.partial(_gather, self.source, self.ids)
            self.in_memory = getattr(self.source, "in_memory", False)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Example:
        return self.source[int(self.ids[checked_index(index, len(self))])]

    def location(self, index: int) -> str:
        """See Source."""
        inner = int(self.ids[index])
        where = location_of(self.source, inner)
        return f"example {inner} of the whole{f', {where}' if where else ''}"

    def fingerprint(self) -> str:
        """See Source."""
        return fingerprint_text("subset", self.source.fingerprint(), fingerprint_array(self.ids.astype(np.int64)))


def _gather(source: Any, ids: np.ndarray, chosen: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
    """Return the examples `ids[chosen]`, stacked. Worker processes can be given a function of a module only."""
    return source.__getitems__(ids[checked_ids(chosen, len(ids))])


def held_out(source: Source, fraction: float, *, seed: int, labels: Labels | None = None) -> tuple[Subset, Subset]:
    """Return (training examples, held-out examples): `fraction` of the examples, chosen at random, is held out.

    Args:
      source: any source.
      fraction: in (0, 1); of each class the nearest whole number of examples is held out.
      seed: the same seed and number of examples choose the same examples.
      labels: the class of each example, (len(source),), to divide each class in the same proportion; None: one class.
    """
    if not isinstance(fraction, numbers.Real) or not 0 < fraction < 1:
        raise ValueError(f"The fraction that is held out is a number between 0 and 1; got {show(fraction)}.")
    chosen = np.zeros(len(source), bool)
    for ids in _shuffled_classes(len(source), seed, labels):
        chosen[ids[: round(fraction * len(ids))]] = True
    if chosen.all() or not chosen.any():
        raise ValueError(
            f"{fraction} of {len(source)} examples leaves {'none to train on' if chosen.all() else 'none held out'}."
        )
    return Subset(source, np.flatnonzero(~chosen)), Subset(source, np.flatnonzero(chosen))


def folds(source: Source, num_folds: int, *, seed: int, labels: Labels | None = None) -> list[tuple[Subset, Subset]]:
    """Return `num_folds` pairs (training examples, held-out examples) for cross-validation.

    Each example is held out once; the held-out sets differ by one in size at most, also within a class.
    """
    if whole_number("num_folds", num_folds, least=2) > len(source):
        raise ValueError(f"num_folds is between 2 and the number of examples, {len(source)}; got {num_folds}.")
    dealt = np.concatenate(list(_shuffled_classes(len(source), seed, labels)))
    number = np.empty(len(source), np.int64)
    number[dealt] = np.arange(len(source)) % num_folds
    parts = [number == fold for fold in range(num_folds)]
    return [(Subset(source, np.flatnonzero(~part)), Subset(source, np.flatnonzero(part))) for part in parts]


def balanced(source: Source, labels: Labels, weights: Sequence[int] | None = None) -> tuple[Subset, order.Mixed]:
    """Return the source and the order that draw each class of `labels` equally often, or in proportion to `weights`.

    A rare class is read several times in the time that a common one is read once: see `order.Mixed`.

    >>> source, shuffle = balanced(images, labels)
    >>> Data(train=source, order=shuffle)

    Args:
      source: any source.
      labels: the class of each example, (len(source),).
      weights: whole numbers, one a class, in the classes' sorted order.
    """
    classes = [np.flatnonzero(member) for _, member in _classes(len(source), labels)]
    sizes = tuple(len(ids) for ids in classes)
    return Subset(source, np.concatenate(classes)), order.Mixed(
        sizes, (1,) * len(sizes) if weights is None else tuple(weights)
    )


def _shuffled_classes(num_examples: int, seed: int, labels: Labels | None) -> Iterator[np.ndarray]:
    """Yield the ids of each class, in an order that `seed` decides."""
    seed = whole_number("seed", seed, least=0)
    for name, member in _classes(num_examples, labels):
        ids = np.flatnonzero(member)
        yield ids[order.Permutation.make(len(ids), "division", name, seed)(np.arange(len(ids)))]


def _classes(num_examples: int, labels: Labels | None) -> Iterator[tuple[str, np.ndarray]]:
    found = np.zeros(num_examples, np.int64) if labels is None else np.asarray(labels)
    if found.shape != (num_examples,):
        raise ValueError(f"labels has one entry an example, shape ({num_examples},); got {found.shape}.")
    missing = np.flatnonzero([label is None or label != label for label in found.tolist()])  # NaN differs from itself
    if missing.size:
        raise ValueError(
            f"Every example has a label; example {missing[0]} has {found[missing[0]]}. Choose the examples that have "
            "one with Subset, or give the others a label of their own."
        )
    for name in np.unique(found):
        yield str(name), found == name
