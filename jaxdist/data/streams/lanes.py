"""The order of streams: pure functions like those of `order`, made so that shards are read forward, side by side.

A *lane* is a sequence of examples that is read forward. Position p of an epoch belongs to lane p mod num_lanes, so all
lanes advance together. Within a batch the rows of a lane are neighbours; where the number of lanes is a multiple of the
number of processes, each process reads lanes of its own. The lanes never depend on the number of processes, and
neither does any batch.

The shuffle buffer is a *window*: runs of `window` examples of a lane, each run permuted in itself. Where the runs begin
differs in every epoch. The examples of a window are known without reading it, so a place in the middle of an epoch
needs no history: a reader goes back by less than a window.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterator

import numpy as np

from jaxdist.data import order
from jaxdist.data.order import BatchIds, Permutation

LANES_VERSION = 1
"""Changes whenever the same arguments would give other ids, so that a stored position is never misread."""

_IDS_AT_A_TIME = 4096


@dataclasses.dataclass(frozen=True)
class Lanes(order.Contiguous):
    """The order of shards whose sizes are known: an epoch is one pass, with each example exactly once.

    The shards, in another order in every epoch, are laid end to end, and the whole is cut into lanes of equal length.
    A lane may begin within a shard.

    Attributes:
      sizes: examples of each shard, in the order of their ids.
      num_lanes: see above.
      window: examples of a lane that are shuffled together; 1 keeps their order.
    """

    sizes: tuple[int, ...]
    num_lanes: int
    window: int

    @property
    def version(self) -> str:
        """See Order."""
        sizes = hashlib.sha256(str(self.sizes).encode()).hexdigest()[:8]
        return f"lanes-{LANES_VERSION}:{self.num_lanes} of {len(self.sizes)} shards {sizes}, window {self.window}"

    def __call__(self, num_examples: int, seed: int, epoch: int, start: int, stop: int) -> np.ndarray:
        """Return the ids at positions [start, stop) of the epoch, int64."""
        if num_examples != sum(self.sizes):
            raise ValueError(f"The shards have {sum(self.sizes)} examples in all; got num_examples={num_examples}.")
        places, lanes = np.divmod(np.arange(start, stop, dtype=np.int64), self.num_lanes)
        each, longer = divmod(num_examples, self.num_lanes)
        shuffled = np.empty_like(places)
        for lane in range(self.num_lanes):
            mine = lanes == lane
            length = each + (lane < longer)
            name = ("lanes", seed, epoch, lane)
            shuffled[mine] = lane * each + min(lane, longer) + in_windows(places[mine], self.window, length, *name)
        return self._ids(shuffled, seed, epoch)

    def _ids(self, places: np.ndarray, seed: int, epoch: int) -> np.ndarray:
        """Return the ids at places of the shards laid end to end."""
        sizes = np.asarray(self.sizes, np.int64)
        shards = Permutation.make(len(sizes), "shards", seed, epoch)(np.arange(len(sizes), dtype=np.int64))
        ends = np.cumsum(sizes[shards])
        found = np.searchsorted(ends, places, side="right")
        first_ids = np.cumsum(sizes) - sizes
        chosen = shards[found]
        return first_ids[chosen] + places - (ends[found] - sizes[chosen])

    def batches(self, num_examples: int, seed: int, epoch: int, start: int, size: int) -> Iterator[BatchIds]:
        """See Order."""
        ids_at = functools.partial(self, num_examples, seed, epoch)
        return _batches(ids_at, num_examples, self.num_lanes, 0, start, size)


@dataclasses.dataclass(frozen=True)
class EndlessLanes(order.Contiguous):
    """The order of shards whose sizes are unknown: each lane repeats its own shards, and an epoch has a given length.

    The id of a lane's n-th example since the beginning is n * num_lanes + lane, so ids rise from epoch to epoch.
    """

    num_lanes: int
    window: int

    @property
    def version(self) -> str:
        """See Order."""
        return f"endless-{LANES_VERSION}:{self.num_lanes} lanes, window {self.window}"

    def __call__(self, num_examples: int, seed: int, epoch: int, start: int, stop: int) -> np.ndarray:
        """Return the ids at positions [start, stop) of the epoch, int64."""
        first = epoch * num_examples
        places, lanes = np.divmod(np.arange(first + start, first + stop, dtype=np.int64), self.num_lanes)
        ids = np.empty_like(places)
        for lane in range(self.num_lanes):
            mine = lanes == lane
            shuffled = in_windows(places[mine], self.window, None, "endless", seed, lane)
            ids[mine] = shuffled * self.num_lanes + lane
        return ids

    def batches(self, num_examples: int, seed: int, epoch: int, start: int, size: int) -> Iterator[BatchIds]:
        """See Order."""
        ids_at = functools.partial(self, num_examples, seed, epoch)
        first_lane = epoch * num_examples % self.num_lanes
        return _batches(ids_at, num_examples, self.num_lanes, first_lane, start, size)


def in_windows(places: np.ndarray, window: int, length: int | None, *name: str | int) -> np.ndarray:
    """Return where the examples at `places` of a lane come from: each window of the lane is permuted in itself.

    The first and the last window may be shorter. `length` is None where the lane never ends; `name` is that of the lane
    in this epoch, since each has windows of its own.
    """
    if window <= 1 or not len(places):
        return places
    # The first window is cut at a random place, so that no two examples are apart in every epoch.
    cut = Permutation.make(window, "window", *name).offset
    numbers = (places + cut) // window
    found = np.empty_like(places)
    for number in np.unique(numbers).tolist():
        begin, end = max(number * window - cut, 0), (number + 1) * window - cut
        end = end if length is None else min(end, length)
        inside = numbers == number
        permutation = Permutation.make(end - begin, "in window", *name, number)
        found[inside] = begin + permutation(places[inside] - begin)
    return found


def _batches(
    ids_at: Callable[[int, int], np.ndarray], num_examples: int, num_lanes: int, first_lane: int, start: int, size: int
) -> Iterator[BatchIds]:
    """Yield the batches whose positions are consecutive and whose rows are sorted by lane.

    A row without an example is padded with the last one of its lane, which the process of that row has read.
    """
    last_of_lane = _last_of_lanes(ids_at, num_examples, num_lanes, first_lane)
    run = max(_IDS_AT_A_TIME // size, 1) * size
    for begin in range(start, num_examples, run):
        ids = ids_at(begin, min(begin + run, num_examples))
        for first in range(0, len(ids), size):
            positions = begin + first + np.arange(size, dtype=np.int64)
            lanes = (first_lane + positions) % num_lanes
            rows = np.argsort(lanes, kind="stable")
            true = positions < num_examples
            padded = last_of_lane[lanes]
            padded[true] = ids[first : first + size]
            yield BatchIds(padded[rows], true[rows].astype(np.float32), int(positions[true][-1]) + 1)


def _last_of_lanes(
    ids_at: Callable[[int, int], np.ndarray], num_examples: int, num_lanes: int, first_lane: int
) -> np.ndarray:
    """Return the id of the last example of each lane in the epoch; that of another where it has none."""
    begin = max(num_examples - num_lanes, 0)
    ids = ids_at(begin, num_examples)
    found = np.full(num_lanes, ids[0], np.int64)
    found[(first_lane + np.arange(begin, num_examples)) % num_lanes] = ids
    return found
