"""Plain WAV files: the numbers of libsndfile, and the rest is left to it."""

import io
import struct

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxdist.data.decoders.wav import read_plain


def chunk(kind, data):
    return kind + struct.pack("<I", len(data)) + data + b"\0" * (len(data) % 2)


def wav(samples, channels, rate, *, before=b"", after=b"", tag=1, bits=16):
    header = struct.pack("<HHIIHH", tag, channels, rate, rate * 2 * channels, 2 * channels, bits)
    body = b"WAVE" + chunk(b"fmt ", header) + before + chunk(b"data", samples.astype("<i2").tobytes()) + after
    return b"RIFF" + struct.pack("<I", len(body)) + body


@settings(max_examples=200, deadline=None)
@given(
    st.integers(1, 40), st.integers(1, 5), st.sampled_from([1, 8000, 16000, 44100]), st.integers(0, 2**32),
    st.sampled_from([b"", chunk(b"LIST", b"INFOISFT\3\0\0\0abc\0"), chunk(b"JUNK", bytes(5))]),
)  # fmt: skip
def test_numbers_and_rate_are_those_of_libsndfile(length, channels, rate, seed, extra):
    samples = np.random.default_rng(seed).integers(-(2**15), 2**15, length * channels)
    data = wav(samples, channels, rate, before=extra, after=extra)
    theirs, their_rate = soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True)
    found, found_rate = read_plain(data)
    assert found_rate == their_rate
    assert (found.dtype, found.shape) == (theirs.dtype, theirs.shape)
    np.testing.assert_array_equal(found, theirs)


ONE = np.arange(-4, 4)


def saved(subtype, file_format="WAV"):
    file = io.BytesIO()
    soundfile.write(file, ONE / 8, 8000, subtype=subtype, format=file_format)
    return file.getvalue()


@pytest.mark.parametrize(
    "data",
    [
        saved("PCM_24"),
        saved("FLOAT"),
        saved("ULAW"),
        saved("PCM_U8"),
        saved("PCM_16", "WAVEX"),
        saved("PCM_16", "FLAC"),
        wav(ONE, 1, 8000)[:-3],
        wav(ONE, 1, 8000)[:30],
        wav(ONE[:0], 1, 8000),
        wav(ONE, 3, 8000),
        wav(ONE, 1, 8000, before=chunk(b"wavl", b"ab")),
        wav(ONE, 1, 8000).replace(b"fmt ", b"fmt_"),
        wav(ONE, 1, 8000).replace(b"RIFF", b"RIFX"),
        b"",
    ],
    ids=range(14),
)
def test_what_is_not_plain_is_left_to_libsndfile(data):
    assert read_plain(data) is None
