"""Sources made of sources: concatenated, filtered by a mask, or divided into shards for several hosts."""

import bisect
import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxdist.data import order
from jaxdist.data.sources.source import COUNTS, Example, Source, checked_index, fingerprint_text, own_fields
from jaxdist.data.sources.vocabulary import check_same_vocabulary, vocabulary_of


class Concatenated:
    """Several sources as one: the ids of the second start where those of the first end.

    Each example has a `mask`, 1 unless its source says otherwise, so filtered and other sources can be joined.
    """

    def __init__(self, sources: Sequence[Source]):
        self.sources = self.parts = tuple(sources)
        self.vocabulary = check_same_vocabulary(self.sources, what="Sources that are joined")
        self._ends = list(itertools.accumulate(len(source) for source in self.sources))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> Example:
        index = checked_index(index, len(self))
        part = bisect.bisect_right(self._ends, index)
        return _with_mask(self.sources[part][index - (self._ends[part - 1] if part else 0)])

    def fingerprint(self) -> str:
        """See Source."""
        return fingerprint_text("concatenated", *(source.fingerprint() for source in self.sources))


def _with_mask(example: Example) -> Example:
    """Return the example with a mask of its own, so that examples with and without one can share a batch."""
    return {**example, COUNTS: np.asarray(example.get(COUNTS, 1), np.float32)}


_OF_ORDER = ("order", "reads_forward", "check_order", "promise")
"""What a source says of the order it is read in, which holds for a part of it too."""


class Filtered:
    """A source some of whose examples do not count: they keep their places, and their mask is 0.

    No process needs to know which examples the others leave out, so the number of steps stays equal everywhere.
    `Packed` leaves their elements out of its rows.
    """

    def __init__(self, source: Source, keep_fn: Callable[[Example], bool], *, version: str):
        """Wrap `source`; `version` names the rule in the fingerprint, so change it when `keep_fn` changes."""
        self._source, self._keep_fn, self._version = source, keep_fn, version
        self.parts = (source,)
        self.vocabulary = vocabulary_of(source)
        self.__dict__.update({name: getattr(source, name) for name in _OF_ORDER if hasattr(source, name)})

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Example:
        example = self._source[index]
        answer = self._keep_fn(own_fields(example))
        if answer is None:
            raise TypeError("keep_fn returns whether the example counts, True or False; it returned None")
        kept = np.asarray(bool(answer), np.float32)
        return {**example, COUNTS: kept * np.asarray(example.get(COUNTS, 1), np.float32)}

    def fingerprint(self) -> str:
        """See Source."""
        return fingerprint_text("filtered", self._source.fingerprint(), self._version)


@dataclasses.dataclass(frozen=True)
class ShardList:
    """What every host must know of all shards: how many examples each has, and its fingerprint."""

    sizes: tuple[int, ...]
    fingerprints: tuple[str, ...]

    @classmethod
    def of(cls, shards: Sequence[Source]) -> "ShardList":
        """Return the list of all shards, for a process that can read all of them."""
        return cls(tuple(map(len, shards)), tuple(shard.fingerprint() for shard in shards))

    def to_json(self) -> dict[str, list]:
        """Return a dict that JSON can hold."""
        return {"sizes": list(self.sizes), "fingerprints": list(self.fingerprints)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "ShardList":
        """Return the list that `to_json` wrote."""
        return cls(tuple(values["sizes"]), tuple(values["fingerprints"]))


class Sharded:
    """A data set in shards of which this host can read only some; iterate it in the order `Sharded.order()`.

    >>> numbers = placement.host_shards(mesh, len(shard_list.sizes))
    >>> source = Sharded({number: open_shard(number) for number in numbers}, shard_list)
    >>> loader = Loader(source, shuffle=source.order(), global_batch_size=64, seed=0)

    Each shard fills its own part of every batch, so the batches do not depend on how the shards are assigned to hosts.
    """

    def __init__(self, shards: Mapping[int, Source], shard_list: ShardList):
        self._shards, self._shard_list = dict(shards), shard_list
        self.parts = tuple(shard for _, shard in sorted(self._shards.items()))
        self.vocabulary = check_same_vocabulary(list(self._shards.values()), what="Shards")
        self._starts = [0, *itertools.accumulate(shard_list.sizes)]
        for number, shard in self._shards.items():
            found = (len(shard), shard.fingerprint())
            if not 0 <= number < len(shard_list.sizes):
                raise ValueError(f"There is no shard {number}: the shard list has {len(shard_list.sizes)} shards.")
            if found != (shard_list.sizes[number], shard_list.fingerprints[number]):
                raise ValueError(
                    f"Shard {number} differs from the shard list: it has {found[0]} examples and the fingerprint "
                    f"{found[1]}, the list says {shard_list.sizes[number]} and {shard_list.fingerprints[number]}. "
                    "Copy it again."
                )

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> Example:
        index = checked_index(index, len(self))
        number = bisect.bisect_right(self._starts, index) - 1
        if number not in self._shards:
            raise ValueError(
                f"Example {index} is in shard {number}, but this host has the shards {sorted(self._shards)}. "
                "`placement.host_shards` says which shards a host needs."
            )
        return _with_mask(self._shards[number][index - self._starts[number]])

    def order(self, *, shuffle: bool = True) -> order.Dealt:
        """Return the order in which each shard fills its own part of every batch."""
        return order.Dealt(self._shard_list.sizes, shuffle)

    def fingerprint(self) -> str:
        """Return the fingerprint of all shards, those of other hosts included."""
        return fingerprint_text("sharded", *self._shard_list.fingerprints)
