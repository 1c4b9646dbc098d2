"""Plain PNG files: what is decoded here equals what Pillow opens, and the rest is left to Pillow."""

import io
import itertools
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from jaxdist.data.decoders.png import open_plain

COLOURS = {"L": (0, 1), "RGB": (2, 3), "LA": (4, 2), "RGBA": (6, 4)}


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(mode, width, height, rows, *, cuts=(), extra=b"", bits=8, interlace=0):
    """Return a PNG of encoded rows (each begins with the number of its filter), its data divided at `cuts`."""
    data = zlib.compress(rows)
    places = [0, *sorted({min(cut, len(data)) for cut in cuts}), len(data)]
    header = struct.pack(">IIBBBBB", width, height, bits, COLOURS[mode][0], 0, 0, interlace)
    parts = [chunk(b"IDAT", data[begin:end]) for begin, end in itertools.pairwise(places)]
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + b"".join(parts) + chunk(b"IEND", b"")


@st.composite
def encoded_pngs(draw):
    mode = draw(st.sampled_from(sorted(COLOURS)))
    width, height = draw(st.integers(1, 9)), draw(st.integers(1, 6))
    filters = draw(st.lists(st.integers(0, 4), min_size=height, max_size=height))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    rows = b"".join(bytes([kind]) + random.bytes(width * COLOURS[mode][1]) for kind in filters)
    extra = draw(st.sampled_from([b"", chunk(b"pHYs", bytes(9)), chunk(b"gAMA", struct.pack(">I", 45455))]))
    return png(mode, width, height, rows, cuts=draw(st.lists(st.integers(0, 60), max_size=3)), extra=extra)


@settings(max_examples=300, deadline=None)
@given(encoded_pngs())
def test_every_filter_and_division_gives_the_pixels_that_pillow_opens(data):
    ours = open_plain(data)
    theirs = Image.open(io.BytesIO(data))
    assert ours is not None
    assert ours.mode == theirs.mode
    assert ours.tobytes() == theirs.tobytes()


@settings(max_examples=300, deadline=None)
@given(encoded_pngs(), st.integers(0, 10**6), st.integers(0, 7))
def test_a_flipped_bit_gives_what_pillow_gives_or_is_left_to_it(data, place, bit):
    broken = bytearray(data)
    broken[place % len(data)] ^= 1 << bit
    ours = open_plain(bytes(broken))
    if ours is not None:
        assert ours.tobytes() == Image.open(io.BytesIO(bytes(broken))).tobytes()


def test_pixels_that_end_early_are_zeros_as_in_pillow():
    data = png("L", 4, 2, b"\0abcd")
    assert open_plain(data).tobytes() == Image.open(io.BytesIO(data)).tobytes() == b"abcd\0\0\0\0"


def saved(picture, **options):
    file = io.BytesIO()
    picture.save(file, "PNG", **options)
    return file.getvalue()


GREY = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8))


@pytest.mark.parametrize(
    "data",
    [
        saved(GREY.convert("P")),
        saved(GREY.convert("1")),
        saved(Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8))),
        saved(GREY, transparency=3),
        saved(GREY, exif=b"Exif\0\0MM\0*\0\0\0\x08\0\0"),
        saved(GREY, save_all=True, append_images=[GREY.rotate(90)]),
        saved(GREY, pnginfo=(lambda info: info.add_text("a", "b") or info)(PngImagePlugin.PngInfo())),
        png("L", 4, 1, b"\0abcd", interlace=1),
        png("L", 4, 1, b"\0abcd").replace(b"IEND", b"IENX"),
        saved(GREY)[:-20],
        b"",
        b"\xff\xd8 no PNG" + bytes(60),
    ],
    ids=range(12),
)
def test_what_is_not_plain_is_left_to_pillow(data):
    assert open_plain(data) is None


def test_what_pillow_takes_for_too_large_is_left_to_it(monkeypatch):
    assert open_plain(saved(GREY)) is not None
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 63)
    assert open_plain(saved(GREY)) is None
