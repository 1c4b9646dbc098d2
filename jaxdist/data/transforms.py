"""Ready transforms: `transform(example, random) -> example`, pure, picklable, to be combined with `Chain`.

Each changes one field (`image` or `audio` by default) and returns the others unchanged.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxdist import extras
from jaxdist.data.sources.images import RGB, ImageType, decode_image
from jaxdist.data.sources.source import Example, check_labels

Transform = Callable[[Example, np.random.Generator], Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class Chain:
    """Applies transforms one after another."""

    transforms: Sequence[Transform]

    def __call__(self, example: Example, random: np.random.Generator) -> Mapping[str, Any]:
        """Return the example after all transforms."""
        for transform in self.transforms:
            example = transform(example, random)
        return example


@dataclasses.dataclass(frozen=True)
class DecodeImage:
    """Encoded bytes (uint8, one dim) -> (height, width, channels) as `image_type` declares, uint8 RGB by default."""

    field: str = "image"
    image_type: ImageType = RGB

    def __call__(self, example: Example, random: np.random.Generator) -> Mapping[str, Any]:
        """Return the example with its image decoded; CorruptExample where it cannot be."""
        data = np.asarray(example[self.field]).tobytes()
        return {**example, self.field: decode_image(data, self.image_type, name=f"field {self.field!r}")}


@dataclasses.dataclass(frozen=True)
class RandomCrop:
    """Cuts `height` x `width` out of the image at a random place, after adding `padding` black pixels on each side."""

    height: int
    width: int
    padding: int = 0
    field: str = "image"

    def __call__(self, example: Example, random: np.random.Generator) -> Mapping[str, Any]:
        """Return the example with its image cropped; ValueError where it is too small."""
        image = _padded(np.asarray(example[self.field]), self.padding)
        spare = _spare(image, self.height, self.width)
        top, left = (_place(at, most) for at, most in zip(random.random(2), spare))
        return {**example, self.field: image[top : top + self.height, left : left + self.width]}


@dataclasses.dataclass(frozen=True)
class DecodeCropFlip:
    """Encoded bytes -> a random crop of `height` x `width`, mirrored in half of the cases; uint8.

    The same as `Chain((DecodeImage(), RandomCrop(height, width), RandomFlip()))`, in less time. It belongs behind
    `ImageFolder(root, decode=False)`, or any source of encoded images.
    """

    height: int
    width: int
    field: str = "image"

    def __call__(self, example: Example, random: np.random.Generator) -> Mapping[str, Any]:
        """Return the example with its image; CorruptExample where it cannot be decoded, ValueError where too small."""
        data, name = np.asarray(example[self.field]).tobytes(), f"field {self.field!r}"
        at_top, at_left, flip = random.random(3)
        image = decode_image(data, name=name, reverse=flip >= 0.5)
        spare = _spare(image, self.height, self.width)
        top, left = _place(at_top, spare[0]), _place(at_left, spare[1])
        image = image[top : top + self.height, left : left + self.width]
        # A row of bytes in reverse order has its pixels in reverse order, and the channels of each: a quick copy.
        return {**example, self.field: image if flip < 0.5 else image[:, ::-1, ::-1]}


@dataclasses.dataclass(frozen=True)
class CentreCrop:
    """Cuts `height` x `width` out of the middle of the image."""

    height: int
    width: int
    field: str = "image"

    def __call__(self, example: Example, random: np.random.Generator) -> Mapping[str, Any]:
        """Return the example with its image cropped; ValueError where it is too small."""
        image = np.asarray(example[self.field])
        spare = _spare(image, self.height, self.width)
        top, left = spare[0] // 2, spare[1] // 2
        return {**example, self.field: image[top : top + self.height, left : left + self.width]}


@dataclasses.dataclass(frozen=True)
class Resize:
    """Scales an image of uint8 to `height` x `width`, bilinear with antialiasing."""

    height: int
    width: int
    field: str = "image"

    def __call__(self, example: Example, random: np.random.Generator) -> Mapping[str, Any]:
        """Return the example with its image scaled."""
        image = extras.require("PIL.Image")
        picture = image.fromarray(np.asarray(example[self.field]))
        scaled = picture.resize((self.width, self.height), image.Resampling.BILINEAR)
        return {**example, self.field: np.array(scaled)}


@dataclasses.dataclass(frozen=True)
class RandomFlip:
    """Mirrors the image left to right in half of the cases."""

    field: str = "image"

    def __call__(self, example: Example, random: np.random.Generator) -> Mapping[str, Any]:
        """Return the example, its image mirrored or not."""
        image = np.asarray(example[self.field])
        return {**example, self.field: image if random.random() < 0.5 else _mirrored(image)}


@dataclasses.dataclass(frozen=True)
class Normalise:
    """(value / scale - mean) / std, float32. `mean` and `std` are numbers, or one a channel (the last dim)."""

    mean: float | tuple[float, ...] = 0.0
    std: float | tuple[float, ...] = 1.0
    scale: float = 255.0
    field: str = "image"

    def __call__(self, example: Example, random: np.random.Generator) -> Mapping[str, Any]:
        """Return the example with the field normalised."""
        values = np.asarray(example[self.field])
        # As float32, times in seconds or large counts would be rounded before the mean is taken off.
        is_wide = values.dtype.kind in "iuf" and values.dtype.itemsize > 4
        kind: Any = np.float64 if is_wide else np.float32
        mean, std = np.asarray(self.mean, kind), np.asarray(self.std, kind)
        made = (values.astype(kind) / kind(self.scale) - mean) / std
        return {**example, self.field: made.astype(np.float32, copy=False)}


@dataclasses.dataclass(frozen=True)
class Spectrogram:
    """Audio (samples,) -> log power float32 (frames, window // 2 + 1): Hann windows, `hop` samples apart."""

    window: int = 400
    hop: int = 160
    field: str = "audio"

    def __call__(self, example: Example, random: np.random.Generator) -> Mapping[str, Any]:
        """Return the example with the field as a spectrogram; ValueError where it is shorter than a window."""
        return {**example, self.field: _log(_power(example[self.field], self.window, self.hop))}


@dataclasses.dataclass(frozen=True)
class MelSpectrogram:
    """Audio (samples,) -> log power float32 (frames, num_mels) in bands of equal width on the mel scale.

    The power of `Spectrogram`, summed with triangular weights whose centres are equally far apart in
    2595 log10(1 + hertz / 700) between `low` and `high` hertz; `high` None is half the sample rate.
    """

    sample_rate: int
    num_mels: int = 80
    window: int = 400
    hop: int = 160
    low: float = 0.0
    high: float | None = None
    field: str = "audio"

    def __post_init__(self) -> None:
        self.bands()

    def bands(self) -> np.ndarray:
        """Return the weights of the frequencies in each band, float32 (window // 2 + 1, num_mels)."""
        high = self.sample_rate / 2 if self.high is None else self.high
        return _mel_bands(self.sample_rate, self.window, self.num_mels, self.low, high)

    def __call__(self, example: Example, random: np.random.Generator) -> Mapping[str, Any]:
        """Return the example with the field as a mel spectrogram; ValueError where it is shorter than a window."""
        power = _power(example[self.field], self.window, self.hop)
        return {**example, self.field: _log(power @ self.bands())}


@dataclasses.dataclass(frozen=True)
class CheckLabel:
    """Refuses an example whose label is not in [0, num_classes)."""

    num_classes: int
    field: str = "label"

    def __call__(self, example: Example, random: np.random.Generator) -> Example:
        """Return the example as it is; ValueError where its label is out of range."""
        check_labels(np.asarray(example[self.field]).reshape(-1), self.field, self.num_classes)
        return example


def _power(values: Any, window: int, hop: int) -> np.ndarray:
    """Return the power of each frequency in each window, float32 (frames, window // 2 + 1)."""
    audio = np.ascontiguousarray(values, np.float32)
    if audio.ndim != 1 or len(audio) < window:
        raise ValueError(f"A spectrogram needs (samples,), at least one window of {window}; got {audio.shape}.")
    frames = np.lib.stride_tricks.sliding_window_view(audio, window)[::hop]
    # SciPy transforms several frames at once: it takes a seventh of numpy's time.
    waves = extras.require("scipy.fft").rfft(frames * _hann(window))
    power: np.ndarray = waves.real**2
    power += waves.imag**2
    return power


def _log(power: np.ndarray) -> np.ndarray:
    power += np.float32(1e-10)
    return np.log(power, out=power)


@functools.lru_cache(maxsize=8)
def _hann(window: int) -> np.ndarray:
    return np.hanning(window).astype(np.float32)


@functools.lru_cache(maxsize=8)
def _mel_bands(sample_rate: int, window: int, num_mels: int, low: float, high: float) -> np.ndarray:
    if not (0 <= low < high <= sample_rate / 2 and num_mels >= 1 and window >= 2):
        raise ValueError(
            f"Bands are between 0 and half the sample rate, {sample_rate / 2:g} hertz, and there is at least one; got "
            f"{num_mels} from {low:g} to {high:g}."
        )
    first, last = (2595 * math.log10(1 + hertz / 700) for hertz in (low, high))
    ends = np.linspace(first, last, num_mels + 2)
    limits = 700 * (10 ** (ends / 2595) - 1)
    begins, centres, stops = limits[:-2], limits[1:-1], limits[2:]
    each = np.fft.rfftfreq(window, 1 / sample_rate)[:, None]
    weights = np.minimum((each - begins) / (centres - begins), (stops - each) / (stops - centres)).clip(0)
    empty = np.flatnonzero(weights.max(axis=0) == 0)
    if empty.size:
        raise ValueError(
            f"Band {empty[0]} of {num_mels} has no frequency of a window of {window} samples in it. Choose fewer "
            "bands, or a longer window."
        )
    bands: np.ndarray = weights.astype(np.float32)
    return bands


def _padded(image: np.ndarray, padding: int) -> np.ndarray:
    widths = [(padding, padding)] * 2 + [(0, 0)] * (image.ndim - 2)
    return np.pad(image, widths) if padding else image


def _place(share: float, most: int) -> int:
    """Return a whole number of [0, most]; `share` is uniform in [0, 1). numpy's `integers` is three times slower."""
    return int(share * (most + 1))


def _mirrored(image: np.ndarray) -> np.ndarray:
    if image.ndim != 3:
        return image[:, ::-1]
    # Channel by channel: numpy copies a mirrored image of three channels five times as slowly in one go.
    mirrored = np.empty(image.shape, image.dtype)
    for channel in range(image.shape[2]):
        mirrored[..., channel] = image[:, ::-1, channel]
    return mirrored


def _spare(image: np.ndarray, height: int, width: int) -> tuple[int, int]:
    """Return by how much the image is higher and wider; ValueError where it is smaller."""
    spare = image.shape[0] - height, image.shape[1] - width
    if min(spare) < 0:
        raise ValueError(f"Cannot crop {height} x {width} out of an image of {image.shape[0]} x {image.shape[1]}.")
    return spare
