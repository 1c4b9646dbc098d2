"""From an image file's bytes to an array of a declared type: JPEG by libjpeg-turbo, everything else by Pillow.

Numbers of other widths are never clipped. Of 8 bits to 16: times 257, so that white stays white. To float32: unsigned
8 and 16 bits divided by 255 and 65535; signed and 32-bit integers and floats as they are. To fewer bits: refused, or
rounded where `deep="scale"` says so.
"""

import dataclasses
import io
from typing import Any, Final, Literal

import numpy as np

from jaxdist import extras
from jaxdist.data.decoders import png
from jaxdist.data.sources.source import CorruptExample

IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".bmp", ".gif", ".webp", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx", ".tga", ".avif", ".avifs"),
    *(".mpo", ".dib"),
)
UNREAD_IMAGE_SUFFIXES = (
    *(".heic", ".heif", ".jxl", ".svg", ".psd", ".exr", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raw"),
    *(".ico", ".icns", ".cur", ".pcx", ".dds", ".sgi", ".rgb", ".rgba", ".bw", ".ras", ".xbm", ".xpm", ".pfm", ".fits"),
    *(".fit", ".qoi", ".eps", ".emf", ".wmf", ".pcd", ".dcx", ".flc", ".fli", ".vda", ".icb", ".vst", ".blp", ".msp"),
    *(".palm", ".pxr", ".ftc", ".ftu", ".iim"),
)
"""Kinds of images that a folder may hold and that nothing here reads: they are refused, not left out."""
MAX_PIXELS = 2 * 89_478_485
"""The size from which Pillow refuses an image as a decompression bomb, too."""

_PILLOW_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
_ORIENTATION, _SAMPLE_FORMAT, _BITS, _SUBFILE = 274, 339, 258, 254
_SIGNED, _REDUCED = 2, 1
_PHOTOMETRIC, _WHITE_IS_ZERO = 262, 0
_CODESTREAM, _HIGH_BIT_DEPTH = b"\xff\x4f\xff\x51", 0x40
_FRAMED = ("GIF", "WEBP", "PNG", "TIFF", "AVIF")
"""The formats whose further frames are pictures of their own; in others, such as MPO, they belong to the first."""


@dataclasses.dataclass(frozen=True)
class ImageType:
    """The type that every image is decoded to.

    Attributes:
      channels: 1 (grey; of a JPEG its luma, which differs from Pillow's RGB made grey by rounding and where RGB is cut
        off), 3 (RGB) or 4 (RGBA). Without an alpha channel, colours are those under the transparency.
      dtype: "uint8", "uint16" or "float32".
      orient: whether the EXIF orientation is applied (in TIFF files it always is).
      deep: what to do with integers of 16 bits where `dtype` is "uint8": "refuse", or "scale": round value / 257.
      frames: what to do with a file of several, an animation or the pages of a TIFF: "refuse", or take the "first".
    """

    channels: Literal[1, 3, 4] = 3
    dtype: Literal["uint8", "uint16", "float32"] = "uint8"
    orient: bool = True
    deep: Literal["refuse", "scale"] = "refuse"
    frames: Literal["refuse", "first"] = dataclasses.field(default="refuse", repr=False)  # no part of a fingerprint

    def __post_init__(self) -> None:
        for name, known in (
            ("channels", (1, 3, 4)),
            ("dtype", ("uint8", "uint16", "float32")),
            ("deep", ("refuse", "scale")),
            ("frames", ("refuse", "first")),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} of an image is one of {known}; got {getattr(self, name)!r}.")


RGB: Final = ImageType()
"""Three channels of 8 bits."""


def require_decoders() -> None:
    """Raise MissingExtra unless the decoders are installed."""
    extras.require("PIL.Image")
    extras.require("simplejpeg")


def decode_image(data: bytes, image_type: ImageType = RGB, *, name: str, reverse: bool = False) -> np.ndarray:
    """Return the image in `data` as (height, width, channels), the channels in reverse order where `reverse` says so.

    Raises:
      CorruptExample: there is no readable image; the message has `name`.
      ValueError: `image_type` cannot represent the image.
    """
    if data[:2] == b"\xff\xd8" and image_type.channels != 4:
        pixels = _decode_jpeg(data, image_type, reverse)
        if pixels is not None:
            return _to_dtype(pixels, image_type, name)
    try:
        pixels, bits = _decode_with_pillow(data, image_type)
    except MemoryError:
        raise
    except _Refused as error:
        raise ValueError(f"{name}: {error}") from error
    except Exception as error:  # decoders raise many kinds for broken data
        # Pillow names the buffer made here where it does not know the format.
        reason = "unknown format" if "cannot identify" in str(error) else error
        raise CorruptExample(f"Unreadable image: {name}: {reason}") from error
    if bits == "reduced" and (image_type.dtype == "uint16" or image_type.deep == "refuse"):
        raise ValueError(
            f"{name} has more than 8 bits a colour channel, of which Pillow keeps 8. Convert the file, or accept these "
            'with dtype="uint8" (or "float32") and deep="scale".'
        )
    return _to_dtype(pixels[..., ::-1] if reverse else pixels, image_type, name)


class _Refused(ValueError):
    """A whole image that `ImageType` does not allow."""


def _decode_jpeg(data: bytes, image_type: ImageType, reverse: bool) -> np.ndarray | None:
    """Return a JPEG's pixels, uint8; None where Pillow should decode it."""
    simplejpeg = extras.require("simplejpeg")
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        if colours in ("CMYK", "YCCK") or height * width > MAX_PIXELS:
            return None
        wanted = "GRAY" if image_type.channels == 1 else "BGR" if reverse else "RGB"
        pixels = simplejpeg.decode_jpeg(data, wanted)
    except ValueError:  # Pillow is more tolerant, of stray bytes for example
        return None
    if image_type.orient and _jpeg_has_exif(data):
        with extras.require("PIL.Image").open(io.BytesIO(data)) as picture:
            return _oriented(pixels, _orientation(picture))
    return pixels


def _jpeg_has_exif(data: bytes) -> bool:
    """Return whether a segment before the first scan has EXIF data; bytes of 0xFF may stand before each marker."""
    place = 2
    while data[place : place + 1] == b"\xff" and (marker := data[place + 1 : place + 2]) not in (b"\xda", b""):
        if marker == b"\xff":
            place += 1
            continue
        if marker == b"\xe1" and data[place + 4 : place + 10] == b"Exif\0\0":
            return True
        place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    return False


def _decode_with_pillow(data: bytes, image_type: ImageType) -> tuple[np.ndarray, str]:
    """Return the pixels in the width of the file, and "reduced" where Pillow has dropped bits."""
    if (plain := png.open_plain(data)) is not None:
        return _channels_of(plain, image_type), "whole"
    with extras.require("PIL.Image").open(io.BytesIO(data)) as picture:
        if image_type.frames == "refuse":
            _check_one_frame(picture)
        if picture.format == "JPEG" and image_type.channels == 1:
            picture.draft("L", None)  # its luma, as of the files that libjpeg-turbo decodes
        deep = _is_deep(picture, data)
        if picture.mode[:1] not in "IF" and _integers_of_tiff(picture)[1]:
            raise _Refused("its numbers of 8 bits have a sign, which Pillow would leave out. Write them with 16 bits.")
        picture.load()  # here, where broken data raise: `_orientation` would load, too, and hide it
        orientation = _orientation(picture) if image_type.orient and picture.format != "TIFF" else 1
        if picture.mode in ("F", "I") or picture.mode.startswith("I;16"):
            pixels = _grey_to_channels(_deep_grey(picture, deep), image_type.channels)
        else:
            return _oriented(_channels_of(picture, image_type), orientation), "reduced" if deep else "whole"
        return _oriented(pixels, orientation), "whole"


def _channels_of(picture: Any, image_type: ImageType) -> np.ndarray:
    """Return the pixels of a picture of 8 bits, uint8 (height, width, channels)."""
    mode = _PILLOW_MODES[image_type.channels]
    if picture.mode in ("P", "PA", "LAB") and mode != "RGBA":
        # Transparency would not survive a direct conversion, and of LAB there is none to grey.
        picture = picture.convert("RGBA")
    pixels = np.array(picture if picture.mode == mode else picture.convert(mode))
    return pixels.reshape(*pixels.shape[:2], image_type.channels)


def _is_deep(picture: Any, data: bytes) -> bool:
    """Return whether the file has more than 8 bits a channel, which Pillow does not report for colour images."""
    if picture.format == "JPEG2000":  # its first marker segment has the bits of each component, less one
        sizes = data.find(_CODESTREAM)
        return sizes >= 0 and data[sizes + 42] & 127 > 7
    if picture.format == "AVIF":
        settings = data.find(b"av1C")
        return settings >= 0 and bool(data[settings + 6] & _HIGH_BIT_DEPTH)
    arguments = picture.tile[0][3] if picture.tile else ()
    parts = arguments if isinstance(arguments, tuple) else (arguments,)
    names = [part for part in parts if isinstance(part, str)]
    highest = parts[1] if picture.format == "PPM" and len(parts) == 2 else 0  # the file's value of white
    return any("16" in name for name in names) or (isinstance(highest, int) and highest > 255)


def _deep_grey(picture: Any, deep: bool) -> np.ndarray:
    pixels = np.asarray(picture)
    if picture.mode == "F":
        return pixels.astype(np.float32)
    bits, is_signed = _integers_of_tiff(picture)
    if bits and picture.tag_v2.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:  # Pillow inverts numbers of up to 8 bits only
        if bits != 16 or is_signed:
            raise _Refused("its zero is white, and Pillow leaves such numbers as they are. Write it with black as 0.")
        return ~pixels.astype(np.uint16)
    if bits == 32 and not is_signed:  # Pillow has them as int32
        return pixels.astype(np.int32).view(np.uint32)
    if picture.mode == "I" and (is_signed or not (deep or picture.format in ("PNG", "PPM"))):
        return pixels.astype(np.int32)
    return pixels.astype(np.uint16)


def _check_one_frame(picture: Any) -> None:
    """Raise _Refused where a file has several pictures; a smaller copy of a TIFF's page is none of its own."""
    if picture.format not in _FRAMED or not getattr(picture, "is_animated", False):
        return
    count = int(picture.n_frames)
    if picture.format == "TIFF":
        reduced = 0
        for number in range(1, count):
            picture.seek(number)
            reduced += bool(picture.tag_v2.get(_SUBFILE, 0) & _REDUCED)
        count -= reduced
        picture.seek(0)
    if count > 1:
        kind = "pages" if picture.format == "TIFF" else "frames"
        raise _Refused(
            f"an example is one picture, and this image has {count} {kind}. Write them to files of their own, or take "
            'the first of each file with frames="first".'
        )


def _integers_of_tiff(picture: Any) -> tuple[int, bool]:
    """Return the bits of a number, and whether it has a sign; (0, False) where the format is another."""
    if picture.format != "TIFF":
        return 0, False
    bits, signs = picture.tag_v2.get(_BITS, (1,)), picture.tag_v2.get(_SAMPLE_FORMAT, (1,))
    return int(bits[0]), _SIGNED in (signs if isinstance(signs, tuple) else (signs,))


def _grey_to_channels(grey: np.ndarray, channels: int) -> np.ndarray:
    if channels == 4:
        opaque = np.full_like(grey, np.iinfo(np.uint16).max if grey.dtype == np.uint16 else 1)
        return np.stack([grey, grey, grey, opaque], axis=-1)
    return np.repeat(grey[..., None], channels, axis=-1)


def _orientation(picture: Any) -> int:
    try:
        return int(picture.getexif().get(_ORIENTATION, 1))
    except Exception:  # broken EXIF data are ignored; the pixels are whole
        return 1


def _oriented(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Return the image as EXIF's `orientation` means it to be seen."""
    if orientation not in range(2, 9):
        return pixels
    if orientation > 4:
        pixels = pixels.swapaxes(0, 1)
    rows, columns = {2: (1, -1), 3: (-1, -1), 4: (-1, 1), 6: (1, -1), 7: (-1, -1), 8: (-1, 1)}.get(orientation, (1, 1))
    return np.ascontiguousarray(pixels[::rows, ::columns])


def _to_dtype(pixels: np.ndarray, image_type: ImageType, name: str) -> np.ndarray:
    wanted = np.dtype(image_type.dtype)
    if pixels.dtype == wanted:
        return pixels
    if pixels.dtype == np.uint8 and wanted == np.uint16:
        return pixels.astype(np.uint16) * np.uint16(257)
    if pixels.dtype == np.uint8:
        return pixels.astype(np.float32) / np.float32(255)
    if pixels.dtype == np.uint16 and wanted == np.float32:
        return pixels.astype(np.float32) / np.float32(65535)
    if pixels.dtype == np.uint16 and image_type.deep == "scale":
        return ((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8)
    if pixels.dtype.kind in "iu" and wanted == np.float32 and np.abs(pixels.astype(np.int64)).max() <= 2**24:
        return pixels.astype(np.float32)
    hint = ' or set deep="scale"' if pixels.dtype == np.uint16 else ""
    raise ValueError(
        f"{name} holds {pixels.dtype} pixels from {pixels.min()} to {pixels.max()}, which {wanted} cannot represent. "
        f'Declare another dtype of the images ("uint16", "float32"){hint}.'
    )
