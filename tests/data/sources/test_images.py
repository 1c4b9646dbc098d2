"""Images are what Pillow shows, in the declared type, or they are refused."""

import base64
import io
import struct
import zlib

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from PIL import Image, ImageOps

from jaxdist.data import CorruptExample, ImageType
from jaxdist.data.sources.images import IMAGE_SUFFIXES, UNREAD_IMAGE_SUFFIXES, decode_image

RANDOM = np.random.default_rng(0)
PILLOW_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


def encoded(picture, kind, **settings):
    file = io.BytesIO()
    picture.save(file, kind, **settings)
    return file.getvalue()


def smooth(height=12, width=9, channels=3):
    rows, columns = np.mgrid[:height, :width]
    return np.stack([(rows * (i + 3) + columns * 5 + 40 * i) % 200 for i in range(channels)], -1).astype(np.uint8)


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_eight_bits_of_every_mode_are_pillows(mode, channels):
    picture = Image.fromarray(smooth(channels=4), "RGBA").convert("RGB" if mode == "CMYK" else mode).convert(mode)
    data = encoded(picture, "TIFF" if mode == "CMYK" else "PNG")
    with Image.open(io.BytesIO(data)) as again:
        colours = again.convert("RGBA") if mode == "P" else again
        theirs = np.asarray(colours.convert(PILLOW_MODES[channels])).reshape(12, 9, channels)
    ours = decode_image(data, ImageType(channels), name="x")
    np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(decode_image(data, ImageType(channels), name="x", reverse=True), theirs[..., ::-1])
    np.testing.assert_array_equal(decode_image(data, ImageType(channels, "uint16"), name="x"), theirs * np.uint16(257))
    as_float = decode_image(data, ImageType(channels, "float32"), name="x")
    np.testing.assert_array_equal(as_float, theirs.astype(np.float32) / np.float32(255))


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_a_users_transform_may_write_into_an_image(kind):
    data = encoded(Image.fromarray(smooth()), kind)
    assert decode_image(data, ImageType(), name="x").flags.writeable
    assert decode_image(data, ImageType(channels=1), name="x").flags.writeable


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_sixteen_bits_stay_sixteen_bits_or_are_refused(kind):
    pixels = RANDOM.integers(291, 694, (7, 5), dtype=np.uint16)
    data = encoded(Image.fromarray(pixels), kind)
    for channels in (1, 3):
        deep = decode_image(data, ImageType(channels, "uint16"), name="x")
        np.testing.assert_array_equal(deep, np.repeat(pixels[..., None], channels, -1))
        as_float = decode_image(data, ImageType(channels, "float32"), name="x")
        np.testing.assert_array_equal(as_float[..., 0], pixels.astype(np.float32) / np.float32(65535))
    assert (decode_image(data, ImageType(4, "uint16"), name="x")[..., 3] == 65535).all()
    with pytest.raises(ValueError, match=r'scan\.x holds uint16 pixels from .* which uint8 cannot .*deep="scale"'):
        decode_image(data, name="scan.x")
    scaled = decode_image(data, ImageType(1, deep="scale"), name="x")
    np.testing.assert_array_equal(scaled[..., 0], np.rint(pixels / 257).astype(np.uint8))


def test_floats_and_wide_integers_are_taken_as_they_are_or_refused():
    floats = RANDOM.normal(size=(6, 4)).astype(np.float32)
    data = encoded(Image.fromarray(floats), "TIFF")
    np.testing.assert_array_equal(decode_image(data, ImageType(1, "float32"), name="x")[..., 0], floats)
    integers = encoded(Image.fromarray(np.array([[-5, 70_000]], np.int32)), "TIFF")
    assert decode_image(integers, ImageType(1, "float32"), name="x").ravel().tolist() == [-5, 70_000]
    inexact = encoded(Image.fromarray(np.array([[2**24 + 1]], np.int32)), "TIFF")
    for each, image_type in (
        (data, ImageType(1)),
        (integers, ImageType(1, "uint16")),
        (inexact, ImageType(1, "float32")),
    ):
        with pytest.raises(ValueError, match="cannot represent"):
            decode_image(each, image_type, name="x")
    with pytest.raises(ValueError, match="cannot represent"):
        decode_image(integers, ImageType(1, deep="scale"), name="x")


def colour_png_of_16_bits():
    """Pillow writes none, so this is put together by hand."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0)
    row = b"\0" + np.array([1000, 2000, 3000, 4000, 5000, 65535], ">u2").tobytes()
    chunks = (b"IHDR", header), (b"IDAT", zlib.compress(row)), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*each) for each in chunks)


JPEG_2000_OF_16_BITS = base64.b64decode(
    "/0//UQAvAAAAAAAEAAAABAAAAAAAAAAAAAAABAAAAAQAAAAAAAAAAAADDwEBDwEBDwEB/1IADAAAAAEBAAQEAAH/XAAEQID/ZAAlAAFDcmVhdGVk"
    "IGJ5IE9wZW5KUEVHIHZlcnNpb24gMi41LjT/kAAKAAAAAABQAAH/k8P/AAYAEVBKgMoQAAAAMeiX3/iQmBQAUnLE4BhINSd4SDonuCmtIS/P/DBY"
    "EVBJXAhBgWj7Ec2IQfc/DCQb08wkH//Z"
)
AVIF_OF_10_BITS = base64.b64decode(
    "AAAAIGZ0eXBhdmlmAAAAAGF2aWZtaWYxbWlhZk1BMUEAAADrbWV0YQAAAAAAAAAhaGRscgAAAAAAAAAAcGljdAAAAAAAAAAAAAAAAAAAAAAOcGl0"
    "bQAAAAAAAQAAAB5pbG9jAAAAAEQAAAEAAQAAAAEAAAETAAAAIgAAAChpaW5mAAAAAAABAAAAGmluZmUCAAAAAAEAAGF2MDFDb2xvcgAAAABqaXBy"
    "cAAAAEtpcGNvAAAAFGlzcGUAAAAAAAAABAAAAAQAAAAQcGl4aQAAAAADCgoKAAAADGF2MUOBIEAAAAAAE2NvbHJuY2x4AAIAAgAAgAAAABdpcG1h"
    "AAAAAAAAAAEAAQQBAoMEAAAAKm1kYXQSAAoIOAR/nAgIAkAyFBAAAAAP+j5Od0MdcI3dF2r8Bq5U"
)
"""Four by four pixels, written by imagecodecs 2026.3.6; Pillow writes neither."""


@pytest.mark.parametrize(
    "data",
    [colour_png_of_16_bits(), b"P6 2 1 1000\n" + bytes(12), JPEG_2000_OF_16_BITS, AVIF_OF_10_BITS],
    ids=["png", "ppm", "jpeg 2000", "avif"],
)
def test_deep_colour_that_pillow_would_reduce_is_refused_unless_asked_for(data):
    with pytest.raises(ValueError, match="more than 8 bits a colour channel"):
        decode_image(data, name="x")
    with pytest.raises(ValueError, match="more than 8 bits a colour channel"):
        decode_image(data, ImageType(dtype="uint16"), name="x")
    with Image.open(io.BytesIO(data)) as picture:
        theirs = np.asarray(picture.convert("RGB"))
    np.testing.assert_array_equal(decode_image(data, ImageType(deep="scale"), name="x"), theirs)


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_the_exif_orientation_is_applied(kind, orientation):
    exif = Image.Exif()
    exif[274] = orientation
    lossless = {"WEBP": {"lossless": True}, "JPEG": {"quality": 95, "subsampling": 0}}.get(kind, {})
    data = encoded(Image.fromarray(smooth()), kind, exif=exif, **lossless)
    with Image.open(io.BytesIO(data)) as picture:
        theirs = np.asarray(ImageOps.exif_transpose(picture).convert("RGB"))
    ours = decode_image(data, name="x")
    assert ours.shape == theirs.shape
    np.testing.assert_array_equal(ours, theirs)
    plain = decode_image(data, ImageType(orient=False), name="x")
    assert kind == "TIFF" or plain.shape == (12, 9, 3)


@hypothesis.settings(max_examples=40, deadline=None)
@hypothesis.given(st.integers(0, 9), st.integers(0, 3), st.binary(max_size=40))
def test_the_exif_orientation_of_a_jpeg_is_found_behind_other_segments_and_fill_bytes(place, num_fill, comment):
    exif = Image.Exif()
    exif[274] = 6
    picture = Image.fromarray(smooth())
    data, plain = encoded(picture, "JPEG", exif=exif), encoded(picture, "JPEG")
    begin = data.index(b"\xff\xe1")
    segment = data[begin : begin + 2 + int.from_bytes(data[begin + 2 : begin + 4], "big")]
    ends = [2]
    while plain[ends[-1] + 1] != 0xDA:
        ends.append(ends[-1] + 2 + int.from_bytes(plain[ends[-1] + 2 : ends[-1] + 4], "big"))
    at = ends[place % len(ends)]
    others = b"\xff\xfe" + (len(comment) + 2).to_bytes(2, "big") + comment + b"\xff" * num_fill
    moved = plain[:at] + others + segment + plain[at:]
    with Image.open(io.BytesIO(moved)) as found:
        theirs = np.asarray(ImageOps.exif_transpose(found))
    assert theirs.shape == (9, 12, 3)
    np.testing.assert_array_equal(decode_image(moved, name="x"), theirs)


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_jpeg_is_pillows(mode):
    data = encoded(Image.fromarray(smooth(64, 48)).convert(mode), "JPEG", quality=95)
    for channels in (1, 3):
        with Image.open(io.BytesIO(data)) as picture:
            theirs = np.asarray(picture.convert(PILLOW_MODES[channels])).reshape(64, 48, channels)
        ours = decode_image(data, ImageType(channels), name="x")
        # Pillow computes grey from RGB; libjpeg-turbo takes it from the file, so it is not rounded twice.
        assert np.abs(ours.astype(int) - theirs).max() <= (2 if channels == 1 and mode == "RGB" else 0)


def test_a_jpeg_with_stray_bytes_is_read_as_pillow_reads_it():
    data = encoded(Image.fromarray(smooth()), "JPEG", exif=b"Exif\0\0broken")
    ours = decode_image(data + b"stray", name="x")
    np.testing.assert_array_equal(ours, decode_image(data, name="x"))


@pytest.mark.parametrize("settings", [{}, {"progressive": True}, {"subsampling": 0}, {"exif": b"Exif\0\0broken"}])
def test_a_jpeg_made_grey_is_its_luma_whichever_library_decodes_it(monkeypatch, settings):
    data = encoded(Image.fromarray(RANDOM.integers(0, 255, (33, 21, 3), np.uint8)), "JPEG", **settings)
    ours = decode_image(data, ImageType(1), name="x")

    def too_strict(*_):
        raise ValueError("Invalid JPEG file")

    monkeypatch.setattr("simplejpeg.decode_jpeg", too_strict)
    np.testing.assert_array_equal(decode_image(data, ImageType(1), name="x"), ours)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_lab_is_pillows_rgb(channels):
    picture = Image.new("LAB", (3, 2), (50, 100, 150))
    theirs = np.asarray(picture.convert("RGB").convert(PILLOW_MODES[channels])).reshape(2, 3, channels)
    ours = decode_image(encoded(picture, "TIFF"), ImageType(channels), name="x")
    np.testing.assert_array_equal(ours, theirs)


def broken_in_the_middle():
    """A PNG whose pixels end in nonsense: Pillow, asked a second time, would show the half that it has."""
    data = bytearray(encoded(Image.fromarray(RANDOM.integers(0, 255, (64, 64, 3), np.uint8)), "PNG"))
    data[len(data) // 2 : len(data) // 2 + 20] = bytes(20)
    return bytes(data)


def test_what_is_no_image_is_corrupt(monkeypatch):
    data = encoded(Image.fromarray(smooth()), "PNG")
    for broken in (b"", b"hello", data[:45], broken_in_the_middle(), encoded(Image.fromarray(smooth()), "JPEG")[:100]):
        with pytest.raises(CorruptExample, match="Unreadable image: a/b"):
            decode_image(broken, name="a/b")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(CorruptExample, match="decompression bomb"):
        decode_image(data, name="bomb")


def test_unknown_types_are_refused():
    for settings in ({"channels": 2}, {"dtype": "int8"}, {"deep": "clip"}):
        with pytest.raises(ValueError, match="is one of"):
            ImageType(**settings)


def tiff(values, *, sample_format, order="<", photometric=1):
    """Return a grey TIFF file of these numbers, put together by hand."""
    content = values.astype(values.dtype.newbyteorder(order)).tobytes()
    height, width = values.shape
    shorts = [(258, 8 * values.itemsize), (259, 1), (262, photometric), (277, 1), (339, sample_format)]
    longs = [(256, width), (257, height), (273, 8), (278, height), (279, len(content))]
    entries = [(tag, struct.pack(order + "HIHH", 3, 1, value, 0)) for tag, value in shorts]
    entries += [(tag, struct.pack(order + "HII", 4, 1, value)) for tag, value in longs]
    head = struct.pack(order + "2sHI", b"II" if order == "<" else b"MM", 42, 8 + len(content))
    table = b"".join(struct.pack(order + "H", tag) + entry for tag, entry in sorted(entries))
    return head + content + struct.pack(order + "H", len(entries)) + table + bytes(4)


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("dtype", ["int8", "int16", "int32", "uint16", "uint32", "float32"])
def test_the_numbers_of_a_tiff_keep_their_sign_and_value_or_are_refused(dtype, order):
    values = (np.arange(12).reshape(3, 4) * (1 if dtype[0] == "u" else -1)).astype(dtype)
    data = tiff(values, sample_format={"u": 1, "i": 2, "f": 3}[dtype[0]], order=order)
    if dtype == "int8" or (dtype, order) == ("uint32", ">"):  # which Pillow does not read
        with pytest.raises(ValueError, match=r"x\.tif"):
            decode_image(data, ImageType(1, "float32"), name="x.tif")
        return
    found = decode_image(data, ImageType(1, "float32"), name="x.tif")[..., 0]
    np.testing.assert_allclose(found, values / (65535 if dtype == "uint16" else 1), rtol=1e-6)
    if dtype[0] == "i":
        with pytest.raises(ValueError, match="from -11 to 0, which uint16 cannot represent"):
            decode_image(data, ImageType(1, "uint16"), name="x.tif")


def test_a_tiff_whose_white_is_zero_is_inverted_or_refused():
    for kind in (np.uint8, np.uint16):
        values = RANDOM.integers(0, np.iinfo(kind).max + 1, (4, 5)).astype(kind)
        ours = decode_image(tiff(values, sample_format=1, photometric=0), ImageType(1, str(values.dtype)), name="x")
        np.testing.assert_array_equal(ours[..., 0], ~values)
    for kind, sample_format in ((np.int16, 2), (np.uint32, 1), (np.int32, 2)):
        data = tiff(RANDOM.integers(0, 99, (4, 5)).astype(kind), sample_format=sample_format, photometric=0)
        with pytest.raises(ValueError, match=r"black as 0|unknown format"):
            decode_image(data, ImageType(1, "float32"), name="x")


def test_whole_numbers_beyond_int32_do_not_wrap():
    data = tiff(np.array([[2**32 - 5]], np.uint32), sample_format=1)
    with pytest.raises(ValueError, match="from 4294967291 to 4294967291, which float32 cannot represent"):
        decode_image(data, ImageType(1, "float32"), name="x.tif")


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_a_file_of_several_pictures_is_refused_or_its_first_is_taken(kind):
    frames = [Image.fromarray(smooth() // 2 + 60 * number) for number in range(3)]
    settings = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **settings)
    with pytest.raises(ValueError, match=r'x\.gif: .* this image has 3 (frames|pages).*frames="first"'):
        decode_image(data, name="x.gif")
    with Image.open(io.BytesIO(data)) as picture:
        theirs = np.asarray(picture.convert("RGB"))
    np.testing.assert_array_equal(decode_image(data, ImageType(frames="first"), name="x"), theirs)
    one = encoded(frames[0], kind, save_all=True, **settings)
    np.testing.assert_array_equal(decode_image(one, name="x"), theirs)


def test_no_kind_of_image_that_pillow_knows_is_left_out_of_a_folder_without_a_word():
    Image.init()
    no_pictures = {".pdf", ".ps", ".h5", ".hdf", ".grib", ".bufr", ".gbr", ".im", ".mpg", ".mpeg"}
    assert set(Image.registered_extensions()) <= {*IMAGE_SUFFIXES, *UNREAD_IMAGE_SUFFIXES, *no_pictures}
