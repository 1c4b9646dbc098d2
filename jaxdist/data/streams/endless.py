"""A lane whose shards have unknown sizes: they are read one after another, pass after pass, and counted on the way."""

import threading
from collections.abc import Callable, MutableMapping, Sequence
from typing import NamedTuple

import numpy as np

from jaxdist.data.order import Permutation
from jaxdist.data.sources.source import Example
from jaxdist.data.streams.forward import EndOfShard, ForwardReader


class _Place(NamedTuple):
    """An example of a shard."""

    shard: int
    number: int


class EndlessLane:
    """The endless sequence of one lane's examples; a pure function of the shards' contents.

    The order of its shards in each pass follows from its number, `lane`. `sizes` are those of the shards that were read
    to their end, to which what is learned is added. `describe` names a shard in messages.
    """

    def __init__(
        self,
        lane: int,
        shards: Sequence[int],
        reader: ForwardReader,
        sizes: MutableMapping[int, int],
        describe: Callable[[int], str],
    ):
        self._lane, self._shards, self._reader = lane, np.asarray(shards, np.int64), reader
        self._sizes, self._describe = sizes, describe
        self._lock = threading.Lock()

    def get(self, place: int) -> Example:
        """Return the example number `place` of the lane."""
        with self._lock:
            found = self._locate(place)
        return self._read(found)

    def _locate(self, place: int) -> _Place:
        """Return where the example number `place` is, after reading the shards before it whose sizes are unknown."""
        first_pass = self._order(0)
        rest = place
        for shard in first_pass:
            if shard not in self._sizes:
                try:
                    self._reader.get(shard, rest)
                    return _Place(shard, rest)
                except EndOfShard as end:
                    self._sizes[shard] = end.size
            if rest < self._sizes[shard]:
                return _Place(shard, rest)
            rest -= self._sizes[shard]
        whole = sum(self._sizes[shard] for shard in first_pass)
        if whole == 0:
            raise ValueError(
                f"The stream has no examples in {', '.join(map(self._describe, first_pass[:5]))}. Each lane needs "
                "some: correct the shards, or use fewer lanes."
            )
        number, rest = divmod(rest, whole)
        for shard in self._order(1 + number):
            if rest < self._sizes[shard]:
                return _Place(shard, rest)
            rest -= self._sizes[shard]
        raise AssertionError("a place within a pass is within one of its shards")

    def _read(self, found: _Place) -> Example:
        try:
            return self._reader.get(*found)
        except EndOfShard as end:
            raise ValueError(
                f"{self._describe(found.shard)} had {self._sizes.get(found.shard, found.number + 1)} examples in one "
                f"pass and {end.size} in another. A stream has the same examples whenever it is opened: remove what "
                "is random in it, since the order is shuffled by its window."
            ) from None

    def _order(self, number: int) -> list[int]:
        """Return the shards in the order of a pass."""
        order = Permutation.make(len(self._shards), "pass", self._lane, number)
        return self._shards[order(np.arange(len(self._shards), dtype=np.int64))].tolist()
