"""Examples of different lengths in batches of one shape: packed into rows with segment ids, or bucketed by length.

Both are indices prepared from the lengths alone, so the packed or bucketed data set is a source like any other:
seekable, and each of its examples once an epoch.
"""

import bisect
import dataclasses
import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from jaxdist.data import order
from jaxdist.data.sources.source import COUNTS, Example, Source, checked_index, fingerprint_array, fingerprint_text
from jaxdist.data.sources.vocabulary import listed, vocabulary_of
from jaxdist.setting_group import whole_number


def example_lengths(source: Source, field: str) -> np.ndarray:
    """Return the size of dim 0 of `field` in every example, int64. It reads the whole source: keep the result."""
    return np.array([len(np.asarray(source[index][field])) for index in range(len(source))], np.int64)


def pack_index(lengths: np.ndarray, row_length: int) -> list[list[int]]:
    """Return rows of example ids, the lengths of each row at most `row_length` in all, each example in one row.

    Best-fit decreasing (Johnson 1973: at most about 11/9 of the fewest rows possible): from the longest to the
    shortest, each into the row with the least room that suffices. Rows with equal room are kept together, so that it
    takes O(examples * row_length) at worst.
    """
    lengths, row_length = _checked_lengths(lengths), whole_number("row_length", row_length)
    too_long = np.flatnonzero((lengths > row_length) | (lengths < 1))
    if too_long.size:
        raise ValueError(
            f"A packed example has 1 to {row_length} elements, the length of a row. Example {too_long[0]} has "
            f"{lengths[too_long[0]]}, and {too_long.size} examples in all do not fit: split or filter them first."
        )
    rows: list[list[int]] = []
    rows_by_room: dict[int, list[int]] = {}
    rooms: list[int] = []  # the keys of rows_by_room, ascending
    for example_id in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[example_id])
        place = bisect.bisect_left(rooms, length)
        if place == len(rooms):
            rows.append([])
            row, room = len(rows) - 1, row_length
        else:
            room = rooms[place]
            row = rows_by_room[room].pop()
            if not rows_by_room[room]:
                del rows_by_room[room], rooms[place]
        rows[row].append(example_id)
        if room > length:
            if room - length not in rows_by_room:
                bisect.insort(rooms, room - length)
            rows_by_room.setdefault(room - length, []).append(row)
    return rows


class Packed:
    """Rows of `row_length` elements, each of one or more whole examples of `source`, one behind the other.

    A row has the packed fields, filled up with `pad`; `segment_ids` int32, 1 for the row's first example, 2 for its
    second, 0 for padding; and `positions` int32, which count from 0 in each example. Examples whose mask is 0 (see
    `Filtered`) are left out of their rows; a mask of one number an element is packed like the fields.

    Args:
      source: its packed fields all have dim 0 of the example's length.
      lengths: of every example; see `example_lengths`.
      row_length: elements of a row.
      fields: which fields to pack; the others are left out.
      pad: fills the rows up.
    """

    def __init__(
        self, source: Source, lengths: np.ndarray, *, row_length: int, fields: Sequence[str] = ("tokens",), pad: int = 0
    ):
        self._source, self._lengths, self._row_length = source, _checked_lengths(lengths, len(source)), row_length
        self.parts = (source,)
        self._fields, self._pad = listed(fields, what="`fields`"), pad
        self.vocabulary = {field: names for field, names in vocabulary_of(source).items() if field in self._fields}
        rows = pack_index(self._lengths, row_length)
        self._ids = np.fromiter(itertools.chain.from_iterable(rows), np.int64, len(self._lengths))
        self._bounds = np.cumsum([0, *map(len, rows)])

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def __getitem__(self, index: int) -> Example:
        index = checked_index(index, len(self))
        ids = self._ids[self._bounds[index] : self._bounds[index + 1]].tolist()
        examples = [self._source[example_id] for example_id in ids]
        lengths = self._lengths[ids].tolist()
        for example_id, example, length in zip(ids, examples, lengths):
            _check_length(example_id, example, self._fields, length)
        masks = [np.asarray(example.get(COUNTS, 1)) for example in examples]
        kept = [place for place, mask in enumerate(masks) if mask.any()]
        row = {
            name: self._filled([np.asarray(examples[i][name]) for i in kept], examples[0][name])
            for name in self._fields
        }
        segment_ids = np.repeat(np.arange(1, len(kept) + 1, dtype=np.int32), [lengths[i] for i in kept])
        positions = [np.arange(lengths[i], dtype=np.int32) for i in kept]
        row |= {"segment_ids": _pad_to(segment_ids, self._row_length, 0)}
        row |= {"positions": self._filled(positions, np.empty(0, np.int32), pad=0)}
        if not any(COUNTS in example for example in examples):
            return row
        if any(mask.ndim for mask in masks):  # a mask an element
            parts = [np.broadcast_to(masks[i], lengths[i]).astype(np.float32) for i in kept]
            return row | {COUNTS: self._filled(parts, np.empty(0, np.float32), pad=0)}
        return row | {COUNTS: np.float32(bool(kept))}

    def _filled(self, parts: list[np.ndarray], like: Any, pad: int | None = None) -> np.ndarray:
        """Return the concatenated parts, padded to a row; `like` gives the dtype if there are no parts."""
        joined = np.concatenate(parts) if parts else np.asarray(like)[:0]
        return _pad_to(joined, self._row_length, self._pad if pad is None else pad)

    def fingerprint(self) -> str:
        """See Source."""
        settings = (self._row_length, self._fields, self._pad, fingerprint_array(self._lengths))
        return fingerprint_text("packed", self._source.fingerprint(), *settings)


class Bucketed:
    """A source sorted by length into buckets; each example is padded to its bucket's length. Iterate it in `order()`.

    >>> source = Bucketed(sentences, example_lengths(sentences, "tokens"), boundaries=(64, 128, 256))
    >>> loader = Loader(source, shuffle=source.order(), global_batch_size=32, seed=0)

    All examples of a batch come from one bucket, so a step compiles once for each bucket.

    Args:
      source: its padded fields all have dim 0 of the example's length.
      lengths: of every example.
      boundaries: the buckets' lengths, ascending; the last one holds the longest example.
      block_size: how many neighbours of a bucket are shuffled together; a batch comes from one block.
      fields: which fields to pad.
      pad: fills the fields up. A field `length` int32 tells the example's own.
    """

    def __init__(
        self,
        source: Source,
        lengths: np.ndarray,
        *,
        boundaries: Sequence[int],
        block_size: int = 4096,
        fields: Sequence[str] = ("tokens",),
        pad: int = 0,
    ):
        self._source, self._lengths = source, _checked_lengths(lengths, len(source))
        self._boundaries = np.array([whole_number("A boundary", each) for each in boundaries], np.int64)
        self.parts = (source,)
        self._fields, self._pad = listed(fields, what="`fields`"), pad
        longest, block_size = self._lengths.max(initial=0), whole_number("block_size", block_size)
        if (np.diff(self._boundaries) <= 0).any() or longest > self._boundaries.max(initial=0):
            raise ValueError(
                f"Boundaries must ascend, and the last one hold the longest example, {longest} elements; "
                f"got {self._boundaries.tolist()}."
            )
        self._buckets = np.searchsorted(self._boundaries, self._lengths)
        self._ids = np.argsort(self._buckets, kind="stable")
        self.vocabulary = vocabulary_of(source)
        counts = np.bincount(self._buckets, minlength=len(self._boundaries)).tolist()
        blocks = [min(block_size, count - begin) for count in counts for begin in range(0, count, block_size)]
        self._order = Blocks(tuple(blocks))

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index: int) -> Example:
        example_id = int(self._ids[checked_index(index, len(self))])
        example, size = self._source[example_id], int(self._boundaries[self._buckets[example_id]])
        _check_length(example_id, example, self._fields, int(self._lengths[example_id]))
        padded = {name: _pad_to(np.asarray(example[name]), size, self._pad) for name in self._fields}
        if np.ndim(example.get(COUNTS, 1)):  # a mask an element
            padded[COUNTS] = _pad_to(np.asarray(example[COUNTS]), size, 0)
        return {**example, **padded, "length": np.int32(self._lengths[example_id])}

    def order(self, *, shuffle: bool = True) -> "Blocks":
        """Return the order whose batches each come from one bucket."""
        return dataclasses.replace(self._order, shuffle=shuffle)

    def fingerprint(self) -> str:
        """See Source."""
        settings = (self._boundaries.tolist(), self._fields, self._pad, fingerprint_array(self._lengths))
        return fingerprint_text("bucketed", self._source.fingerprint(), *settings)


@dataclasses.dataclass(frozen=True)
class Blocks:
    """An order of blocks of the given sizes, shuffled, each shuffled in itself; no batch has examples of two blocks.

    The last batch of each block is padded.
    """

    sizes: tuple[int, ...]
    shuffle: bool = True

    @property
    def version(self) -> str:
        """See Order."""
        unshuffled = "" if self.shuffle else " unshuffled"
        return f"bucketed-{order.ORDER_VERSION}:{fingerprint_text('sizes', *self.sizes)}{unshuffled}"

    def batches(self, num_examples: int, seed: int, epoch: int, start: int, size: int) -> Iterator[order.BatchIds]:
        """See Order."""
        while start < num_examples:
            batch = self.batch(num_examples, seed, epoch, start, size)
            yield batch
            start = batch.after

    def batch(self, num_examples: int, seed: int, epoch: int, start: int, size: int) -> order.BatchIds:
        """Return the batch that begins at position `start`, which is below num_examples."""
        if num_examples != sum(self.sizes) or not 0 <= start < num_examples:
            raise ValueError(f"These blocks have {sum(self.sizes)} examples; got {num_examples}, position {start}.")
        blocks, begins = _places_of_blocks(self.sizes, self.shuffle, seed, epoch)
        place = int(np.searchsorted(begins, start, side="right")) - 1
        block, within = int(blocks[place]), start - int(begins[place])
        count = min(size, self.sizes[block] - within)
        places = np.arange(within, within + count, dtype=np.int64)
        if self.shuffle:
            places = order.Permutation.make(self.sizes[block], "in bucket", seed, epoch, block)(places)
        return order.padded_batch(sum(self.sizes[:block]) + places, size, start)

    def num_batches(self, num_examples: int, size: int) -> int:
        """See Order."""
        return sum(-(-block // size) for block in self.sizes)


@functools.lru_cache(maxsize=8)
def _places_of_blocks(sizes: tuple[int, ...], shuffle: bool, seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the blocks in their order, and the position at which each begins."""
    blocks = np.arange(len(sizes))
    if shuffle:
        blocks = order.Permutation.make(len(sizes), "buckets", seed, epoch)(blocks)
    counts = np.array(sizes)[blocks]
    return blocks, np.cumsum(counts) - counts


def _checked_lengths(lengths: np.ndarray, num_examples: int | None = None) -> np.ndarray:
    """Return the lengths of examples, int64; ValueError where they are none, or not as many as there are examples."""
    found = np.asarray(lengths)
    if found.ndim != 1 or (found.size and (found.dtype.kind not in "iu" or found.min() < 0)):
        raise ValueError(
            f"lengths has a whole number for each example, see `example_lengths`; got an array of {found.dtype} and "
            f"shape {found.shape}{f' whose least is {found.min()}' if found.dtype.kind in 'if' else ''}."
        )
    if num_examples is not None and len(found) != num_examples:
        raise ValueError(f"There must be a length for each of the {num_examples} examples; got {len(found)}.")
    return found.astype(np.int64)


def _check_length(example_id: int, example: Example, fields: Sequence[str], length: int) -> None:
    """Raise ValueError where the fields of an example are not those whose length is known."""
    missing = [name for name in fields if name not in example]
    if missing:
        raise ValueError(
            f"Example {example_id} has no field {missing[0]!r}; it has {sorted(example)}. Name its `fields`."
        )
    found = {name: np.shape(example[name])[:1] for name in fields}
    if not set(found.values()) <= {(length,)}:
        shown = {name: np.shape(example[name]) for name in fields}
        raise ValueError(
            f"`lengths` says that example {example_id} has the length {length}; the shapes of its fields are {shown}."
        )


def _pad_to(array: np.ndarray, size: int, pad: int) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        filled = np.asarray(pad).astype(array.dtype)
    if not np.array_equal(filled, np.asarray(pad), equal_nan=True):
        raise ValueError(f"pad={pad!r} is no value of {array.dtype}, the kind of the fields that it fills up.")
    return np.concatenate([array, np.full((size - len(array), *array.shape[1:]), filled)])
