"""Sounds are what SciPy and libsndfile read, at one declared rate, or they are refused."""

import contextlib
import io
import struct

import numpy as np
import pytest
import scipy.io.wavfile
import scipy.signal
import soundfile

from jaxdist.data import CorruptExample, Loader, SoundFolder
from jaxdist.data.sources.sounds import read_sound

RANDOM = np.random.default_rng(0)
TONE = np.sin(np.arange(400) / 7).astype(np.float32) / 2


def scaled(values):
    """Return what SciPy read as floats in [-1, 1]."""
    if values.dtype == np.uint8:
        return values.astype(np.float64) / 128 - 1
    return values / (2.0 ** (8 * values.dtype.itemsize - 1) if values.dtype.kind == "i" else 1)


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("dtype", ["uint8", "int16", "int32", "float32", "float64"])
def test_wav_of_every_dtype_is_scipys(tmp_path, dtype, channels):
    values = RANDOM.uniform(-1, 1, (50, channels))
    info = np.iinfo(dtype) if "int" in dtype else None
    stored = (RANDOM.integers(info.min, info.max, (50, channels)) if info else values).astype(dtype)
    scipy.io.wavfile.write(tmp_path / "x.wav", 8000, stored)
    rate, theirs = scipy.io.wavfile.read(tmp_path / "x.wav")
    ours, our_rate = read_sound(tmp_path / "x.wav")
    assert our_rate == rate == 8000
    np.testing.assert_allclose(ours, scaled(theirs).reshape(50, channels).mean(axis=1), atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "subtype", "bound"),
    [
        *[("WAV", "PCM_24", 1e-6), ("WAV", "ULAW", 0.02), ("WAV", "ALAW", 0.02), ("WAVEX", "PCM_24", 1e-6)],
        *[("WAVEX", "FLOAT", 0), ("RF64", "PCM_16", 1e-4), ("FLAC", "PCM_24", 1e-6), ("OGG", "VORBIS", 0.1)],
        *[("MP3", "MPEG_LAYER_III", 0.1), ("OGG", "OPUS", 0.1), ("AIFF", "PCM_16", 1e-4), ("CAF", "PCM_24", 1e-6)],
    ],
)
def test_every_kind_of_file_is_read(tmp_path, kind, subtype, bound):
    soundfile.write(tmp_path / "x.wav", TONE, 8000, subtype=subtype, format=kind)
    ours, rate = read_sound(tmp_path / "x.wav")
    assert rate == 8000
    np.testing.assert_allclose(ours, TONE, atol=bound)
    theirs = soundfile.read(tmp_path / "x.wav", dtype="float32")[0]
    np.testing.assert_array_equal(ours, theirs)


def test_a_file_of_a_kind_that_does_not_know_its_length_is_refused_whatever_its_name(tmp_path):
    for kind in ("NIST", "IRCAM"):  # the corpus TIMIT has NIST files, which are named .wav
        soundfile.write(tmp_path / f"{kind}.wav", np.tile(TONE, 20), 8000, format=kind, subtype="PCM_16")
    np.testing.assert_array_equal(
        read_sound(tmp_path / "NIST.wav")[0], soundfile.read(tmp_path / "NIST.wav", dtype="float32")[0]
    )
    with pytest.raises(CorruptExample, match=r"IRCAM/CARL\) does not say whether .* convert it to FLAC or WAV"):
        read_sound(tmp_path / "IRCAM.wav")


def test_the_other_byte_order_is_read(tmp_path):
    soundfile.write(tmp_path / "x.wav", TONE, 8000, subtype="PCM_16", endian="BIG", format="WAV")
    assert (tmp_path / "x.wav").read_bytes()[:4] == b"RIFX"
    np.testing.assert_allclose(read_sound(tmp_path / "x.wav")[0], TONE, atol=1e-4)


@pytest.mark.parametrize("kind", ["WAV", "RIFX"])
def test_a_sound_that_ends_early_is_corrupt(tmp_path, kind):
    path = tmp_path / "x.wav"
    soundfile.write(path, TONE, 8000, format="WAV", endian="BIG" if kind == "RIFX" else "LITTLE")
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(CorruptExample, match=r"Truncated sound: .*x\.wav"):
        read_sound(path)
    path.write_bytes(b"RIFFnonsense")
    with pytest.raises(CorruptExample, match=r"sound: .*x\.wav"):
        read_sound(path)


@pytest.fixture
def sounds(tmp_path):
    for name, rate in (("no/x.wav", 8000), ("yes/x.wav", 44100), ("yes/y.flac", 1200)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        soundfile.write(tmp_path / name, TONE, rate, subtype="PCM_16")
    return tmp_path


def test_sounds_are_resampled_to_the_declared_rate(sounds):
    source = SoundFolder(sounds, sample_rate=16000)
    stored = [soundfile.read(source.location(i), dtype="float32") for i in range(3)]
    for example, (audio, rate) in zip(source, stored):
        up, down = (16000 // np.gcd(16000, rate), rate // np.gcd(16000, rate))
        np.testing.assert_array_equal(example["audio"], scipy.signal.resample_poly(audio, up, down).astype(np.float32))
    assert [int(example["label"]) for example in source] == [0, 1, 1]


def test_a_rate_that_no_filter_reaches_is_a_bad_example_and_takes_no_memory(sounds):
    soundfile.write(sounds / "no/x.wav", TONE, 2**31 - 1, subtype="PCM_16")
    with pytest.raises(CorruptExample, match=r"2147483647 samples a second cannot be resampled to 16000"):
        SoundFolder(sounds, sample_rate=16000)[0]


def test_mixed_rates_are_refused_where_none_is_declared(sounds):
    source = SoundFolder(sounds)
    assert source.sample_rate == 8000
    assert len(source[0]["audio"]) == 400
    with pytest.raises(ValueError, match="44100 samples a second, the first file 8000"):
        source[1]


def test_sounds_are_padded_to_one_length(sounds):
    source = SoundFolder(sounds, num_samples=500, sample_rate=8000, classes=("maybe", "no", "yes"))
    ((batch, _),) = Loader(source, global_batch_size=3, seed=0, shuffle=False, num_epochs=1)
    assert batch["audio"].shape == (3, 500)
    assert batch["length"].tolist() == [400, 73, 500]
    assert not batch["audio"][0, 400:].any()
    assert batch["label"].tolist() == [1, 2, 2]
    assert source.fingerprint() != SoundFolder(sounds).fingerprint()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of soundfile's own callbacks
@pytest.mark.parametrize("kind", ["WAV", "RF64", "AIFF", "AU", "dns.", "CAF", "W64", "OGG", "MP3", "FLAC", "NIST"])
@pytest.mark.parametrize("num_samples", [2, 2000])
def test_a_file_of_any_kind_that_is_cut_anywhere_is_corrupt(tmp_path, kind, num_samples):
    whole, cut = tmp_path / "whole", tmp_path / "x.wav"
    settings = {"format": "AU", "endian": "LITTLE"} if kind == "dns." else {"format": kind}
    soundfile.write(whole, np.resize(TONE, num_samples), 8000, **settings)
    data, expected = whole.read_bytes(), read_sound(whole)[0]
    for end in {*range(0, min(len(data), 200), 3 if num_samples == 2 else 40), len(data) // 2, len(data) - 50}:
        cut.write_bytes(data[: max(end, 0)])
        found = expected
        with contextlib.suppress(CorruptExample):
            found, _ = read_sound(cut)
        np.testing.assert_array_equal(found, expected)  # at most what was cut off were no samples


@pytest.mark.parametrize("kind", ["MP3", "OGG"])
def test_a_file_with_a_damaged_middle_is_corrupt(tmp_path, kind):
    soundfile.write(tmp_path / "x.wav", RANDOM.uniform(-0.5, 0.5, 40_000), 8000, format=kind)
    data = bytearray((tmp_path / "x.wav").read_bytes())
    data[len(data) // 2 : len(data) // 2 + 200] = RANDOM.bytes(200)
    (tmp_path / "x.wav").write_bytes(data)
    with pytest.raises(CorruptExample, match=r"x\.wav has 40000 samples, and \d+ can be read"):
        read_sound(tmp_path / "x.wav")


def test_samples_that_are_not_finite_are_refused(tmp_path):
    soundfile.write(tmp_path / "x.wav", np.array([0.0, np.nan]), 8000, subtype="FLOAT")
    with pytest.raises(CorruptExample, match=r"x\.wav holds samples that are not finite"):
        read_sound(tmp_path / "x.wav")


def wav(*chunks):
    body = b"".join(kind + struct.pack("<I", len(content)) + content for kind, content in chunks)
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WAVE" + body


def header(bits, width):
    return b"fmt ", struct.pack("<HHIIHH", 1, 2, 8000, 8000 * width, width, bits)


def test_what_libsndfile_would_read_in_part_or_as_other_samples_is_refused(tmp_path):
    def ogg(kind):
        file = io.BytesIO()
        soundfile.write(file, np.sin(np.arange(6000) / 9), 24000, format="OGG", subtype=kind)
        return file.getvalue()

    samples, path = (b"data", bytes(range(240))), tmp_path / "sound"
    plain = wav(header(16, 4), samples)
    path.write_bytes(plain)
    assert len(read_sound(path)[0]) == 60
    for data in (
        plain + plain,
        wav(header(16, 4), samples, samples),
        wav(header(24, 8), samples),
        wav(header(12, 8), samples),
        *(ogg(kind) + ogg("VORBIS") for kind in ("VORBIS", "OPUS")),
    ):
        path.write_bytes(data)
        with pytest.raises(CorruptExample):
            read_sound(path)


def test_a_file_in_which_nothing_can_be_sought_is_read_whole(tmp_path):
    path = tmp_path / "sound.wav"
    soundfile.write(path, np.sin(np.arange(8000) / 9), 8000, subtype="GSM610")
    np.testing.assert_array_equal(read_sound(path)[0], soundfile.read(path, dtype="float32")[0])


def test_a_header_that_was_never_completed_is_no_empty_sound(tmp_path):
    soundfile.write(tmp_path / "x.wav", TONE, 8000, subtype="PCM_16")
    content = bytearray((tmp_path / "x.wav").read_bytes())
    content[40:44] = bytes(4)  # the size of the samples, as a recorder that is killed leaves it
    (tmp_path / "x.wav").write_bytes(content)
    with pytest.raises(CorruptExample, match="Truncated sound"):
        read_sound(tmp_path / "x.wav")
    soundfile.write(tmp_path / "x.wav", TONE[:0], 8000, subtype="PCM_16")
    assert read_sound(tmp_path / "x.wav")[0].shape == (0,)


@pytest.mark.parametrize("name", ["num_samples", "sample_rate"])
@pytest.mark.parametrize("value", [0, -1, 2.5, "8000"])
def test_lengths_and_rates_are_whole_numbers(sounds, name, value):
    with pytest.raises(ValueError, match=f"{name} is a whole number of at least 1"):
        SoundFolder(sounds, **{name: value})
