"""WebDataset shards read forward, without a copy: for what is read once, or does not fit on this machine."""

import functools
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jaxdist.data.remote import addresses, compression, shard_facts, tar_index
from jaxdist.data.remote.shard_names import find_shards
from jaxdist.data.remote.tar_parts import PartsDecoder
from jaxdist.data.remote.tar_source import TAR_PATTERNS
from jaxdist.data.sources.images import RGB, ImageType
from jaxdist.data.sources.source import Example
from jaxdist.data.streams.stream import StreamSource


def tar_stream(
    shards: str | os.PathLike | Sequence[str | os.PathLike],
    *,
    fields: Mapping[str, str] | None = None,
    image_type: ImageType | None = RGB,
    sizes: Sequence[int] | None = None,
    examples_per_epoch: int | None = None,
    window: int = 1024,
    lanes: int | None = None,
    sizes_folder: str | os.PathLike | None = None,
) -> StreamSource:
    """Return the stream of tar files, here or elsewhere, `.tar`, also compressed.

    >>> stream = tar_stream("https://host/train-{000..127}.tar", examples_per_epoch=100_000)

    Args:
      shards: see `TarSource`.
      fields: see `PartsDecoder`.
      image_type: see `PartsDecoder`.
      sizes: how many samples each shard has; see `StreamSource` for this and all others.
      examples_per_epoch: the length of an epoch where that is not known.
      window: the size of the shuffle buffer in samples, which it holds undecoded.
      lanes: how many shards are read side by side.
      sizes_folder: where sizes that were learned are kept.
    """
    found, decoder = find_shards(shards, *TAR_PATTERNS), PartsDecoder(fields, image_type)
    return StreamSource(
        _TarShards(tuple(found), decoder),
        num_shards=len(found),
        sizes=sizes,
        examples_per_epoch=examples_per_epoch,
        window=window,
        lanes=lanes,
        sizes_folder=sizes_folder,
        shard_names=found,
        decode_fn=_Decoder(decoder),
    )


class _TarShards:
    """Opens a shard: its samples as (name, parts)."""

    def __init__(self, names: Sequence[str], settings: PartsDecoder):
        self._names, self._settings = names, settings
        if (files := shard_facts.local_files(names)) is not None:
            self.files = files
        else:
            self.whole_fingerprint = functools.partial(shard_facts.whole_fingerprint, names)

    def fingerprint(self) -> str:
        """Return the hash of the shards' contents, see `fingerprint_shards`, and of what is made of them."""
        return shard_facts.fingerprint_shards("tar stream", self._names, self._settings)

    def __call__(self, shard: int) -> Iterator[tuple[str, dict[str, bytes]]]:
        name = self._names[shard]
        unpack = compression.compression_of(name)
        with addresses.opened(name) as file:
            content = file if unpack is None else _Pieces(compression.checked(name, unpack(file)))
            for key, parts in tar_index.read_samples(content, name):
                yield f"{name}: {key}", parts


class _Decoder:
    """Decodes what `_TarShards` yields."""

    def __init__(self, decoder: PartsDecoder):
        self._decoder = decoder

    def __call__(self, item: Any) -> Example:
        return self._decoder(*item)


class _Pieces(io.RawIOBase):
    """Pieces of bytes as a file that is read forward."""

    def __init__(self, pieces: Iterator[bytes]):
        self._pieces, self._rest = pieces, memoryview(b"")

    def readable(self) -> bool:
        """See io.RawIOBase."""
        return True

    def read(self, size: int = -1) -> bytes:
        """Return up to `size` bytes, fewer at the end only."""
        parts, missing = [], size
        while missing:
            if not self._rest:
                self._rest = memoryview(next(self._pieces, b""))
                if not self._rest:
                    break
            parts.append(bytes(self._rest[:missing]))
            self._rest, missing = self._rest[missing:], missing - len(parts[-1])
        return b"".join(parts)
