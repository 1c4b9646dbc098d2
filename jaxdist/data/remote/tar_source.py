"""WebDataset shards with random access: tar files, here or elsewhere, plain or compressed, read by an index."""

import bisect
import collections
import functools
import itertools
import os
import threading
from collections.abc import Mapping, Sequence

from jaxdist.data.order import Order, Sequential, Shuffled
from jaxdist.data.remote import addresses, compression, shard_facts, tar_index
from jaxdist.data.remote.file_cache import FileCache, HeldFile
from jaxdist.data.remote.shard_names import find_shards
from jaxdist.data.remote.tar_index import TarSample
from jaxdist.data.remote.tar_parts import PartsDecoder
from jaxdist.data.sources.images import RGB, ImageType
from jaxdist.data.sources.source import CorruptExample, Example, checked_index
from jaxdist.data.streams.lanes import Lanes

TAR_PATTERNS = ("*.tar", "*.tar.gz", "*.tgz", "*.tar.bz2", "*.tar.xz", "*.tar.zst", "*.tar.zstd")
"""Not `*.tar*`, which also means indices and copies beside the shards."""
_NUM_OPEN = 32


class TarSource:
    """The samples of tar files, as WebDataset writes them, each exactly once an epoch.

    >>> source = TarSource("s3://bucket/train-{000..127}.tar", fields={"image": "jpg", "label": "cls"})

    Plain tar files on this machine are read where they are. Others are copied to a cache when they are first needed,
    decompressed; shards are then read side by side in lanes (see `streams.lanes`), so a host copies few at a time.

    Args:
      shards: paths, addresses that fsspec knows, a folder of tar files, or ranges; `.tar`, also with `.gz`, `.zst`,
        `.bz2` or `.xz`.
      fields, image_type: see `PartsDecoder`.
      sizes: how many samples each shard has. None reads the index of every shard at the start: quick for plain files
        here, while the others are copied for it once and their indices kept.
      cache: of the copies; None is `FileCache()`.
      window: samples that are shuffled together, where shards are read in lanes.
      lanes: how many shards are read side by side.

    Raises:
      ValueError: a shard is missing, is not whole, or has another number of samples than `sizes`.
    """

    def __init__(
        self,
        shards: str | os.PathLike | Sequence[str | os.PathLike],
        *,
        fields: Mapping[str, str] | None = None,
        image_type: ImageType | None = RGB,
        sizes: Sequence[int] | None = None,
        cache: FileCache | None = None,
        window: int = 16_384,
        lanes: int = 8,
    ):
        self.shards = find_shards(shards, *TAR_PATTERNS)
        self._decoder = PartsDecoder(fields, image_type)
        self._cache = cache
        self._sizes = tuple(map(int, sizes)) if sizes is not None else None
        if self._sizes is not None and len(self._sizes) != len(self.shards):
            raise ValueError(f"sizes has a number for each of the {len(self.shards)} shards; got {len(self._sizes)}.")
        self._lanes, self._window = max(1, min(lanes, len(self.shards))), window
        self.vocabulary: Mapping[str, tuple[str, ...]] = {}
        self._fingerprint: str | None = None
        if (files := shard_facts.local_files(self.shards)) is not None:
            self.files = files
        else:
            self.whole_fingerprint = functools.partial(shard_facts.whole_fingerprint, self.shards)
        self._begin()
        self.sizes = tuple(len(self._index(n)) for n in range(len(self.shards))) if sizes is None else self._sizes
        self._ends = list(itertools.accumulate(self.sizes or ()))
        if not len(self):
            raise ValueError(f"The shards have no samples: {', '.join(self.shards[:3])}.")

    def _begin(self) -> None:
        """Make what is not carried to other processes."""
        self._locks = [threading.Lock() for _ in self.shards]
        self._indices: dict[int, list[TarSample]] = {}
        self._open: collections.OrderedDict[int, HeldFile] = collections.OrderedDict()
        self._open_lock = threading.Lock()

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Example:
        shard, place = self._place(index)
        sample = self._index(shard)[place]
        name = f"{self.shards[shard]}: {sample.key}"
        chosen = self._decoder.chosen(name, sample.parts)
        wanted = {extension: sample.parts[extension] for extension in chosen.values()}
        return self._decoder(name, {extension: self._read(shard, *place) for extension, place in wanted.items()})

    def location(self, index: int) -> str:
        """Return the shard of a sample, and its number in it."""
        shard, place = self._place(index)
        return f"{self.shards[shard]}, sample {place}"

    def order(self, *, shuffle: bool = True) -> Order:
        """Return the order of the examples: in lanes where shards are copied, so that few are needed at a time."""
        if not shuffle:
            return Sequential()
        if not any(map(_needs_copy, self.shards)):
            return Shuffled()
        return Lanes(tuple(self.sizes or ()), self._lanes, max(1, self._window // self._lanes))

    def fingerprint(self) -> str:
        """Return the hash of the shards' names, numbers of samples and contents; see `fingerprint_shards`."""
        if self._fingerprint is None:
            self._fingerprint = shard_facts.fingerprint_shards("tar", self.shards, self.sizes, self._decoder)
        return self._fingerprint

    def _place(self, index: int) -> tuple[int, int]:
        index = checked_index(index, len(self))
        shard = bisect.bisect_right(self._ends, index)
        return shard, index - (self._ends[shard - 1] if shard else 0)

    def _index(self, shard: int) -> list[TarSample]:
        """Return the samples of a shard, after reading its index if this process has not."""
        with self._locks[shard]:
            if shard not in self._indices:
                name = self.shards[shard]
                self._indices[shard] = self._kept_index(shard) if _needs_copy(name) else self._read_index(shard)
                found = len(self._indices[shard])
                if self._sizes is not None and found != self._sizes[shard]:
                    raise ValueError(
                        f"{name} has {found} samples, and sizes says {self._sizes[shard]}. Correct `sizes`, or copy "
                        "the shard again."
                    )
            return self._indices[shard]

    def _kept_index(self, shard: int) -> list[TarSample]:
        """Return the index of a shard that is copied, without a copy where it was read before."""
        self._cache = self._cache or FileCache()
        text = self._cache.kept_text(self.shards[shard], ".index", lambda: tar_index.to_json(self._read_index(shard)))
        return tar_index.from_json(text)

    def _read_index(self, shard: int) -> list[TarSample]:
        held = self._file(shard)
        with open(os.dup(held.fd), "rb") as file:
            file.seek(0)
            return tar_index.index_tar(file, self.shards[shard])

    def _read(self, shard: int, offset: int, size: int) -> bytes:
        held = self._file(shard)  # a reference, so that it stays open
        content = os.pread(held.fd, size, offset)
        if len(content) != size:
            raise CorruptExample(f"{self.shards[shard]} ends within a sample. It was changed while it was read.")
        return content

    def _file(self, shard: int) -> HeldFile:
        """Return the open file of a shard; those used last stay open."""
        with self._open_lock:
            if shard in self._open:
                self._open.move_to_end(shard)
                return self._open[shard]
        name = self.shards[shard]
        if _needs_copy(name):
            self._cache = self._cache or FileCache()
            file = self._cache.open(name)
        else:
            try:
                file = open(name, "rb")  # noqa: SIM115
            except OSError as error:
                raise ValueError(f"No such shard: {name}.") from error
        with self._open_lock:
            held = self._open.setdefault(shard, HeldFile(file))
            while len(self._open) > max(_NUM_OPEN, 2 * self._lanes):
                self._open.popitem(last=False)
        return held

    def __getstate__(self) -> dict:
        dropped = ("_locks", "_indices", "_open", "_open_lock", "_cache")
        limits = None if self._cache is None else (self._cache.folder, self._cache.limit)
        return {name: value for name, value in self.__dict__.items() if name not in dropped} | {"_cache": limits}

    def __setstate__(self, state: dict) -> None:
        limits = state["_cache"]
        self.__dict__.update(state)
        self._cache = None if limits is None else FileCache(limits[0], limit_gb=limits[1] / 10**9)
        self._begin()


def _needs_copy(name: str) -> bool:
    return addresses.is_address(name) or compression.compression_of(name) is not None
