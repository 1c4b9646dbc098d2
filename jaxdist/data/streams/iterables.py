"""Streams of what others give: any iterable that can be iterated again, and Hugging Face's streaming data sets."""

import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from jaxdist.data.sources.source import Example
from jaxdist.data.streams.equivalents import reads_forward
from jaxdist.data.streams.stream import StreamSource


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
      dataset: has `num_shards`, `shard(num_shards, index)` and, to begin in the middle of a shard quickly, `skip(n)`.
      sizes: how many examples each of its shards has; `count_examples` counts them. See `StreamSource` for all others.
      examples_per_epoch: the length of an epoch where that is not known.
      window: the size of the shuffle buffer in examples, all lanes together.
      lanes: how many shards are read side by side.
      sizes_folder: where sizes that were learned are kept.
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
        _HuggingFaceShards(dataset, num_shards) if seeks else _CountedShards(dataset, num_shards),
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
    """Opens a shard at any place."""

    def __init__(self, dataset: Any, num_shards: int):
        self._dataset, self._num_shards = dataset, num_shards

    def __call__(self, shard: int, start: int) -> Iterator[Example]:
        opened = self._dataset.shard(num_shards=self._num_shards, index=shard)
        return iter(opened.skip(start) if start else opened)


class _CountedShards:
    """Opens a shard at its beginning."""

    def __init__(self, dataset: Any, num_shards: int):
        self._dataset, self._num_shards = dataset, num_shards

    def __call__(self, shard: int) -> Iterator[Example]:
        return iter(self._dataset.shard(num_shards=self._num_shards, index=shard))


def count_examples(stream: StreamSource) -> list[int]:
    """Return how many examples each shard of a stream has, by reading all of it once; keep the result as `sizes`."""
    return [sum(1 for _ in stream.open_at(shard, 0)) for shard in range(stream.num_shards)]
