"""What `features.json` of a prepared TFDS data set declares, and examples decoded by it, without TensorFlow.

tfds builds its feature objects from that file, and some of them (Audio, Video) import TensorFlow when built. An example
is a tf.train.Example: lists of int64, float32 or bytes by name; nested sequences have lists of row lengths beside them.
"""

import dataclasses
import functools
import io
import json
import math
import os
import pathlib
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jaxdist import extras
from jaxdist.data.sources.images import ImageType, decode_image
from jaxdist.data.sources.source import CorruptExample

_KINDS = ("text", "classLabel", "boundingBox", "image", "video", "audio", "tensor")
_SOUND_BITS = {"PCM_S8": 8, "PCM_U8": 8, "PCM_16": 16, "PCM_24": 24, "PCM_32": 32}

_LIGHT = 2**14
"""The most numbers of a value that is decoded in no time: CIFAR's images have 3,072."""


class UnknownFeature(ValueError):
    """A feature that only its own class in tfds can decode."""


@dataclasses.dataclass(frozen=True)
class Feature:
    """One field of the examples.

    Attributes:
      name: with the names of the dicts around it, as in `objects/bbox`.
      kind: "numbers", "text", "image", "sound" (an encoded file), or "packed": numbers as bytes.
      dtype: of the numbers.
      shape: of one value; None where it differs.
      lengths: of the sequences around it, from the outermost on; None where they differ.
      compressed: whether packed numbers are compressed by zlib.
      names: of a class label, from its file; () without one.
    """

    name: str
    kind: str
    dtype: np.dtype
    shape: tuple[int | None, ...] = ()
    lengths: tuple[int | None, ...] = ()
    compressed: bool = False
    names: tuple[str, ...] = ()

    @functools.cached_property
    def has_shape_beside_it(self) -> bool:
        """Whether the shape of each value is stored: where several of its dims differ."""
        return self.kind in ("numbers", "packed") and self.shape.count(None) > 1

    @functools.cached_property
    def image_type(self) -> ImageType:
        """What images are decoded to: float32 ones are stored as four bytes a number, as four channels."""
        channels: Any = 4 if self.dtype == np.float32 else (self.shape[-1] or 3)
        return ImageType(channels, "uint16" if self.dtype == np.uint16 else "uint8", orient=False)

    @property
    def is_light(self) -> bool:
        """Whether decoding a value takes some microseconds, so that dividing a batch among threads only costs."""
        if self.kind == "text":
            return True
        dims = (*self.lengths, *self.shape)
        known = [dim for dim in dims if dim is not None]
        return self.kind != "sound" and len(known) == len(dims) and math.prod(known) <= _LIGHT

    def decode(self, lists: Mapping[str, Any]) -> np.ndarray | np.generic:
        """Return the field's value; `lists` are the features of a tf.train.Example.

        Raises:
          ValueError: the field is missing, or is no array, since its parts differ in length.
        """
        if len(self.lengths) > 1:
            return self._nested(lists)
        values = self._list(lists, f"{self.name}/value" if self.has_shape_beside_it else self.name)
        if not self.lengths:
            return self._single(values, lists)
        return self._sequence(values, (-1 if self.lengths[0] is None else self.lengths[0],))

    def _single(self, values: Sequence[Any], lists: Mapping[str, Any]) -> np.ndarray | np.generic:
        if self.kind == "numbers":
            shape = self._stored_shape(lists) if self.has_shape_beside_it else self.shape
            array = self._as_dtype(values)
            if not shape and len(array) == 1:
                return array[0]
            return array.reshape([-1 if dim is None else dim for dim in shape])
        (data,) = values or (b"",)
        return self._from_bytes(data, lists)

    def _sequence(self, values: Sequence[Any], leading: tuple[int, ...]) -> np.ndarray:
        """Return the values of a sequence as one array with the dims `leading` first."""
        if self.kind == "numbers":
            inner = [-1 if dim is None else dim for dim in self.shape]
            if not len(values):
                return np.zeros((*(max(dim, 0) for dim in leading), *(max(dim, 0) for dim in inner)), self.dtype)
            return self._as_dtype(values).reshape([*leading, *inner])
        parts = [np.asarray(self._from_bytes(data, {})) for data in values]
        shapes = {part.shape for part in parts}
        if len(shapes) > 1:
            raise ValueError(
                f"The parts of feature {self.name!r} differ in shape, {sorted(shapes)[:3]}, so they are no array. "
                "Leave the feature out of `fields`."
            )
        if not parts:
            return np.zeros((0, *(dim or 0 for dim in self.shape)), self.dtype)
        return np.stack(parts).reshape(*leading, *parts[0].shape)

    def _nested(self, lists: Mapping[str, Any]) -> np.ndarray:
        """Return sequences of sequences as one array; ValueError where they differ in length."""
        rows = [self._list(lists, f"{self.name}/ragged_row_lengths_{level}") for level in range(len(self.lengths) - 1)]
        values = self._list(lists, f"{self.name}/ragged_flat_values")
        for lengths in rows:
            if len(set(lengths)) > 1:
                raise ValueError(
                    f"Feature {self.name!r} is ragged: its sequences have the lengths {list(lengths)[:8]}, so they are "
                    "no array. Leave it out of `fields`, or prepare the data set with sequences of one length."
                )
        counts = [len(rows[0]), *(int(lengths[0]) if len(lengths) else 0 for lengths in rows)]
        return self._sequence(values, tuple(counts))

    def _stored_shape(self, lists: Mapping[str, Any]) -> tuple[int, ...]:
        return tuple(self._list(lists, f"{self.name}/shape"))

    def _list(self, lists: Mapping[str, Any], name: str) -> Sequence[Any]:
        if name not in lists:
            raise ValueError(f"The example has no feature {name!r}. Leave it out of `fields`, or filter such examples.")
        feature = lists[name]
        kind = feature.WhichOneof("kind")
        return () if kind is None else getattr(feature, kind).value

    def _as_dtype(self, values: Sequence[Any]) -> np.ndarray:
        if self.dtype.kind == "f":
            return np.fromiter(values, np.float32, len(values)).astype(self.dtype, copy=False)
        numbers = np.fromiter(values, np.int64, len(values))
        # An unsigned one of 64 bits was stored as the signed one of equal bits.
        return numbers.view(np.uint64) if self.dtype == np.uint64 else numbers.astype(self.dtype, copy=False)

    def _from_bytes(self, data: bytes, lists: Mapping[str, Any]) -> np.ndarray | np.generic:
        if self.kind == "text":
            return np.frombuffer(data, np.uint8)
        if self.kind == "image":
            return _decode_image(data, self)
        if self.kind == "sound":
            return _decode_sound(data, self)
        shape = self._stored_shape(lists) if self.has_shape_beside_it else self.shape
        array = np.frombuffer(zlib.decompress(data) if self.compressed else data, self.dtype)
        array = array.reshape([-1 if dim is None else dim for dim in shape])
        return array if self.shape else array[()]


def read_features(folder: str | os.PathLike) -> list[Feature]:
    """Return the features of the prepared data set in `folder`, by name.

    Raises:
      UnknownFeature: only tfds itself can decode one of them.
    """
    declared = json.loads((pathlib.Path(folder) / "features.json").read_text())
    return sorted(_features(declared, "", pathlib.Path(folder), ""), key=lambda feature: feature.name)


def decode_features(features: Sequence[Feature], record: bytes) -> dict[str, np.ndarray | np.generic]:
    """Return the fields of a tf.train.Example; CorruptExample where `record` is none."""
    try:
        lists = _message_class().FromString(record).features.feature
    except extras.require("google.protobuf.message").DecodeError as error:
        raise CorruptExample(f"The record is not a tf.train.Example: {error}") from error
    return {feature.name: feature.decode(lists) for feature in features}


@functools.cache
def _message_class() -> Any:
    return extras.require("tensorflow_datasets.proto").tf_example_pb2.Example


def _features(
    declared: Mapping[str, Any], name: str, folder: pathlib.Path, file: str, lengths: tuple[int | None, ...] = ()
) -> Iterator[Feature]:
    """Yield the features below `declared`; `file` is what names the files beside features.json."""
    if "featuresDict" in declared:
        for key, inner in declared["featuresDict"].get("features", {}).items():
            below = f"{file}-{key.replace('/', '.')}" if file else key.replace("/", ".")
            yield from _features(inner, f"{name}/{key}" if name else key, folder, below, lengths)
    elif "sequence" in declared and str(declared.get("pythonClassName")).rpartition(".")[2] == "Sequence":
        length = int(declared["sequence"].get("length", -1))
        more = (*lengths, None if length == -1 else length)
        yield from _features(declared["sequence"]["feature"], name, folder, file, more)
    elif "translation" in declared and not declared["translation"].get("variableLanguagesPerExample"):
        for language in declared["translation"]["languages"]:
            yield Feature(f"{name}/{language}", "text", np.dtype(np.uint8), (None,), lengths)
    else:
        yield dataclasses.replace(_leaf(declared, name, folder, file), lengths=_more_lengths(declared, lengths))


def _more_lengths(declared: Mapping[str, Any], lengths: tuple[int | None, ...]) -> tuple[int | None, ...]:
    if "video" not in declared:
        return lengths
    shape = _shape(declared["video"])
    return (*lengths, shape[0] if shape else None)


def _leaf(declared: Mapping[str, Any], name: str, folder: pathlib.Path, file: str) -> Feature:
    """Return a feature that holds values itself."""
    kind = next((key for key in _KINDS if key in declared), "")
    settings = declared.get(kind, {})
    if kind == "text":
        return Feature(name, "text", np.dtype(np.uint8), (None,))
    if kind == "classLabel":
        return Feature(name, "numbers", np.dtype(np.int64), names=_names_of(folder / f"{file}.labels.txt"))
    if kind == "boundingBox":
        return Feature(name, "numbers", np.dtype(np.float32), (4,))
    if kind in ("image", "video"):
        shape = _shape(settings) or (None, None, None, 3)
        return Feature(name, "image", np.dtype(settings.get("dtype") or "uint8"), shape[-3:])
    if kind == "audio" and settings.get("lazyDecode"):
        return Feature(name, "sound", np.dtype(settings.get("dtype") or "int64"), _shape(settings))
    if kind in ("audio", "tensor"):
        return _tensor(settings, name)
    raise UnknownFeature(f"Feature {name!r} is of the class {declared.get('pythonClassName') or declared.get('type')}.")


def _tensor(settings: Mapping[str, Any], name: str) -> Feature:
    dtype, encoding = str(settings.get("dtype") or "int64"), str(settings.get("encoding") or "none").lower()
    if dtype in ("string", "object", "str") and not _shape(settings):
        return Feature(name, "text", np.dtype(np.uint8), (None,))
    try:
        numbers = np.dtype(dtype)
    except TypeError as error:
        raise UnknownFeature(f"Feature {name!r} has the dtype {dtype}.") from error
    if numbers.kind not in "biuf" or encoding not in ("none", "bytes", "zlib"):
        raise UnknownFeature(f"Feature {name!r} has the dtype {dtype} and the encoding {encoding}.")
    kind = "numbers" if encoding == "none" else "packed"
    return Feature(name, kind, numbers, _shape(settings), compressed=encoding == "zlib")


def _shape(settings: Mapping[str, Any]) -> tuple[int | None, ...]:
    dims = [int(dim) for dim in settings.get("shape", {}).get("dimensions", [])]
    return tuple(None if dim == -1 else dim for dim in dims)


def _names_of(path: pathlib.Path) -> tuple[str, ...]:
    """Return the names of a class label, from the file that tfds writes where it knows them."""
    if not path.exists():
        return ()
    return tuple(name.strip() for name in path.read_text(encoding="utf-8").split("\n") if name.strip())


def _decode_image(data: bytes, feature: Feature) -> np.ndarray:
    """Return an image as tfds does: in the orientation of its pixels."""
    image = decode_image(data, feature.image_type, name=f"feature {feature.name!r}")
    return np.ascontiguousarray(image).view(np.float32) if feature.dtype == np.float32 else image


def _decode_sound(data: bytes, feature: Feature) -> np.ndarray:
    """Return the samples of an encoded sound in whole numbers of its own width, as tfds does: (samples[, channels])."""
    soundfile = extras.require("soundfile")
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            bits = _SOUND_BITS.get(file.subtype, 16)
            samples = file.read(dtype="int16" if bits <= 16 else "int32", always_2d=True)
    except (soundfile.SoundFileError, ValueError, TypeError) as error:
        raise CorruptExample(f"Unreadable sound: feature {feature.name!r}: {error}") from error
    wanted = feature.shape[1] if len(feature.shape) > 1 else 1
    if wanted is not None and samples.shape[1] != wanted:
        raise ValueError(f"Feature {feature.name!r} has {wanted} channels; this sound has {samples.shape[1]}.")
    numbers = samples.astype(feature.dtype)
    return numbers if len(feature.shape) > 1 else numbers[:, 0]
