"""Changes to whole batches that mix their examples: mixup and cutmix, and the contract of functions like them.

A process reads some rows of each global batch. A batch function therefore says how many neighbouring rows it needs
together, its `group_size`; a process reads whole groups, and afterwards drops the rows that it does not hold. The order
is random, so neighbours are random pairs.
"""

import dataclasses
import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from jaxdist.data.assembly import ExampleError, HashedSeed, HostArrays, Result, own_arrays
from jaxdist.data.sources.source import MASK, check_labels


class BatchRows(NamedTuple):
    """Which rows of a global batch of `size` rows a batch has: `numbers`, ascending."""

    numbers: np.ndarray
    size: int


class BatchFn(Protocol):
    """Changes a batch, mask included: `batch_fn(batch, random, rows)` returns the same rows.

    `random` depends on the seed, the epoch and the batch, and is the same in every process. So a function draws for
    all `rows.size` rows of the global batch, and uses those for `rows.numbers`. A row with mask 0 has no example.

    It may have an attribute `group_size`: how many neighbouring rows it needs together, 2 for pairs. Without one it is
    given the whole global batch, which every process then reads.
    """

    def __call__(self, batch: HostArrays, random: np.random.Generator, rows: BatchRows, /) -> Mapping[str, np.ndarray]:
        """Return the changed batch."""


@dataclasses.dataclass(frozen=True)
class MixUp:
    """Blends each example with its neighbour, and its label in the same proportion.

    Zhang et al., "mixup: Beyond Empirical Risk Minimization" (2018); the share of an example is drawn for each pair
    from Beta(alpha, alpha). Labels become probabilities, float32 (rows, num_classes), as `losses.classification` takes
    them. Images of whole numbers are rounded. A row whose neighbour does not count stays as it is.
    """

    num_classes: int
    alpha: float = 0.2
    field: str = "image"
    label: str = "label"

    group_size = 2

    def __post_init__(self) -> None:
        _check_settings(self.num_classes, self.alpha)

    def __call__(self, batch: HostArrays, random: np.random.Generator, rows: BatchRows) -> Mapping[str, np.ndarray]:
        """See BatchFn."""
        partners, alone = _partners(batch, rows)
        shares = random.beta(self.alpha, self.alpha, -(-rows.size // 2))[rows.numbers // 2].astype(np.float32)
        shares[alone] = 1
        values = _field(batch, self.field)
        mixed = _blend(values.astype(np.float32), partners, shares)
        if values.dtype.kind in "iu":
            mixed = np.rint(mixed)
        labels = _blend(_probabilities(batch, self.label, self.num_classes), partners, shares)
        return {**batch, self.field: mixed.astype(values.dtype), self.label: labels}


@dataclasses.dataclass(frozen=True)
class CutMix:
    """Replaces a rectangle of each image by that of its neighbour, and blends the labels by area.

    Yun et al., "CutMix" (2019): the part that is kept is drawn for each pair from Beta(alpha, alpha), the centre of the
    rectangle anywhere; what is outside the image is cut off, and the labels follow what remains. Dims 1 and 2 of the
    field are height and width. Labels are as those of MixUp. A row whose neighbour does not count stays as it is.
    """

    num_classes: int
    alpha: float = 1.0
    field: str = "image"
    label: str = "label"

    group_size = 2

    def __post_init__(self) -> None:
        _check_settings(self.num_classes, self.alpha)

    def __call__(self, batch: HostArrays, random: np.random.Generator, rows: BatchRows) -> Mapping[str, np.ndarray]:
        """See BatchFn."""
        partners, alone = _partners(batch, rows)
        images = _field(batch, self.field)
        if images.ndim < 3:
            raise ExampleError(f"CutMix needs images, (rows, height, width, ...); {self.field!r} has {images.shape}.")
        pairs = rows.numbers // 2
        kept = random.beta(self.alpha, self.alpha, -(-rows.size // 2))[pairs]
        centres = random.random((-(-rows.size // 2), 2))[pairs]
        mixed, shares = images.copy(), np.ones(len(pairs), np.float32)
        height, width = images.shape[1:3]
        for row in np.flatnonzero(~alone).tolist():
            down, across = _rectangle(height, width, kept[row], centres[row])
            mixed[row, down, across] = images[partners[row], down, across]
            area = (down.stop - down.start) * (across.stop - across.start)
            shares[row] = 1 - area / (height * width)
        labels = _blend(_probabilities(batch, self.label, self.num_classes), partners, shares)
        return {**batch, self.field: mixed, self.label: labels}


@dataclasses.dataclass(frozen=True)
class OneOf:
    """Applies one of several batch functions, drawn anew for each batch: `OneOf((MixUp(10), CutMix(10)))`.

    All of them must return the same fields. `weights` are as for `Generator.choice`, None for equal ones.
    """

    batch_fns: Sequence[BatchFn]
    weights: Sequence[float] | None = None

    def __post_init__(self) -> None:
        weights = np.asarray([1.0] * len(self.batch_fns) if self.weights is None else self.weights, np.float64)
        if len(weights) != len(self.batch_fns) or not (len(weights) and (weights >= 0).all() and weights.sum() > 0):
            raise ValueError(
                f"OneOf needs batch functions, and a weight of at least 0 for each; got {len(self.batch_fns)} "
                f"functions and the weights {self.weights}."
            )

    @property
    def group_size(self) -> int | None:
        """The rows that any of the functions needs together; None where one needs the whole batch."""
        sizes = [getattr(each, "group_size", None) for each in self.batch_fns]
        known = [size for size in sizes if size is not None]
        return math.lcm(*known) if len(known) == len(sizes) else None

    def __call__(self, batch: HostArrays, random: np.random.Generator, rows: BatchRows) -> Mapping[str, np.ndarray]:
        """See BatchFn."""
        weights = None if self.weights is None else np.asarray(self.weights, np.float64) / np.sum(self.weights)
        chosen = int(random.choice(len(self.batch_fns), p=weights))
        return self.batch_fns[chosen](batch, random, rows)


def rows_to_read(batch_fn: BatchFn, rows: np.ndarray, size: int) -> np.ndarray:
    """Return the rows of a global batch of `size` rows that `batch_fn` needs to change `rows`, ascending."""
    group = getattr(batch_fn, "group_size", None)
    if group is None:
        return np.arange(size)
    groups = np.unique(rows // group)
    read: np.ndarray = (groups[:, None] * group + np.arange(group)).reshape(-1)
    return read[read < size]


def change(
    batch_fn: BatchFn, batch: HostArrays, rows: BatchRows, *, keep: np.ndarray | None, identity: tuple[int, int, int]
) -> HostArrays:
    """Return the rows `keep` of the batch that `batch_fn` makes of `batch`, whose rows are `rows`; None keeps all.

    `identity` is the seed, the epoch, and the position after the batch.

    Raises:
      ExampleError: the function fails, or returns something other than these rows.
    """
    seed, epoch, after = identity
    text = f"jaxdist batch {seed} {epoch} {after}".encode()
    random = np.random.Generator(np.random.PCG64(HashedSeed(hashlib.blake2b(text, digest_size=32).digest())))  # type: ignore[arg-type]
    try:
        result = Result.of(batch_fn, batch, random, rows)
    except Exception as error:  # whatever the user's function raises: say which batch it was
        raise ExampleError(f"batch_fn, epoch {epoch}, the batch before example {after}: {error}") from error
    _check_made(result.made, batch)
    arrays = own_arrays(result, batch.values())
    if keep is None or len(keep) == len(rows.numbers):
        return arrays
    places = np.searchsorted(rows.numbers, keep)
    return {name: value[places] for name, value in arrays.items()}


def _check_made(made: Any, batch: HostArrays) -> None:
    count = len(batch[MASK])
    if not isinstance(made, Mapping) or MASK not in made:
        raise ExampleError(
            f"A batch_fn returns a dict of fields with {MASK!r} among them, as it was given; got "
            f"{sorted(made) if isinstance(made, Mapping) else type(made).__name__}. Return {{**batch, ...}}."
        )
    wrong = {name: np.shape(value) for name, value in made.items() if np.shape(value)[:1] != (count,)}
    if wrong:
        raise ExampleError(f"A batch_fn returns as many rows as it was given, {count}; got the shapes {wrong}.")


def _partners(batch: HostArrays, rows: BatchRows) -> tuple[np.ndarray, np.ndarray]:
    """Return the place of each row's neighbour in the batch, and which rows have none that counts."""
    mask = batch[MASK]
    if mask.ndim != 1:
        raise ExampleError(
            f"Examples are mixed as wholes, and this batch has a mask for parts of them, of shape {mask.shape}."
        )
    neighbours = rows.numbers ^ 1
    neighbours = np.where(neighbours < rows.size, neighbours, rows.numbers)  # the last row of an odd batch
    places = np.searchsorted(rows.numbers, neighbours)
    alone = (neighbours == rows.numbers) | (mask == 0) | (mask[places] == 0)
    return np.where(alone, np.arange(len(places)), places), alone


def _blend(values: np.ndarray, partners: np.ndarray, shares: np.ndarray) -> np.ndarray:
    own = shares.reshape(-1, *[1] * (values.ndim - 1))
    mixed: np.ndarray = values * own + values[partners] * (1 - own)
    return mixed


def _rectangle(height: int, width: int, kept: float, centre: np.ndarray) -> tuple[slice, slice]:
    """Return the rows and columns of the part that is replaced; (1 - kept) of the image unless it is cut off."""
    side = np.sqrt(1 - kept)
    parts = []
    for length, at in zip((height, width), centre.tolist()):
        middle, half = int(at * length), int(side * length) // 2
        parts.append(slice(max(middle - half, 0), min(middle + half, length)))
    return parts[0], parts[1]


def _probabilities(batch: HostArrays, label: str, num_classes: int) -> np.ndarray:
    """Return the labels as probabilities of the classes, float32 (rows, num_classes)."""
    labels = _field(batch, label)
    if labels.dtype.kind == "f" and labels.shape[1:] == (num_classes,):
        return labels.astype(np.float32)
    if labels.ndim != 1:
        raise ExampleError(
            f"Labels are class numbers (rows,) or probabilities (rows, {num_classes}); field {label!r} is "
            f"{labels.dtype} of shape {labels.shape}."
        )
    counts = batch[MASK] != 0
    check_labels(np.where(counts, labels, 0), label, num_classes)
    return np.eye(num_classes, dtype=np.float32)[np.where(counts, labels, 0)]


def _field(batch: HostArrays, name: str) -> np.ndarray:
    if name not in batch:
        raise ExampleError(f"The batch has no field {name!r}; its fields are {sorted(batch)}.")
    return batch[name]


def _check_settings(num_classes: int, alpha: float) -> None:
    if not (num_classes >= 2 and 0 < alpha < np.inf):
        raise ValueError(
            f"num_classes is at least 2 and alpha above 0 and finite; got num_classes={num_classes}, alpha={alpha}."
        )
