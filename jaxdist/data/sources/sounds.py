"""Sound files: read by libsndfile (WAV of every kind, FLAC, OGG, MP3), resampled to one declared rate by SciPy."""

import io
import math
import os
import struct
from collections.abc import Sequence

import numpy as np

from jaxdist import extras
from jaxdist.data.fingerprints import FileList, fingerprint_files
from jaxdist.data.sources.listing import list_by_class, read_file
from jaxdist.data.sources.source import CorruptExample, Example, checked_index

SOUND_SUFFIXES = (".wav", ".flac", ".ogg", ".mp3", ".aif", ".aiff")


class SoundFolder:
    """Sounds by class: `audio` float32 (samples,) in [-1, 1], mean of the channels; `label` int32.

    Args:
      root: the folder of the classes' folders.
      num_samples: the length all sounds are shortened or zero-padded to; a field `length` int32 tells how much is
        sound. None keeps each sound's own.
      sample_rate: in hertz; sounds of another rate are resampled to it (`scipy.signal.resample_poly`). None takes the
        first file's, and refuses files of another one.
      classes: the names of the classes by number, those of the training data for example; None takes the folders'.
    """

    def __init__(
        self,
        root: str | os.PathLike,
        *,
        num_samples: int | None = None,
        sample_rate: int | None = None,
        classes: Sequence[str] | None = None,
    ):
        extras.require("soundfile")
        self._num_samples, self._declared_rate = num_samples, sample_rate
        self.classes, found, self._labels = list_by_class(root, SOUND_SUFFIXES, classes)
        self.files = FileList(found, root)
        self.vocabulary = {"label": self.classes}
        self._first_rate: int | None = None
        self._fingerprint: str | None = None

    @property
    def sample_rate(self) -> int:
        """The samples a second of every example."""
        if self._declared_rate is not None:
            return self._declared_rate
        if self._first_rate is None:
            self._first_rate = _first_rate(self.files)
        return self._first_rate

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Example:
        index = checked_index(index, len(self))
        path = self.files[index]
        audio, sample_rate = read_sound(path)
        if sample_rate != self.sample_rate and self._declared_rate is None:
            raise ValueError(
                f"{path} has {sample_rate} samples a second, the first file {self.sample_rate}. Declare one rate to "
                f"resample all sounds to, as in SoundFolder(..., sample_rate={self.sample_rate})."
            )
        audio = resample(audio, sample_rate, self.sample_rate)
        label = np.int32(self._labels[index])
        if self._num_samples is None:
            return {"audio": audio, "label": label}
        audio = audio[: self._num_samples]
        padded = np.pad(audio, (0, self._num_samples - len(audio)))
        return {"audio": padded, "length": np.int32(len(audio)), "label": label}

    def location(self, index: int) -> str:
        """Return the file of an example."""
        return self.files[index]

    def fingerprint(self) -> str:
        """Return the hash of the settings, the classes, and the files' names, sizes and contents (in samples)."""
        if self._fingerprint is None:
            settings = (self._num_samples, self._declared_rate, *self.classes)
            self._fingerprint = fingerprint_files("sounds", self.files, *settings)
        return self._fingerprint


def read_sound(path: str | os.PathLike) -> tuple[np.ndarray, int]:
    """Return a file's samples, float32 (samples,), mean over the channels, and the samples a second.

    Integers are divided by half their range, so they are in [-1, 1); float files are taken as they are.
    """
    soundfile = extras.require("soundfile")
    data = read_file(os.fspath(path))
    _check_whole(data, os.fspath(path))
    try:
        samples, rate = soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True)
    except (soundfile.SoundFileError, ValueError, TypeError) as error:
        raise CorruptExample(f"Unreadable sound: {os.fspath(path)}: {error}") from error
    return samples[:, 0] if samples.shape[1] == 1 else samples.mean(axis=1, dtype=np.float32), int(rate)


def resample(audio: np.ndarray, rate: int, wanted: int) -> np.ndarray:
    """Return the sound with `wanted` samples a second, by a polyphase filter."""
    if rate == wanted:
        return audio
    divisor = math.gcd(rate, wanted)
    resampled = extras.require("scipy.signal").resample_poly(audio, wanted // divisor, rate // divisor)
    return resampled.astype(np.float32)


def _first_rate(files: Sequence[str]) -> int:
    """Return the samples a second of the first file that can be read."""
    for path in files:
        try:
            return read_sound(path)[1]
        except CorruptExample:
            continue
    raise CorruptExample(f"None of the {len(files)} sounds can be read; the first is {files[0]}.")


def _check_whole(data: bytes, path: str) -> None:
    """Raise CorruptExample where a WAV file ends before its samples do: libsndfile would return what is there."""
    if data[:4] not in (b"RIFF", b"RIFX"):
        return
    order, place = "<" if data[:4] == b"RIFF" else ">", 12
    while place + 8 <= len(data):
        (size,) = struct.unpack(f"{order}I", data[place + 4 : place + 8])
        if data[place : place + 4] == b"data":
            if size < 2**32 - 1 and place + 8 + size > len(data):  # the largest size means unknown: a stream
                raise CorruptExample(f"Truncated sound: {path} declares {size} bytes of samples and ends before.")
            return
        place += 8 + size + size % 2
