"""Folders of files by class: `root/CLASS/FILE`, images or WAV sounds. Classes are numbered in alphabetical order."""

import io
import os
import pathlib
import wave
from collections.abc import Sequence
from typing import Literal

import numpy as np

from jaxdist import extras
from jaxdist.data.sources.source import CorruptExample, Example, fingerprint_text

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")


class ImageFolder:
    """Images by class: `image` uint8 (height, width, 3), `label` int32. JPEG, PNG and what else Pillow reads.

    Images differ in size; bring them to one in `example_fn` (see `transforms`).

    Args:
      root: the folder of the classes' folders.
      decode: False leaves `image` as the file's bytes, uint8 (bytes,); see `transforms.DecodeImage`.
    """

    def __init__(self, root: str | os.PathLike, *, decode: bool = True):
        if decode:
            extras.require("PIL.Image")
            extras.require("simplejpeg")
        self._decode = decode
        self.classes, self._files, self._labels = list_by_class(root, IMAGE_SUFFIXES)

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Example:
        path = self._files[index]
        data = read_file(path)
        image = decode_image(data, name=path) if self._decode else np.frombuffer(data, np.uint8)
        return {"image": image, "label": np.int32(self._labels[index])}

    def location(self, index: int) -> str:
        """Return the file of an example."""
        return self._files[index]

    def fingerprint(self) -> str:
        """Return the hash of all class names, file names and file sizes."""
        return _fingerprint("images" if self._decode else "encoded images", self.classes, self._files)


class WavFolder:
    """Sounds by class: `audio` float32 (samples,) in [-1, 1], mean of the channels; `label` int32.

    Args:
      root: the folder of the classes' folders.
      num_samples: the length all sounds are cut or zero-padded to; a field `length` int32 tells how much is sound.
        None keeps each sound's own.
      sample_rate: in hertz; a file with another one is refused, since nothing here resamples.
    """

    def __init__(self, root: str | os.PathLike, *, num_samples: int | None = None, sample_rate: int | None = None):
        self.classes, self._files, self._labels = list_by_class(root, (".wav",))
        self._num_samples, self._sample_rate = num_samples, sample_rate

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Example:
        path = self._files[index]
        audio, sample_rate = read_wav(path)
        if self._sample_rate not in (None, sample_rate):
            raise ValueError(
                f"{path} has {sample_rate} samples a second, expected are {self._sample_rate}. Resample it."
            )
        label = np.int32(self._labels[index])
        if self._num_samples is None:
            return {"audio": audio, "label": label}
        audio = audio[: self._num_samples]
        padded = np.pad(audio, (0, self._num_samples - len(audio)))
        return {"audio": padded, "length": np.int32(len(audio)), "label": label}

    def fingerprint(self) -> str:
        """Return the hash of all class names, file names and file sizes, and of the settings."""
        return _fingerprint("sounds", self.classes, self._files, self._num_samples, self._sample_rate)


def list_by_class(root: str | os.PathLike, suffixes: Sequence[str]) -> tuple[list[str], list[str], list[int]]:
    """Return the classes' names, and all files with one of the suffixes with the number of their class."""
    folder = pathlib.Path(root)
    if not folder.is_dir():
        raise ValueError(f"No such folder: {folder}.")
    classes = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
    files, labels = [], []
    for label, name in enumerate(classes):
        found = sorted(str(path) for path in (folder / name).rglob("*") if path.suffix.lower() in suffixes)
        files += found
        labels += [label] * len(found)
    if not files:
        raise ValueError(
            f"{folder} holds no files {', '.join(suffixes)} in folders named by class, as in {folder}/CLASS/FILE."
        )
    return classes, files, labels


def read_file(path: str) -> bytes:
    """Return a file's content; CorruptExample where it is gone or cannot be read."""
    try:
        # A file object would cost half as much again as reading a small file.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise CorruptExample(f"Unreadable file: {error}") from error
    try:
        data = os.read(descriptor, size := os.fstat(descriptor).st_size)
        while len(data) < size and (more := os.read(descriptor, size - len(data))):
            data += more
        return data
    finally:
        os.close(descriptor)


def decode_image(data: bytes, *, name: str, channels: Literal["RGB", "BGR"] = "RGB") -> np.ndarray:
    """Return the picture in `data` as uint8 (height, width, 3); CorruptExample, naming `name`, where there is none."""
    simplejpeg = extras.require("simplejpeg")
    try:
        if simplejpeg.is_jpeg(data):
            return simplejpeg.decode_jpeg(data, channels, fastdct=True)
        image = extras.require("PIL.Image")
        with image.open(io.BytesIO(data)) as picture:
            return np.asarray(picture.convert("RGB"))[..., :: 1 if channels == "RGB" else -1]
    except (ValueError, OSError, SyntaxError) as error:  # what the two decoders raise for broken data
        # Pillow names the buffer that we made where it does not know the format.
        reason = "of no known format" if "cannot identify" in str(error) else error
        raise CorruptExample(f"Unreadable image: {name}: {reason}") from error


def read_wav(path: str | os.PathLike) -> tuple[np.ndarray, int]:
    """Return a PCM file's samples, float32 (samples,) in [-1, 1], mean over the channels, and the samples a second."""
    try:
        with wave.open(os.fspath(path), "rb") as file:
            channels, width, rate, num_frames = file.getparams()[:4]
            data = file.readframes(num_frames)
    except (wave.Error, EOFError) as error:
        raise CorruptExample(f"Unreadable sound: {os.fspath(path)}: {error}") from error
    if len(data) != num_frames * channels * width:
        raise CorruptExample(f"Truncated sound: {os.fspath(path)} promises {num_frames} frames and ends before.")
    if width == 1:
        samples = np.frombuffer(data, np.uint8).astype(np.float32) / 128 - 1
    elif width == 3:
        low_first = np.zeros((len(data) // 3, 4), np.uint8)
        low_first[:, 1:] = np.frombuffer(data, np.uint8).reshape(-1, 3)
        samples = low_first.view("<i4")[:, 0].astype(np.float32) / 2**31
    else:
        samples = np.frombuffer(data, f"<i{width}").astype(np.float32) / 2 ** (8 * width - 1)
    return samples.reshape(-1, channels).mean(axis=1, dtype=np.float32), rate


def _fingerprint(kind: str, classes: list[str], files: list[str], *settings: object) -> str:
    sizes = [f"{pathlib.Path(path).parent.name}/{pathlib.Path(path).name}:{os.path.getsize(path)}" for path in files]
    return fingerprint_text(kind, *settings, *classes, *sizes)
