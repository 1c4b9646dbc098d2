"""Random changes to images and spectrograms that keep their labels: crops, colours, erased parts, RandAugment.

Each is a transform like those of `transforms`: `augmentation(example, random) -> example`, pure and picklable. Images
are uint8 arrays of shape (height, width, channels) or (height, width). Pillow computes geometry and colours.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jaxdist import extras
from jaxdist.data.sources.source import Example
from jaxdist.setting_group import whole_number


@dataclasses.dataclass(frozen=True)
class RandomResizedCrop:
    """Cuts out a part of random size and shape and scales it to `height` x `width`, bilinear with antialiasing.

    The part's area is uniform in `area` (shares of the image), the logarithm of its width / height uniform in that of
    `aspect`, as in Szegedy et al., "Going deeper with convolutions" (2015). Where ten draws do not fit, it is the
    largest part in the middle whose aspect is allowed.
    """

    height: int
    width: int
    area: tuple[float, float] = (0.08, 1.0)
    aspect: tuple[float, float] = (3 / 4, 4 / 3)
    field: str = "image"

    def __post_init__(self) -> None:
        _check_range("area", self.area, 1.0)
        _check_range("aspect", self.aspect, math.inf)

    def __call__(self, example: Example, random: np.random.Generator) -> Mapping[str, Any]:
        """Return the example with its image cut and scaled."""
        picture = _picture(example[self.field], self.field)
        left, top, width, height = self._part(picture.width, picture.height, random)
        box = (left, top, left + width, top + height)
        resampling = extras.require("PIL.Image").Resampling.BILINEAR
        scaled = picture.resize((self.width, self.height), resampling, box=box)
        return {**example, self.field: _array(scaled, example[self.field])}

    def _part(self, image_width: int, image_height: int, random: np.random.Generator) -> tuple[int, int, int, int]:
        """Return (left, top, width, height) of the part that is kept, in pixels."""
        low, high = (math.log(limit) for limit in self.aspect)
        for share, slope in zip(random.uniform(*self.area, 10), np.exp(random.uniform(low, high, 10))):
            pixels = share * image_width * image_height
            width, height = round(math.sqrt(pixels * slope)), round(math.sqrt(pixels / slope))
            if 0 < width <= image_width and 0 < height <= image_height:
                left, top = random.integers(0, [image_width - width + 1, image_height - height + 1]).tolist()
                return left, top, width, height
        width = min(image_width, max(round(image_height * self.aspect[1]), 1))
        height = min(image_height, max(round(image_width / self.aspect[0]), 1))
        return (image_width - width) // 2, (image_height - height) // 2, width, height


@dataclasses.dataclass(frozen=True)
class ColourJitter:
    """Changes brightness, contrast, saturation and hue by random amounts, in a random order.

    A strength s of the first three blends by a factor uniform in [max(1 - s, 0), 1 + s] with black, with the mean grey,
    with the grey image. `hue` turns the colour circle by a part of it uniform in [-hue, hue], at most 0.5.
    """

    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    field: str = "image"

    def __post_init__(self) -> None:
        strengths = (self.brightness, self.contrast, self.saturation, self.hue)
        if not all(each >= 0 for each in strengths) or self.hue > 0.5:
            raise ValueError(f"Strengths are at least 0, and hue at most 0.5; got {strengths}.")

    def __call__(self, example: Example, random: np.random.Generator) -> Mapping[str, Any]:
        """Return the example with the colours of its image changed."""
        picture = _picture(example[self.field], self.field)
        strengths = {"Brightness": self.brightness, "Contrast": self.contrast, "Color": self.saturation}
        factors = {name: random.uniform(max(1 - each, 0), 1 + each) for name, each in strengths.items() if each}
        changes: list[Callable[[Any], Any]] = [
            functools.partial(_enhance, name=name, factor=factor) for name, factor in factors.items()
        ]
        if self.hue:
            changes.append(functools.partial(_turn_hue, part=random.uniform(-self.hue, self.hue)))
        for index in random.permutation(len(changes)):
            picture = changes[index](picture)
        return {**example, self.field: _array(picture, example[self.field])}


@dataclasses.dataclass(frozen=True)
class CutOut:
    """Sets a square of `size` pixels at a random place to `value`; parts of it may be outside the image.

    DeVries and Taylor, "Improved Regularization of Convolutional Neural Networks with Cutout" (2017).
    """

    size: int
    value: int = 0
    field: str = "image"

    def __post_init__(self) -> None:
        whole_number("size, in pixels,", self.size)

    def __call__(self, example: Example, random: np.random.Generator) -> Mapping[str, Any]:
        """Return the example with a part of its image erased."""
        image = np.array(example[self.field])
        top, left = random.integers(0, image.shape[:2]) - self.size // 2
        image[max(top, 0) : max(top + self.size, 0), max(left, 0) : max(left + self.size, 0)] = self.value
        return {**example, self.field: image}


@dataclasses.dataclass(frozen=True)
class RandAugment:
    """Applies `num_operations` operations, drawn from fourteen, at one strength.

    Cubuk et al., "RandAugment" (2020): identity, auto-contrast, equalise, rotate, solarise, colour, posterise,
    contrast, brightness, sharpness, shear and translate by x and y. `magnitude` goes from 0 to 10: rotation to 30
    degrees, shear to 0.3, translation to 0.45 of the image, factors to 1 +- 0.9, posterise down to 4 bits. What moves
    in from outside is `fill`.
    """

    num_operations: int = 2
    magnitude: float = 9.0
    fill: int = 128
    field: str = "image"

    def __post_init__(self) -> None:
        if not (0 <= self.magnitude <= 10 and self.num_operations >= 1):
            raise ValueError(
                f"magnitude is between 0 and 10 and num_operations at least 1; got {self.magnitude} and "
                f"{self.num_operations}."
            )

    def __call__(self, example: Example, random: np.random.Generator) -> Mapping[str, Any]:
        """Return the example with its image changed."""
        picture = _picture(example[self.field], self.field)
        for name in random.choice(_OPERATIONS, self.num_operations):
            sign = 1 if random.random() < 0.5 else -1
            picture = _apply(picture, name, self.magnitude / 10, sign, self.fill)
        return {**example, self.field: _array(picture, example[self.field])}


@dataclasses.dataclass(frozen=True)
class MaskSpectrogram:
    """Sets random bands of times and of frequencies of a spectrogram (frames, frequencies) to its mean.

    SpecAugment without time warping: Park et al. (2019). Each mask is uniform between 0 and its largest width.
    """

    num_times: int = 2
    most_frames: int = 20
    num_frequencies: int = 2
    most_frequencies: int = 8
    field: str = "audio"

    def __post_init__(self) -> None:
        numbers = (self.num_times, self.most_frames, self.num_frequencies, self.most_frequencies)
        if not all(isinstance(each, int | np.integer) and each >= 0 for each in numbers):
            raise ValueError(f"Numbers and widths of masks are whole numbers, at least 0; got {numbers}.")

    def __call__(self, example: Example, random: np.random.Generator) -> Mapping[str, Any]:
        """Return the example with its spectrogram masked."""
        values = np.array(example[self.field])
        mean = values.mean(dtype=np.float64).astype(values.dtype)
        masks = (0, self.num_times, self.most_frames), (1, self.num_frequencies, self.most_frequencies)
        for dim, count, most in masks:
            for _ in range(count):
                width = int(random.integers(0, min(most, values.shape[dim]) + 1))
                start = int(random.integers(0, values.shape[dim] - width + 1))
                values[(slice(None),) * dim + (slice(start, start + width),)] = mean
        return {**example, self.field: values}


_OPERATIONS = (
    *("identity", "autocontrast", "equalize", "rotate", "solarize", "Color", "posterize", "Contrast", "Brightness"),
    *("Sharpness", "shear x", "shear y", "translate x", "translate y"),
)


def _apply(picture: Any, name: str, strength: float, sign: int, fill: int) -> Any:
    """Return the picture after an operation of RandAugment; `strength` in [0, 1]."""
    operations = extras.require("PIL.ImageOps")
    if name in ("autocontrast", "equalize"):
        return getattr(operations, name)(picture)
    if name == "solarize":
        return operations.solarize(picture, threshold=round(256 * (1 - strength)))
    if name == "posterize":
        return operations.posterize(picture, 8 - round(4 * strength))
    if name in ("Color", "Contrast", "Brightness", "Sharpness"):
        return _enhance(picture, name=name, factor=1 + sign * 0.9 * strength)
    return picture if name == "identity" else _move(picture, name, sign * strength, fill)


def _move(picture: Any, name: str, strength: float, fill: int) -> Any:
    """Return the picture rotated, sheared or translated; `strength` in [-1, 1]."""
    image = extras.require("PIL.Image")
    colour = (fill,) * len(picture.getbands())
    filled = {"fillcolor": colour if len(colour) > 1 else fill, "resample": image.Resampling.BILINEAR}
    if name == "rotate":
        return picture.rotate(30 * strength, **filled)
    shear, shift = 0.3 * strength, 0.45 * strength
    matrix = {
        "shear x": (1, shear, 0, 0, 1, 0),
        "shear y": (1, 0, 0, shear, 1, 0),
        "translate x": (1, 0, shift * picture.width, 0, 1, 0),
        "translate y": (1, 0, 0, 0, 1, shift * picture.height),
    }[name]
    return picture.transform(picture.size, image.Transform.AFFINE, matrix, **filled)


def _enhance(picture: Any, *, name: str, factor: float) -> Any:
    return getattr(extras.require("PIL.ImageEnhance"), name)(picture).enhance(factor)


def _turn_hue(picture: Any, *, part: float) -> Any:
    """Return an RGB picture with its hues turned by a part of the circle; a grey one as it is."""
    if picture.mode != "RGB":
        return picture
    image = extras.require("PIL.Image")
    hue, saturation, value = picture.convert("HSV").split()
    turned = image.fromarray((np.asarray(hue).astype(np.int16) + round(part * 256)).astype(np.uint8))
    return image.merge("HSV", (turned, saturation, value)).convert("RGB")


def _picture(values: Any, field: str) -> Any:
    """Return Pillow's image of an array; ValueError where it has no such images."""
    array = np.asarray(values)
    channels = array.shape[2] if array.ndim == 3 else 1
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or channels not in (1, 3):
        raise ValueError(
            f"Field {field!r} must be an image of uint8 with one channel or three, before it is made float; got "
            f"{array.dtype} of shape {array.shape}."
        )
    return extras.require("PIL.Image").fromarray(array[..., 0] if array.ndim == 3 and channels == 1 else array)


def _array(picture: Any, like: Any) -> np.ndarray:
    """Return the picture's array with as many dims as `like`."""
    array = np.array(picture)  # a copy, which the user's own transforms may write into
    return array[..., None] if array.ndim < np.ndim(like) else array


def _check_range(name: str, given: tuple[float, float], most: float) -> None:
    low, high = given
    if not 0 < low <= high <= most:
        raise ValueError(f"{name} is a range (low, high) above 0 and up to {most}; got {given}.")
