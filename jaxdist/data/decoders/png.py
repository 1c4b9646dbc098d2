"""Plain PNG files as Pillow images, at half the cost of `PIL.Image.open`.

Opening a small PNG takes longer than decoding it: Pillow makes a file, a reader and a table of its chunks. Here the
chunks are found by their lengths, and Pillow's own decoder is given the data of all of them at once. What is not plain
(a palette, transparency by a chunk, interlaced, other than 8 bits a channel, an orientation, a profile, an error) is
left to `PIL.Image.open`.
"""

import struct
import zlib
from typing import Any

from jaxdist import extras

_SIGNATURE = b"\x89PNG\r\n\x1a\n\x00\x00\x00\x0dIHDR"
_MODES = {0: "L", 2: "RGB", 4: "LA", 6: "RGBA"}
_WITHOUT_EFFECT = {b"gAMA": 4, b"cHRM": 32, b"sRGB": 1, b"pHYs": 9, b"tIME": 7}
"""Chunks that do not change the pixels that Pillow returns, and the length of each."""

_MOST_PIXELS = 2**24
"""Larger images do not gain by this, and Pillow warns of, or refuses, the largest."""

_header = struct.Struct(">IIBBBBB").unpack_from
_word = struct.Struct(">I").unpack_from


def open_plain(data: bytes) -> Any | None:
    """Return a plain PNG as the loaded image that `PIL.Image.open` would return; None for another file."""
    if not data.startswith(_SIGNATURE) or len(data) < 57:
        return None
    width, height, bits, colour, compression, filtering, interlace = _header(data, 16)
    mode = _MODES.get(colour)
    if mode is None or (bits, compression, filtering, interlace) != (8, 0, 0, 0):
        return None
    image = extras.require("PIL.Image")
    most = min(_MOST_PIXELS, image.MAX_IMAGE_PIXELS or _MOST_PIXELS)
    if not 0 < width * height <= most or zlib.crc32(data[12:29]) != _word(data, 29)[0]:
        return None
    compressed = _image_data(data)
    if not compressed:
        return None
    try:
        return image.frombytes(mode, (width, height), compressed, "zip", mode, 0)
    except (ValueError, OSError):  # broken data: what is wrong with them is Pillow's to say
        return None


def _image_data(data: bytes) -> bytes | None:
    """Return the compressed pixels from all chunks; None where a chunk is broken, or may change the pixels."""
    place, parts = 33, []
    while place + 12 <= len(data):
        (length,), kind = _word(data, place), data[place + 4 : place + 8]
        end = place + 8 + length
        if end + 4 > len(data):
            return None
        if kind == b"IDAT":
            parts.append(data[place + 8 : end])
        elif kind == b"IEND":
            return b"".join(parts)
        elif parts or _WITHOUT_EFFECT.get(kind) != length or zlib.crc32(data[place + 4 : end]) != _word(data, end)[0]:
            return None
        place = end + 4
    return None
