"""Sources: data sets with random access. A source reads examples by id; it knows no order, batches or devices.

An example is a flat dict of numpy arrays (or scalars). Reading must be safe from several threads at once.
"""

import copy
import hashlib
import operator
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np

from jaxdist.setting_group import whole_number

Example: TypeAlias = Mapping[str, np.ndarray | np.generic]
"""The fields of one example by name; a scalar field COUNTS of 0 marks an example that does not count."""

MASK = "mask"
"""The field of a batch that is 1 for a row that counts; `metrics.MASK`, whose module needs JAX, as worker processes do
not. No source may have a field of this name: a target or a column called mask would silently become weights."""

COUNTS = "jaxdist.counts"
"""The field by which a source says whether an example counts, or which of its elements do; it becomes the mask."""

_WHOLE_BYTES = 64 * 2**20
_SAMPLE_BYTES, _NUM_SAMPLES = 2**16, 512


@runtime_checkable
class Source(Protocol):
    """A data set with random access.

    A source may also have `__getitems__(ids) -> dict`, which returns many examples with their fields stacked on dim 0,
    in arrays that nothing else holds, and is used in place of `__getitem__` (see `reads_batches`); `location(index) ->
    str`, the file of an example, for messages; `vocabulary`, the names that numbers stand for (see `vocabulary`);
    `order(shuffle=...) -> Order`, the order it has to be read in; `files`, the FileList of what it reads; `parts`, the
    sources that it is made of (see `fingerprints`); and `in_memory`, whether `__getitems__` copies rows of arrays that
    are there and does nothing else.
    """

    def __len__(self) -> int:
        """Return the number of examples."""

    def __getitem__(self, index: int) -> Example:
        """Return the example with the id `index`, in [0, len)."""

    def fingerprint(self) -> str:
        """Return a short text that is equal where the data are equal: across restarts, processes and machines."""


def reads_batches(source: Source) -> bool:
    """Return whether the source has a `__getitems__` that returns what its `__getitem__` does.

    A subclass that defines `__getitem__` alone has other examples than the `__getitems__` that it inherits.
    """
    for each in type(source).__mro__:
        if "__getitems__" in vars(each):
            return True
        if "__getitem__" in vars(each):
            break
    return "__getitems__" in getattr(source, "__dict__", {})


def location_of(source: Any, index: int) -> str:
    """Return the file of an example, for messages; "" where the source does not say."""
    location = getattr(source, "location", None)
    return str(location(index)) if callable(location) else ""  # it may be a folder or an address of a user's own


class CorruptExample(ValueError):
    """An example that cannot be read; the message names its file and number."""


def checked_index(index: int, size: int) -> int:
    """Return the example's number in [0, size), counted from the end where it is negative; IndexError where none is."""
    number = operator.index(index)
    if not -size <= number < size:
        raise IndexError(f"There is no example {number}: the source has {size}.")
    return number + size if number < 0 else number


def checked_ids(ids: Sequence[int] | np.ndarray, size: int) -> np.ndarray:
    """Return the examples' numbers in [0, size), int64; see `checked_index`. There may be none."""
    numbers = np.asarray(ids)
    if not numbers.size:
        return numbers.astype(np.int64)
    if numbers.dtype.kind not in "iu":
        raise IndexError(f"Examples are chosen by whole numbers; got an array of {numbers.dtype}.")
    low, high = int(numbers.min()), int(numbers.max())
    if low < -size or high >= size:
        raise IndexError(f"There is no example {low if low < -size else high}: the source has {size}.")
    numbers = numbers.astype(np.int64, copy=False)
    return numbers if low >= 0 else np.where(numbers < 0, numbers + size, numbers)


class ArraySource:
    """Examples held in arrays (or memmaps) that share dim 0.

    >>> source = ArraySource({"image": images, "label": labels}, num_classes={"label": 10})

    Args:
      arrays: the fields, none of them of Python objects.
      num_classes: fields that hold class numbers, each with the number of its classes; all are checked here, because a
        label out of range would train on as a NaN or as another class.
    """

    def __init__(self, arrays: Mapping[str, np.ndarray], *, num_classes: Mapping[str, int] | None = None):
        if not hasattr(arrays, "items"):
            raise ValueError(
                f"ArraySource takes arrays by field, as in {{'x': x, 'label': y}}; got a {type(arrays).__name__}."
            )
        self.arrays = {name: plain_array(name, array) for name, array in arrays.items()}
        for name, array in self.arrays.items():
            if array.dtype.hasobject:
                raise ValueError(
                    f"Field {name!r} holds Python objects; convert it to an array of numbers first (a sparse matrix by "
                    "toarray(), lists that differ in length by padding)."
                )
        sizes = {name: array.shape[0] if array.ndim else None for name, array in self.arrays.items()}
        if not sizes:
            raise ValueError("ArraySource needs at least one array; got an empty dict.")
        if None in sizes.values() or len(set(sizes.values())) != 1:
            raise ValueError(f"Arrays of a source must share dim 0, the examples; got the sizes {sizes}.")
        for name, count in (num_classes or {}).items():
            if name not in self.arrays:
                raise ValueError(f"num_classes names {name!r}, which is no field: {sorted(self.arrays)}.")
            check_labels(self.arrays[name], name, whole_number(f"The number of classes of {name!r}", count))
        self._size = next(iter(self.arrays.values())).shape[0]
        self.vocabulary: Mapping[str, tuple[str, ...]] = {}
        self.files: Any
        self.table: Any
        held = rows_of(self)
        self.in_memory = held is not None and not any(isinstance(array, np.memmap) for array in held.values())

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> Example:
        return {name: array[index] for name, array in self.arrays.items()}

    def __getitems__(self, ids: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
        """Return the examples `ids`, stacked, in fresh arrays."""
        index = checked_ids(ids, self._size)
        # take() is about twice as fast as fancy indexing for small rows.
        return {name: np.asarray(array.take(index, axis=0)) for name, array in self.arrays.items()}

    def fingerprint(self) -> str:
        """Return the hash of names, dtypes, shapes and contents (a fixed sample of them where arrays are large)."""
        # Anew each time: the arrays are the caller's, who may have filled them with other examples since.
        parts = [f"{name}={fingerprint_array(array)}" for name, array in sorted(self.arrays.items())]
        return fingerprint_text("arrays", *parts)


def rows_of(source: Source) -> Mapping[str, np.ndarray] | None:
    """Return the arrays whose rows are the examples; None where the source makes them in another way."""
    if not isinstance(source, ArraySource):
        return None
    own = (type(source).__getitem__, type(source).__getitems__)
    return source.arrays if own == (ArraySource.__getitem__, ArraySource.__getitems__) else None


def independent(item: Any) -> Any:
    """Return an item that nothing else writes into: readers fill one buffer again and again, functions write.

    Arrays, tensors, images, and what holds them are copied; what cannot be copied is returned as it is.
    """
    if isinstance(item, str | bytes | int | float | complex | np.generic | None):
        return item
    if isinstance(item, np.ndarray) and not item.dtype.hasobject:
        return item.copy()
    if isinstance(item, Mapping):
        return {name: independent(value) for name, value in item.items()}
    if isinstance(item, list):
        return [independent(value) for value in item] if item and not isinstance(item[0], int | float) else item[:]
    if isinstance(item, tuple):
        parts = map(independent, item)
        return type(item)(*parts) if hasattr(item, "_fields") else tuple(parts)
    if isinstance(item, bytearray | memoryview):
        return bytes(item)
    if hasattr(item, "clone"):  # a tensor, also one with a gradient
        return item.clone()
    try:
        return copy.deepcopy(item)
    except (TypeError, ValueError, copy.Error):  # a lock, an open file
        return item


def own_fields(example: Example) -> dict[str, Any]:
    """Return the example for a function of the user: what the function writes into it is not written into the source.

    Arrays that are read-only stay as they are.
    """
    return {
        name: value if isinstance(value, np.ndarray) and not value.flags.writeable else independent(value)
        for name, value in example.items()
    }


def plain_array(name: str, value: Any) -> np.ndarray:
    """Return a value as an array.

    Raises:
      ValueError: it is none, or has masked elements, which would count like all others; or its name is no text.
    """
    if not isinstance(name, str):
        raise ValueError(f"Names of fields are texts; got {name!r}. Rename it, for example to {str(name)!r}.")
    if np.ma.is_masked(value):
        raise ValueError(
            f"Field {name!r} has {np.ma.count_masked(value)} masked elements, and training would take what is under "
            "the mask. Say what stands for them, as in array.filled(0), and leave out or weight their examples."
        )
    try:
        return value if isinstance(value, np.memmap) else np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:  # ragged lists, sparse tensors, keys of JAX
        raise ValueError(f"Field {name!r} cannot become an array of numbers: {error}") from error


def check_labels(labels: np.ndarray, name: str, num_classes: int) -> None:
    """Raise ValueError, naming the first such example, unless all `labels` are whole numbers in [0, num_classes)."""
    if labels.dtype.kind not in "iu":
        raise ValueError(f"Labels are whole numbers; field {name!r} has the dtype {labels.dtype}.")
    wrong = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if wrong.size:
        raise ValueError(
            f"Label out of range: example {wrong[0]} has {name} {labels.reshape(-1)[wrong[0]]}, and so have "
            f"{wrong.size} examples in all; {num_classes} classes are numbered 0 to {num_classes - 1}."
        )


def fingerprint_text(kind: str, *parts: object) -> str:
    """Return `kind` and a hash of `parts`, in order."""
    digest = hashlib.blake2b("\0".join(map(str, parts)).encode(), digest_size=12)
    return f"{kind}:{digest.hexdigest()}"


def fingerprint_array(array: np.ndarray) -> str:
    """Return a hash of an array's dtype, shape and bytes; above 64 MiB of 512 evenly spread blocks of its bytes.

    Up to 64 MiB it is of the CRC-32 of each 64 kB: a changed number changes it, at a quarter of the cost of a hash.
    """
    digest = hashlib.blake2b(f"{array.dtype.str}{array.shape}".encode(), digest_size=12)
    if array.nbytes <= _WHOLE_BYTES:
        data = np.ascontiguousarray(array).view(np.uint8).reshape(-1) if array.size else np.empty(0, np.uint8)
        blocks = [zlib.crc32(data[begin : begin + _SAMPLE_BYTES].data) for begin in range(0, len(data), _SAMPLE_BYTES)]
        digest.update(np.array(blocks, "<u4").tobytes())
        return digest.hexdigest()
    rows_per_block = max(1, _SAMPLE_BYTES * len(array) // array.nbytes)
    for start in np.linspace(0, len(array) - rows_per_block, min(_NUM_SAMPLES, len(array)), dtype=np.int64):
        digest.update(np.ascontiguousarray(array[start : start + rows_per_block]).view(np.uint8).reshape(-1).data)
    return digest.hexdigest()


def fingerprint_example(example: Any) -> str:
    """Return a hash of an example: its fields' names and values; of texts and what else is no number, what they show.

    What is no mapping is hashed as the one value that it is.
    """
    fields = sorted(example.items()) if isinstance(example, Mapping) else [("", example)]
    return fingerprint_text("example", *(f"{name}={_hash_value(value)}" for name, value in fields)).partition(":")[2]


def _hash_value(value: Any) -> str:
    if isinstance(value, str | bytes | None):
        return repr(value)
    if isinstance(value, Mapping):
        return fingerprint_example(value)
    if isinstance(value, tuple | list) and not all(isinstance(each, int | float) for each in value):
        return fingerprint_text("list", *map(_hash_value, value))
    array = np.asarray(value)
    return repr(value) if array.dtype.hasobject else fingerprint_array(array)
