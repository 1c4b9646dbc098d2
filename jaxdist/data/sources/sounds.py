"""Sound files: read by libsndfile (WAV of every kind, FLAC, OGG, MP3), resampled to one declared rate by SciPy."""

import functools
import io
import math
import os
import re
import struct
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxdist import extras
from jaxdist.data.decoders import wav
from jaxdist.data.fingerprints import FileList, fingerprint_files
from jaxdist.data.sources.folders import UnlabelledFiles
from jaxdist.data.sources.listing import list_by_class, read_file
from jaxdist.data.sources.source import CorruptExample, Example, checked_index
from jaxdist.setting_group import whole_number

SOUND_SUFFIXES = (
    *(".wav", ".wave", ".flac", ".ogg", ".oga", ".opus", ".mp3"),
    *(".aif", ".aiff", ".aifc", ".au", ".snd", ".caf", ".w64", ".rf64"),
)
UNREAD_SOUND_SUFFIXES = (".m4a", ".aac", ".wma", ".amr", ".ape", ".wv", ".mid", ".webm", ".mp4")
"""Kinds of sounds that a folder may hold and that libsndfile does not read: they are refused, not left out."""


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
        for name, value in (("num_samples", num_samples), ("sample_rate", sample_rate)):
            if value is not None:
                whole_number(name, value)
        self._num_samples, self._declared_rate = num_samples, sample_rate
        self.classes, found, self._labels = list_by_class(root, SOUND_SUFFIXES, classes, unread=UNREAD_SOUND_SUFFIXES)
        self.files = FileList(found, root)
        self.vocabulary = {"label": self.classes}
        self._first_rate: int | None = None
        self._fingerprint: str | None = None

    def elsewhere(self, root: str | os.PathLike, classes: Sequence[str] | None) -> "SoundFolder":
        """Return the sounds of another folder, read as these are, at the same rate."""
        return SoundFolder(root, num_samples=self._num_samples, sample_rate=self.sample_rate, classes=classes)

    def unlabelled(self, root: str | os.PathLike) -> UnlabelledFiles:
        """Return a sound file, or the sounds of a folder and of those below it, read as these are."""
        read = functools.partial(_read_as, num_samples=self._num_samples, sample_rate=self.sample_rate)
        return UnlabelledFiles(root, SOUND_SUFFIXES, unread=UNREAD_SOUND_SUFFIXES, read=read)

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
        fields = _fields(resample(audio, sample_rate, self.sample_rate), self._num_samples)
        return {**fields, "label": np.int32(self._labels[index])}

    def location(self, index: int) -> str:
        """Return the file of an example."""
        return self.files[index]

    def fingerprint(self) -> str:
        """Return the hash of the settings, the classes, and the files' names, sizes and contents (in samples)."""
        if self._fingerprint is None:
            settings = (self._num_samples, self._declared_rate, *self.classes)
            self._fingerprint = fingerprint_files("sounds", self.files, *settings)
        return self._fingerprint


def _read_as(path: str, *, num_samples: int | None, sample_rate: int) -> Example:
    audio, rate = read_sound(path)
    return _fields(resample(audio, rate, sample_rate), num_samples)


def _fields(audio: np.ndarray, num_samples: int | None) -> Example:
    """Return `audio`, with `num_samples` shortened or padded to so many, and then `length`, how many are sound."""
    if num_samples is None:
        return {"audio": audio}
    audio = audio[:num_samples]
    return {"audio": np.pad(audio, (0, num_samples - len(audio))), "length": np.int32(len(audio))}


def read_sound(path: str | os.PathLike) -> tuple[np.ndarray, int]:
    """Return a file's samples, float32 (samples,), mean over the channels, and the samples a second.

    Integers are divided by half their range, so they are in [-1, 1); float files are taken as they are.

    Raises:
      CorruptExample: the file is not whole, or holds a number that is not finite.
    """
    name = os.fspath(path)
    data = read_file(name)
    samples, rate = wav.read_plain(data) or _read_by_libsndfile(data, name)
    return samples[:, 0] if samples.shape[1] == 1 else samples.mean(axis=1, dtype=np.float32), rate


def _read_by_libsndfile(data: bytes, name: str) -> tuple[np.ndarray, int]:
    """Return the samples, (samples, channels), and the samples a second; CorruptExample where not all can be read."""
    soundfile = extras.require("soundfile")
    _check_whole(data, name)
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            num_samples, rate = file.frames, int(file.samplerate)
            is_float = file.subtype in ("FLOAT", "DOUBLE")
            if file.format not in _CHECKED:
                raise ValueError(f"{file.format_info} does not say whether a file is whole")
            if file.format == "NIST" and (found := _NIST_SAMPLES.search(data, 0, _NIST_HEAD)):
                num_samples = int(found[1])
            if file.seekable():  # as soundfile.read does: the last bits of an MP3 depend on it
                file.seek(0)
            if num_samples >= _UNKNOWN:
                raise ValueError("its header does not say how many samples it has")
            samples = file.read(num_samples, dtype="float32", always_2d=True)
    except (soundfile.SoundFileError, ValueError, TypeError) as error:
        reason = getattr(error, "error_string", None) or error  # without the address of the buffer made here
        raise CorruptExample(
            f"Unreadable sound: {name}: {str(reason).rstrip('.')}. Copy it again, or convert it to FLAC or WAV."
        ) from error
    if len(samples) < num_samples:  # MP3 and OGG leave out what they cannot decode
        raise CorruptExample(f"Truncated sound: {name} has {num_samples} samples, and {len(samples)} can be read.")
    if is_float and not np.isfinite(samples).all():
        raise CorruptExample(f"Unreadable sound: {name} holds samples that are not finite.")
    return samples, rate


def resample(audio: np.ndarray, rate: int, wanted: int) -> np.ndarray:
    """Return the sound with `wanted` samples a second, by a polyphase filter; CorruptExample for rates out of reach."""
    if rate == wanted:
        return audio
    divisor = math.gcd(rate, wanted)
    if max(rate, wanted) // divisor > _MOST_PHASES:
        raise CorruptExample(
            f"A sound of {rate} samples a second cannot be resampled to {wanted}: the filter would have "
            f"{2 * _HALF_WIDTH * max(rate, wanted) // divisor} numbers. The header of the file may be damaged."
        )
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


class _Layout(NamedTuple):
    """How a kind of file divides into parts: an id, a size, content."""

    begin: int
    id_bytes: int
    size_format: str
    samples: bytes
    align: int
    size_includes_head: bool = False


_LAYOUTS = {
    b"RIFF": _Layout(12, 4, "<I", b"data", 2),
    b"RIFX": _Layout(12, 4, ">I", b"data", 2),
    b"RF64": _Layout(12, 4, "<I", b"data", 2),
    b"FORM": _Layout(12, 4, ">I", b"SSND", 2),
    b"caff": _Layout(8, 4, ">Q", b"data", 1),
    b"riff": _Layout(40, 16, "<Q", b"data", 8, size_includes_head=True),
}
_AU = {b".snd": ">II", b"dns.": "<II"}
_OGG_BEGIN, _OGG_END, _OGG_HEAD = 2, 4, 27
_INTEGERS, _FLOATS, _EXTENSIBLE = 1, 3, 0xFFFE
_CHECKED = ("WAV", "WAVEX", "RF64", "AIFF", "AU", "CAF", "W64", "OGG", "FLAC", "MP3", "NIST")
"""Kinds of files, as libsndfile names them, of which one that is cut off is known."""
_NIST_HEAD, _NIST_SAMPLES = 1024, re.compile(rb"sample_count -i (\d+)")
_HALF_WIDTH, _MOST_PHASES = 10, 10**6
"""Of the filter that resamples: samples on each side, as SciPy has it, and the most parts that one is divided into."""
_UNKNOWN = 2**62
"""More samples than a file has that knows their number, as one that was written to a pipe does not."""


def _check_whole(data: bytes, path: str) -> None:
    """Raise CorruptExample where a file ends before its samples do: libsndfile would return what is there."""
    is_short, kind = False, data[:4]
    if kind in _LAYOUTS:
        is_short = _ends_within_samples(data, _LAYOUTS[kind])
        _check_width(data, path)
    elif kind in _AU and len(data) >= 12:
        begin, size = struct.unpack(_AU[kind], data[4:12])
        is_short = size != 2**32 - 1 and begin + size > len(data)
    elif kind == b"OggS":
        is_short = not _ogg_is_whole(data, path)
    if is_short:
        raise CorruptExample(f"Truncated sound: {path} ends before the samples that it declares.")


def _check_width(data: bytes, path: str) -> None:
    """Raise CorruptExample where the samples of a WAV file take more bytes than their bits, as 24 in 32 do.

    libsndfile reads them as if they did not. An extensible header has the bits of the place that a sample takes.
    """
    if data[:4] not in (b"RIFF", b"RF64"):
        return
    place = 12
    while place + 24 <= len(data) and data[place : place + 4] != b"fmt ":
        (size,) = struct.unpack_from("<I", data, place + 4)
        place += 8 + size + size % 2
    if place + 24 <= len(data):
        tag, channels, _, _, width, bits = struct.unpack_from("<HHIIHH", data, place + 8)
        if tag in (_INTEGERS, _FLOATS, _EXTENSIBLE) and width != channels * -(-bits // 8):
            raise CorruptExample(
                f"Unreadable sound: {path} has samples of {bits} bits, and {channels} of them take {width} bytes. "
                "Write the file again with whole samples."
            )


def _ogg_is_whole(data: bytes, path: str) -> bool:
    """Return whether the last page is whole and an end; CorruptExample for several sounds one after another."""
    place, flags, has_begun = 0, 0, False
    while data[place : place + 4] == b"OggS" and place + _OGG_HEAD <= len(data):
        flags, count = data[place + 5], data[place + 26]
        if has_begun and flags & _OGG_BEGIN:
            raise CorruptExample(f"Unreadable sound: {path} holds several sounds, of which libsndfile reads the first.")
        has_begun |= not flags & _OGG_BEGIN
        place += _OGG_HEAD + count + sum(data[place + _OGG_HEAD : place + _OGG_HEAD + count])
    return bool(flags & _OGG_END) and place <= len(data)


def _ends_within_samples(data: bytes, layout: _Layout) -> bool:
    place, width = layout.begin, struct.calcsize(layout.size_format)
    head = layout.id_bytes + width
    unknown = 2 ** (8 * width) - 1  # a stream does not know its length
    while place + head <= len(data):
        (size,) = struct.unpack_from(layout.size_format, data, place + layout.id_bytes)
        if data[place : place + 4] == layout.samples:
            if size == unknown and data[:4] == b"RF64" and data[12:16] == b"ds64":
                (size,) = struct.unpack_from("<Q", data, 28)
            end = place + size + (0 if layout.size_includes_head else head)
            return size != unknown and (end > len(data) or (size == 0 and end < len(data)))
        size += 0 if layout.size_includes_head else head
        place += max(size + -size % layout.align, head)
    return True  # there are no samples
