import bz2
import gzip
import io
import lzma

import pytest
import zstandard

from jaxdist.data.remote import compression

CONTENT = bytes(range(256)) * 9000


def packed(suffix):
    if suffix in (".gz", ".tgz"):
        return gzip.compress(CONTENT[:1_000_000]) + gzip.compress(CONTENT[1_000_000:])
    if suffix in (".bz2", ".xz"):
        pack = bz2.compress if suffix == ".bz2" else lzma.compress
        return pack(CONTENT[:1_000_000]) + pack(CONTENT[1_000_000:])
    frames = zstandard.ZstdCompressor()
    return frames.compress(CONTENT[:1_000_000]) + frames.compress(CONTENT[1_000_000:])


@pytest.mark.parametrize("suffix", [".gz", ".tgz", ".zst", ".zstd", ".bz2", ".xz"])
def test_all_members_and_frames_are_read(suffix):
    target = io.BytesIO()
    compression.decompress(f"a.tar{suffix}", io.BytesIO(packed(suffix)), target)
    assert target.getvalue() == CONTENT


@pytest.mark.parametrize("suffix", [".gz", ".zst", ".bz2", ".xz"])
@pytest.mark.parametrize("damage", ["cut", "cut in the last part", "other content"])
def test_what_is_not_whole_is_refused(suffix, damage):
    content = packed(suffix)
    content = {"cut": content[: len(content) // 3], "cut in the last part": content[:-9]}.get(damage, b"no such format")
    with pytest.raises(ValueError, match=f"x{suffix} cannot be decompressed"):
        compression.decompress(f"x{suffix}", io.BytesIO(content), io.BytesIO())


def test_names():
    names = ["a.tar", "a.tar.gz", "a.tgz", "a.TAR.ZST", "a.jsonl.zstd"]
    assert [compression.without_compression(name) for name in names] == ["a.tar", "a.tar", "a.tar", "a.TAR", "a.jsonl"]
    assert [compression.compression_of(name) is not None for name in names] == [False, True, True, True, True]
