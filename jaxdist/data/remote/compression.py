"""Compressed files: by Python's own modules, Zstandard by the package zstandard, which only this module imports."""

import bz2
import functools
import gzip
import lzma
import zlib
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

from jaxdist import extras

_CHUNK = 2**20


def compression_of(name: str) -> Callable[[BinaryIO], Iterator[bytes]] | None:
    """Return what decompresses a file of this name; None where it is not compressed.

    What is returned yields the content in pieces, and raises EOFError where the file is not whole, or another error of
    its library.
    """
    return next((unpack for suffix, _, unpack in _KINDS if name.lower().endswith(suffix)), None)


def without_compression(name: str) -> str:
    """Return the name of the file's content."""
    for suffix, other, _ in _KINDS:
        if name.lower().endswith(suffix):
            return name[: -len(suffix)] + other
    return name


def decompress(address: str, source: BinaryIO, target: BinaryIO) -> None:
    """Write the content of a compressed file to `target`; ValueError where it is not whole."""
    unpack = compression_of(address)
    assert unpack is not None
    for piece in checked(address, unpack(source)):
        target.write(piece)


def checked(address: str, pieces: Iterator[bytes]) -> Iterator[bytes]:
    """Yield the pieces; ValueError, naming the file, where it is not whole."""
    try:
        yield from pieces
    except (EOFError, OSError, zlib.error, lzma.LZMAError, _zstd_error()) as error:
        raise ValueError(
            f"{address} cannot be decompressed: {error}. It is not whole, or its name ends in another way than its "
            "compression. Copy it again."
        ) from error


def _zstd_error() -> type[Exception]:
    try:
        return extras.require("zstandard", extra="remote").ZstdError
    except extras.MissingExtra:
        return EOFError  # no such error can be raised without it


def _pieces(library: Callable[[BinaryIO], Any], source: BinaryIO) -> Iterator[bytes]:
    with library(source) as unpacked:
        while piece := unpacked.read(_CHUNK):
            yield piece


def _unzstd(source: BinaryIO) -> Iterator[bytes]:
    """Yield the content of all frames; the library's own readers take a frame that is cut off for a whole one."""
    decompressor = extras.require("zstandard", extra="remote").ZstdDecompressor()
    frame, waiting = None, b""
    while data := waiting or source.read(_CHUNK):
        frame = frame or decompressor.decompressobj()
        yield frame.decompress(data)
        waiting = b""
        if frame.eof:
            waiting = frame.unused_data
            frame = None
    if frame is not None:
        raise EOFError("the file ends within a frame")


_gunzip = functools.partial(_pieces, lambda source: gzip.GzipFile(fileobj=source))
_KINDS = (
    (".tgz", ".tar", _gunzip),
    (".gz", "", _gunzip),
    (".bz2", "", functools.partial(_pieces, bz2.BZ2File)),
    (".xz", "", functools.partial(_pieces, lzma.LZMAFile)),
    (".zstd", "", _unzstd),
    (".zst", "", _unzstd),
)
"""For each suffix, what the content's name has in its place, and what unpacks it."""
