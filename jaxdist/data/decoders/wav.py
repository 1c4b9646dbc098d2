"""Plain WAV files, 16 bits a sample, read by numpy to the numbers that libsndfile returns.

libsndfile asks Python for each block of a file that is in memory, for which threads wait for each other. What is not
plain (other widths, floats, an extensible header, a chunk that is not known, a file that ends early) is left to it.
"""

import struct

import numpy as np

_WITHOUT_EFFECT = (b"LIST", b"fact", b"JUNK", b"bext", b"id3 ")
_MORE = (b"data", b"RIFF")
"""What begins more samples behind the first ones; libsndfile refuses such a file."""
_PCM, _BITS = 1, 16

_chunk = struct.Struct("<4sI").unpack_from
_format = struct.Struct("<HHIIHH").unpack_from


def read_plain(data: bytes) -> tuple[np.ndarray, int] | None:
    """Return the samples of a plain file, float32 (samples, channels) in [-1, 1), and the samples a second.

    None for another file.
    """
    if data[:4] != b"RIFF" or data[8:12] != b"WAVE":
        return None
    place, channels, rate = 12, 0, 0
    while place + 8 <= len(data):
        kind, size = _chunk(data, place)
        place += 8
        if kind == b"fmt " and size >= 16 and place + 16 <= len(data) and not channels:
            tag, channels, rate, _, width, bits = _format(data, place)
            if tag != _PCM or bits != _BITS or not channels or not rate or width != 2 * channels:
                return None
        elif kind == b"data":
            if not channels or not size or size % (2 * channels) or place + size > len(data):
                return None
            if data[place + size : place + size + 4] in _MORE:
                return None
            samples = np.frombuffer(data, "<i2", size // 2, place).astype(np.float32)
            samples *= np.float32(1 / 32768)  # a power of two: exact
            return samples.reshape(-1, channels), rate
        elif kind not in _WITHOUT_EFFECT:
            return None
        place += size + size % 2
    return None
