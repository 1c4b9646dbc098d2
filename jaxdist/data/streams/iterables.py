"""Streams of what others give: any iterable that can be iterated again, and Hugging Face's streaming data sets."""

import itertools
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from jaxdist.data.sources.source import Example, fingerprint_example, fingerprint_text
from jaxdist.data.streams.equivalents import reads_forward
from jaxdist.data.streams.kept_states import KeptState, KeptStates
from jaxdist.data.streams.stream import StreamSource

_logger = logging.getLogger(__name__)

STATE_EVERY = 10_000
"""After how many examples of a shard the state of its data set is noted."""

MANY_EXAMPLES = 1_000_000
"""After how many examples of a shard, and then each time that they have doubled, `count_examples` says so."""

_FOLLOWING = 8
"""How many examples say that a state is true."""


def iterable_stream(
    iterable: Iterable[Any],
    *,
    sizes: int | None = None,
    examples_per_epoch: int | None = None,
    window: int = 1024,
    names: Sequence[str] = (),
    fingerprint: str | None = None,
    repeats: bool = True,
) -> StreamSource:
    """Return the stream of an iterable such as torch's IterableDataset: one shard, read by every process.

    >>> stream = iterable_stream(torch_iterable_dataset, names=("image", "label"), examples_per_epoch=50_000)

    Args:
      iterable: each `iter()` of it begins anew.
      sizes: how many examples it has; see `StreamSource` for this and all others.
      examples_per_epoch: the length of an epoch where that is not known.
      window: the size of the shuffle buffer in examples.
      names: of the fields, where the examples are tuples or single arrays.
      fingerprint: names the data and their version.
      repeats: whether the same examples come each time.

    Raises:
      ValueError: this can be iterated once only, or not at all.
    """
    if not hasattr(iterable, "__iter__") or hasattr(iterable, "__next__"):
        what = "can be iterated once only" if hasattr(iterable, "__next__") else "cannot be iterated"
        raise ValueError(
            f"A stream is opened at every start and in every epoch, and an object of {type(iterable).__name__} {what}. "
            "Give the function that makes it: data.StreamSource(lambda shard: make_examples(), ...)."
        )
    return StreamSource(
        _SameIterable(iterable),
        sizes=sizes,
        examples_per_epoch=examples_per_epoch,
        window=window,
        names=names,
        fingerprint=fingerprint,
        repeats=repeats,
    )


class _SameIterable:
    """Opens the one shard of an iterable; a class, since worker processes cannot be sent a local function."""

    def __init__(self, iterable: Iterable[Any]):
        self._iterable = iterable

    def __call__(self, shard: int) -> Iterable[Any]:
        return self._iterable


def hugging_face_stream(
    dataset: Any,
    *,
    sizes: Sequence[int] | int | None = None,
    examples_per_epoch: int | None = None,
    window: int = 1024,
    lanes: int | None = None,
    sizes_folder: str | os.PathLike | None = None,
    fingerprint: str | None = None,
) -> StreamSource:
    """Return the stream of a Hugging Face IterableDataset (`streaming=True`), its files divided over hosts.

    >>> texts = datasets.load_dataset("allenai/c4", "en", split="train", streaming=True)
    >>> stream = hugging_face_stream(texts, examples_per_epoch=1_000_000)

    Args:
      dataset: has `num_shards`, `shard(num_shards, index)` and, to begin in the middle of a shard, `skip(n)`. Where it
        has `state_dict()`, that is noted every ten thousand examples of a shard, and continued from.
      sizes: how many examples each of its shards has; `count_examples` counts them. See `StreamSource` for all others.
      examples_per_epoch: the length of an epoch where that is not known.
      window: the size of the shuffle buffer in examples, all lanes together.
      lanes: how many shards are read side by side.
      sizes_folder: where sizes that were learned are kept, and states; None keeps states in the user's cache folder.
      fingerprint: names the data and their version.

    Raises:
      ValueError: this is not such a data set.
    """
    num_shards = getattr(dataset, "num_shards", None) or getattr(dataset, "n_shards", None)
    if num_shards is None or not hasattr(dataset, "shard") or not reads_forward(dataset):
        raise ValueError(
            f"A streaming data set of Hugging Face has num_shards and shard(); got {type(dataset).__name__}. One that "
            "is not streaming needs no stream: give it as it is."
        )
    seeks = hasattr(dataset, "skip")
    return StreamSource(
        _HuggingFaceShards(dataset, num_shards, sizes_folder) if seeks else _CountedShards(dataset, num_shards),
        num_shards=num_shards,
        sizes=sizes,
        examples_per_epoch=examples_per_epoch,
        seeks=seeks,
        window=window,
        lanes=lanes,
        sizes_folder=sizes_folder,
        fingerprint=fingerprint,
    )


class _HuggingFaceShards:
    """Opens a shard at any place: from a state of the data set that is known to be close, or by its `skip`."""

    def __init__(self, dataset: Any, num_shards: int, folder: str | os.PathLike | None):
        self._dataset, self._num_shards = dataset, num_shards
        self._states = KeptStates(folder, self._name) if _has_states(dataset) else None

    def __call__(self, shard: int, start: int) -> Iterator[Example]:
        opened = self._open(shard)
        if self._states is None:
            return iter(opened.skip(start) if start else opened)
        while start and (kept := self._states.newest(shard, start)) is not None:
            opened.load_state_dict(kept.state)
            examples = iter(opened)
            first = list(itertools.islice(examples, len(kept.following)))
            if list(map(fingerprint_example, first)) == kept.following:
                rest = self._noting(opened, examples, shard, kept.number + len(first))
                return itertools.islice(itertools.chain(first, rest), start - kept.number, None)
            self._states.drop(shard, kept.number)  # of other data, or of a data set that shuffles in a buffer
            opened = self._open(shard)
        # `skip` would read as much, and its state would not be one of this data set.
        return itertools.islice(self._noting(opened, iter(opened), shard, 0), start, None)

    def _open(self, shard: int) -> Any:
        return self._dataset.shard(num_shards=self._num_shards, index=shard)

    def _noting(self, opened: Any, examples: Iterator[Example], shard: int, number: int) -> Iterator[Example]:
        """Yield the examples from `number` on, and note where the data set is at some of them."""
        assert self._states is not None
        waiting: KeptState | None = None
        while True:
            if number and number % STATE_EVERY == 0 and waiting is None and not self._states.has(shard, number):
                waiting = KeptState(number, opened.state_dict(), [])
            try:
                example = next(examples)
            except StopIteration:
                return
            if waiting is not None:
                waiting.following.append(fingerprint_example(example))
                if len(waiting.following) == _FOLLOWING:
                    self._states.note(shard, waiting)
                    waiting = None
            yield example
            number += 1

    def _name(self) -> str:
        """Return the name of the data set: of its first example, which is read here once more."""
        first: Any = next(iter(self._open(0)), {})
        return fingerprint_text("states", self._num_shards, fingerprint_example(first))


def _has_states(dataset: Any) -> bool:
    return hasattr(dataset, "state_dict") and hasattr(dataset, "load_state_dict")


class _CountedShards:
    """Opens a shard at its beginning."""

    def __init__(self, dataset: Any, num_shards: int):
        self._dataset, self._num_shards = dataset, num_shards

    def __call__(self, shard: int) -> Iterator[Example]:
        return iter(self._dataset.shard(num_shards=self._num_shards, index=shard))


def count_examples(stream: StreamSource) -> list[int]:
    """Return how many examples each shard of a stream has, by reading all of it once; keep the result as `sizes`.

    A shard that never ends is never counted: warnings say how many examples it has given.
    """
    return [_counted(stream, shard) for shard in range(stream.num_shards)]


def _counted(stream: StreamSource, shard: int) -> int:
    number, told = 0, MANY_EXAMPLES
    for number, _ in enumerate(stream.open_at(shard, 0), 1):
        if number == told:
            told *= 2
            _logger.warning(
                "%s has given %s examples. If it never ends, give `examples_per_epoch` in place of sizes.",
                stream.shard_name(shard),
                f"{number:,}",
            )
    return number
