"""A stream as a source: examples that are read forward, shard by shard, and numbered so that the loader can ask.

What is promised depends on what is known, and `promise` says it: with the shards' sizes, an epoch is one pass with each
example exactly once. Without them, an epoch is a given number of examples of lanes that never end.
"""

import contextlib
import itertools
import logging
import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jaxdist.data.order import Order, Sequential
from jaxdist.data.sources import wrap
from jaxdist.data.sources.source import Example, checked_index, fingerprint_example, fingerprint_text
from jaxdist.data.sources.vocabulary import listed
from jaxdist.data.streams.endless import EndlessLane
from jaxdist.data.streams.forward import EndOfShard, ForwardReader, examples_from
from jaxdist.data.streams.kept_sizes import KeptSizes
from jaxdist.data.streams.lanes import EndlessLanes, Lanes
from jaxdist.setting_group import whole_number

_logger = logging.getLogger(__name__)

MOST_LANES = 8
"""How many lanes a stream has by default, if it has as many shards."""

_SAMPLED = 4
_FARTHEST = 1000


class StreamSource:
    """Examples that can be read forward only, from one or several shards.

    >>> stream = StreamSource(lambda shard: read_log(f"log-{shard}"), num_shards=16, sizes=[1000] * 16)

    Args:
      open_shard: called with the number of a shard, it returns an iterable of its examples, the same whenever it is
        called. With `seeks=True` it is called with (shard, start) and returns those from number `start` on.
      num_shards: what is read independently, usually files. Hosts divide them.
      sizes: how many examples each shard has (a number, where there is one shard). An epoch is then one pass.
      examples_per_epoch: the length of an epoch where the sizes are not known.
      seeks: whether a shard can be opened in its middle; otherwise it is counted from its beginning.
      window: the size of the shuffle buffer in examples, all lanes together.
      lanes: how many shards are read side by side, at least as many as processes that shall each read their own. None:
        the largest power of two up to 8 for which there are shards.
      names: of the fields, where the examples are tuples or single arrays.
      shard_names: of the shards, for messages.
      fingerprint: names the data and their version; None hashes the first examples of some shards.
      repeats: whether the same examples come whenever a shard is opened. False: they do not, and the run says so.
      decode_fn: makes an example of what `open_shard` yields, in many threads at once, while that is read by one.
      sizes_folder: where the sizes of shards that were read to their end are kept, if `sizes` are not given: a resume
        then counts the shards that were open, and none before them.

    Raises:
      ValueError: the settings contradict each other; or, when read, a shard has more or fewer examples than `sizes`.
    """

    reads_forward = True
    """The loader reads no examples far ahead, and lets no worker processes read the same shards."""

    def __init__(
        self,
        open_shard: Callable[..., Iterable[Any]],
        *,
        num_shards: int = 1,
        sizes: Sequence[int] | int | None = None,
        examples_per_epoch: int | None = None,
        seeks: bool = False,
        window: int = 1024,
        lanes: int | None = None,
        names: Sequence[str] = (),
        shard_names: Sequence[str] = (),
        fingerprint: str | None = None,
        repeats: bool = True,
        decode_fn: Callable[[Any], Example] | None = None,
        sizes_folder: str | os.PathLike | None = None,
    ):
        self._open_shard, self._seeks, self._names = open_shard, seeks, listed(names, what="`names`")
        self._decode_fn, self._sizes_folder = decode_fn, sizes_folder
        self.num_shards = whole_number("num_shards", num_shards)
        self.sizes = _checked_sizes(sizes, examples_per_epoch, num_shards)
        self._size = (
            sum(self.sizes) if self.sizes is not None else whole_number("examples_per_epoch", examples_per_epoch)
        )
        usual = min(MOST_LANES, 1 << (num_shards.bit_length() - 1))
        self.lanes = usual if lanes is None else _checked_lanes(lanes, num_shards, self.sizes)
        self.window = max(1, whole_number("window", window) // self.lanes)
        self._shard_names, self._given_fingerprint, self._repeats = tuple(shard_names), fingerprint, repeats
        self.vocabulary: Mapping[str, tuple[str, ...]] = {}
        for name in ("files", "whole_fingerprint"):  # what is known of shards that are files
            if hasattr(open_shard, name):
                setattr(self, name, getattr(open_shard, name))
        if not repeats:
            self.whole_fingerprint = self._no_fingerprint
        self._begin()

    def _begin(self) -> None:
        """Make what is not carried to other processes."""
        self._reader = ForwardReader(
            self.open_at,
            behind=self.window,
            num_kept=2 * self.window * self.lanes,
            num_cursors=2 * self.lanes + 2,
            farthest=self.window + _FARTHEST if self._seeks else None,
        )
        self._opened: dict[int, Callable[[], Any]] = {}
        self._beginnings: dict[int, str] = {}
        self._ends = list(itertools.accumulate(self.sizes or ()))
        learned = KeptSizes(self._sizes_folder, self.fingerprint)
        self._endless = [
            EndlessLane(lane, range(lane, self.num_shards, self.lanes), self._reader, learned, self.shard_name)
            for lane in range(self.lanes if self.sizes is None else 0)
        ]

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> Example:
        if self.sizes is None:
            place, lane = divmod(int(index), self.lanes)
            return self._decoded(self._endless[lane].get(place))
        shard, number = self._place(index)
        size = self.sizes[shard]
        try:
            example = self._reader.get(shard, number)
        except EndOfShard as end:
            raise ValueError(_wrong_size(self.shard_name(shard), size, str(end.size))) from None
        if number == size - 1 and not self._reader.check_end(shard, size):
            raise ValueError(_wrong_size(self.shard_name(shard), size, f"more than {size}"))
        return self._decoded(example)

    def _place(self, index: int) -> tuple[int, int]:
        """Return the shard of an example and its number in it."""
        assert self.sizes is not None
        index = checked_index(index, self._size)
        shard = int(np.searchsorted(self._ends, index, side="right"))
        return shard, index - self._ends[shard] + self.sizes[shard]

    def open_at(self, shard: int, start: int) -> Iterable[Example]:
        """Return the examples of a shard from number `start` on."""
        made = _checked_iterable(self._open_shard(shard, start) if self._seeks else self._open_shard(shard))
        before = self._opened.get(shard, lambda: None)()
        if made is before and hasattr(made, "__next__"):
            raise ValueError(
                f"open_shard({shard}) returned the iterator that it had returned before, which is used up. Make a new "
                "one whenever it is called."
            )
        with contextlib.suppress(TypeError):  # what cannot be referred to so is no generator
            self._opened[shard] = weakref.ref(made)
        examples = made if self._seeks else examples_from(made, start)
        return self._beginning_alike(shard, examples) if start == 0 and self._repeats else examples

    def _beginning_alike(self, shard: int, examples: Iterable[Example]) -> Iterator[Example]:
        """Yield the examples of a shard; ValueError where the first differs from that of an earlier time."""
        iterator = iter(examples)
        for first in itertools.islice(iterator, 1):
            now = fingerprint_example(first)
            if self._beginnings.setdefault(shard, now) != now:
                raise ValueError(
                    f"{self.shard_name(shard)} begins with another example than the last time that it was opened. A "
                    "stream has the same examples whenever it is opened: remove what is random in it, since the order "
                    "is shuffled by its window, or say repeats=False, and nothing is promised of each example."
                )
            yield first
        yield from iterator

    def _decoded(self, item: Any) -> Example:
        """Return the example of an item: in any thread, while items are read by one at a time."""
        if self._decode_fn is not None:
            return self._decode_fn(item)
        if isinstance(item, Mapping):
            return item
        return wrap.named(item, self._names, of="Examples of this stream")

    def shard_name(self, shard: int) -> str:
        """Return the name of a shard for messages."""
        return self._shard_names[shard] if self._shard_names else f"shard {shard}"

    def location(self, index: int) -> str:
        """Return the shard of an example, and its number in it."""
        if self.sizes is None:
            return f"lane {index % self.lanes} of the stream, number {index // self.lanes} of it"
        shard, number = self._place(index)
        return f"{self.shard_name(shard)}, number {number} of it"

    def order(self, *, shuffle: bool = True) -> Order:
        """Return the order in which shards are read forward, side by side."""
        if self.sizes is None:
            return EndlessLanes(self.lanes, self.window if shuffle else 1)
        return Lanes(self.sizes, self.lanes, self.window) if shuffle else Sequential()

    def check_order(self, order: Order) -> None:
        """Raise ValueError unless examples are asked for in an order in which they can be read."""
        if order not in (self.order(shuffle=True), self.order(shuffle=False)):
            raise ValueError(
                f"A stream is read forward, in the order of its own lanes and window; got {order}. Leave data.order "
                "out and set the stream's `window`, or write the examples to files (`jaxdist data prepare`)."
            )

    @property
    def promise(self) -> str:
        """What holds of each example, in a line for the run's header; "" where it is exactly once, as elsewhere."""
        if not self._repeats:
            return "a stream that differs whenever it is opened: after a stop, examples may be lost or come twice"
        if self.sizes is not None:
            return ""
        passes = "passes over its examples" if self.lanes == 1 else f"passes over each of its {self.lanes} lanes"
        once = (
            "" if self.lanes == 1 else "; lanes with fewer examples come around sooner, so exactly once does not hold"
        )
        return f"a stream of unknown size, {self._size:,} examples an epoch: {passes} follow each other{once}"

    def fingerprint(self) -> str:
        """Return the hash of the shards' names and sizes, and of the first examples of up to eight spread shards.

        Where the shards are files, their sizes and contents are taken in place of examples, see `shard_facts`.
        """
        layout = (self.num_shards, self.sizes, self._size if self.sizes is None else "", *self._shard_names)
        if self._given_fingerprint is not None:
            return fingerprint_text("stream", *layout, self._given_fingerprint)
        if not self._repeats:
            return fingerprint_text("stream", *layout)
        if hasattr(self._open_shard, "fingerprint"):
            return fingerprint_text("stream", *layout, self._open_shard.fingerprint())
        shards = np.unique(np.linspace(0, self.num_shards - 1, min(self.num_shards, MOST_LANES), dtype=np.int64))
        first = {shard: self._first(shard) for shard in shards.tolist()}
        if self._seeks:
            self._check_seeks(first)
        examples = itertools.chain.from_iterable(first.values())
        return fingerprint_text("stream", *layout, *map(fingerprint_example, examples))

    def _no_fingerprint(self) -> str:
        _logger.warning("--strict cannot compare the contents of a stream that differs whenever it is opened.")
        return "differs"

    def _first(self, shard: int) -> list[Example]:
        """Return the first examples of a shard."""
        found: list[Example] = []
        try:
            while len(found) < _SAMPLED:
                found.append(self._decoded(self._reader.get(shard, len(found))))
        except EndOfShard:
            return found
        except Exception as error:  # whatever the user's function raises: say which shard it was
            raise ValueError(f"{self.shard_name(shard)} cannot be read: {type(error).__name__}: {error}") from error
        return found

    def _check_seeks(self, first: Mapping[int, Sequence[Example]]) -> None:
        """Raise ValueError where a shard, opened at its second example, begins with another."""
        shard = next((shard for shard, examples in first.items() if len(examples) > 1), None)
        if shard is None:
            return
        found = next(iter(self._open_shard(shard, 1)), None)
        if found is None or fingerprint_example(self._decoded(found)) != fingerprint_example(first[shard][1]):
            raise ValueError(
                f"{self.shard_name(shard)} opened at number 1 does not begin with the second of its examples. With "
                "seeks=True, open_shard(shard, start) returns those from number `start` on; leave seeks out if it "
                "cannot."
            )

    def __getstate__(self) -> dict:
        dropped = ("_reader", "_endless", "_ends", "_opened", "_beginnings")
        return {name: value for name, value in self.__dict__.items() if name not in dropped}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._begin()


def _checked_lanes(lanes: int, num_shards: int, sizes: Sequence[int] | None) -> int:
    lanes = whole_number("lanes", lanes)
    if sizes is None and lanes > num_shards:
        raise ValueError(
            f"A lane of a stream of unknown size needs a shard of its own: there are {num_shards}; got lanes={lanes}. "
            "Use fewer lanes, or give `sizes`."
        )
    return lanes


def _checked_sizes(
    sizes: Sequence[int] | int | None, examples_per_epoch: int | None, num_shards: int
) -> tuple[int, ...] | None:
    if (sizes is None) == (examples_per_epoch is None):
        raise ValueError(
            "A stream needs to know how long an epoch is: give either `sizes`, how many examples each shard has, for "
            "epochs with each example exactly once, or `examples_per_epoch`, for any other length. "
            f"Got {'neither' if sizes is None else 'both'}."
        )
    if sizes is None:
        return None
    found: tuple[Any, ...] = tuple(sizes) if isinstance(sizes, Iterable) else (sizes,)
    whole = all(isinstance(size, int | np.integer) and not isinstance(size, bool) and size >= 0 for size in found)
    if len(found) != num_shards or not whole or sum(found) < 1:
        raise ValueError(
            f"sizes has the number of examples of each of the {num_shards} shards, not all of them 0; got "
            f"{list(found[:8])}{' ...' if len(found) > 8 else ''} ({len(found)} sizes)."
        )
    return tuple(map(int, found))


def _checked_iterable(examples: Any) -> Iterable[Any]:
    if not hasattr(examples, "__iter__"):
        raise ValueError(
            f"open_shard returns an iterable of examples; it returned an object of {type(examples).__name__}."
        )
    return examples


def _wrong_size(shard: str, expected: int, found: str) -> str:
    return (
        f"{shard} has {found} examples, and sizes says {expected}. Correct `sizes` (`data.count_examples` counts "
        "them), or copy the shard again if it is not whole."
    )
