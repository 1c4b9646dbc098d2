"""Any example of shards that can only be read forward: the examples read lately are kept, and a shard may be reopened.

Every answer is right whatever is asked for, in any order and from any thread. It is fast where the order of the
questions is that of `lanes`, which never goes back by more than a window.
"""

import collections
import contextlib
import itertools
import math
import threading
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

from jaxdist.data.sources.source import Example, independent

_AHEAD = 1024
"""How far one thread may be ahead of another, which then asks for the examples in between."""


class OpenShard(Protocol):
    """Opens a shard; see `StreamSource`."""

    def __call__(self, shard: int, start: int) -> Iterable[Example]:
        """Return the examples of a shard from number `start` on."""


class EndOfShard(Exception):
    """A shard has ended before the example that was asked for; `size` is how many it has."""

    def __init__(self, size: int):
        super().__init__(size)
        self.size = size


class _NothingThere(Exception):
    """A shard that was opened in its middle has ended before that."""


class _Cursor:
    """A shard that is being read: `place` is the number of the example that comes next."""

    def __init__(self, examples: Iterable[Example], start: int):
        self._examples, self._start, self.place = iter(examples), start, start

    def read(self) -> Example:
        """Return the next example; EndOfShard where there is none."""
        try:
            example = next(self._examples)
        except StopIteration:
            if self.place == self._start > 0:
                raise _NothingThere from None
            raise EndOfShard(self.place) from None
        self.place += 1
        return example

    def close(self) -> None:
        """Free what the iterator holds, where it can be told to."""
        with contextlib.suppress(AttributeError):
            self._examples.close()  # type: ignore[attr-defined]


class ForwardReader:
    """Reads examples by shard and number.

    Args:
      open_shard: see `StreamSource`.
      behind: how far back the next question may go; a shard is opened that much before the example asked for.
      num_kept: how many of the examples read last are kept, besides a thousand for threads that are not in step.
      num_cursors: how many shards may be open at once.
      farthest: how many examples an open shard is read on, rather than opened again farther on; None for any number,
        where opening it means to read from its beginning.
    """

    def __init__(
        self, open_shard: OpenShard, *, behind: int, num_kept: int, num_cursors: int, farthest: int | None = None
    ):
        self._open_shard, self._behind = open_shard, behind
        self._farthest = math.inf if farthest is None else farthest
        self._kept = _Kept(num_kept + _AHEAD)
        self._cursors = _Cursors(num_cursors)
        self._locks: collections.defaultdict[int, threading.Lock] = collections.defaultdict(threading.Lock)

    def get(self, shard: int, place: int) -> Example:
        """Return an example; EndOfShard where the shard has fewer."""
        found = self._kept.get((shard, place))
        if found is not None:
            return found
        with self._locks[shard]:  # another thread may be reading it just now
            found = self._kept.get((shard, place))
            return self._read(shard, place) if found is None else found

    def check_end(self, shard: int, size: int) -> bool:
        """Return whether a shard whose first `size` examples were read has no more."""
        with self._locks[shard]:
            try:
                self._read(shard, size)
            except EndOfShard:
                return True
            return False

    def _read(self, shard: int, place: int) -> Example:
        cursor = self._cursors.take(shard, place - self._farthest, place)
        if cursor is not None:
            return self._read_on(shard, cursor, place)
        start = max(0, place - self._behind)
        try:
            return self._read_on(shard, _Cursor(self._open_shard(shard, start), start), place)
        except _NothingThere:  # how many examples there are is found by counting them
            return self._read_on(shard, _Cursor(self._open_shard(shard, 0), 0), place)

    def _read_on(self, shard: int, cursor: _Cursor, place: int) -> Example:
        """Read up to an example, and keep what a question may go back to."""
        example: Any = None
        try:
            while cursor.place <= place:
                number = cursor.place
                example = cursor.read()
                if number >= place - self._behind - _AHEAD:
                    example = independent(example)
                    self._kept.put((shard, number), example)
        except BaseException:
            cursor.close()
            raise
        self._cursors.put(shard, cursor)
        return example


class _Kept:
    """The examples that were read last."""

    def __init__(self, most: int):
        self._most, self._lock = most, threading.Lock()
        self._examples: collections.OrderedDict[tuple[int, int], Example] = collections.OrderedDict()

    def get(self, key: tuple[int, int]) -> Example | None:
        return self._examples.get(key)

    def put(self, key: tuple[int, int], example: Example) -> None:
        with self._lock:
            self._examples[key] = example
            self._examples.move_to_end(key)
            while len(self._examples) > self._most:
                self._examples.popitem(last=False)


class _Cursors:
    """The open shards; the one that was not used for longest is closed when there are too many."""

    def __init__(self, most: int):
        self._most, self._lock = most, threading.Lock()
        self._open: collections.OrderedDict[int, tuple[int, _Cursor]] = collections.OrderedDict()

    def take(self, shard: int, least: float, most: int) -> _Cursor | None:
        """Return the cursor of the shard with the greatest place in [least, most], which the caller then owns."""
        with self._lock:
            fitting = [(cursor.place, key) for key, (of, cursor) in self._open.items() if of == shard]
            fitting = [(place, key) for place, key in fitting if least <= place <= most]
            return self._open.pop(max(fitting)[1])[1] if fitting else None

    def put(self, shard: int, cursor: _Cursor) -> None:
        with self._lock:
            self._open[id(cursor)] = (shard, cursor)
            closed = [self._open.popitem(last=False)[1][1] for _ in range(len(self._open) - self._most)]
        for each in closed:
            each.close()


def examples_from(examples: Iterable[Example], start: int) -> Iterator[Example]:
    """Yield the examples after the first `start`: for what can only be read from its beginning.

    Raises:
      EndOfShard: there are fewer.
    """
    iterator = iter(examples)
    skipped = sum(1 for _ in itertools.islice(iterator, start))
    if skipped < start:
        raise EndOfShard(skipped)
    yield from iterator
