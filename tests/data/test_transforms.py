import io
import math
import pickle

import hypothesis
import numpy as np
import pytest
import scipy.signal
from hypothesis import strategies as st
from PIL import Image

from jaxdist.data import ArraySource, CorruptExample, Loader, assembly, transforms
from jaxdist.data.sources.folders import ImageFolder

IMAGE = np.arange(5 * 4 * 3, dtype=np.uint8).reshape(5, 4, 3)


def apply(transform, field="image", value=IMAGE, seed=0):
    return pickle.loads(pickle.dumps(transform))({field: value, "label": np.int32(3)}, np.random.default_rng(seed))


def places(image):
    """Where a crop of IMAGE was cut."""
    return [
        (top, left)
        for top in range(6 - image.shape[0])
        for left in range(5 - image.shape[1])
        if np.array_equal(IMAGE[top : top + image.shape[0], left : left + image.shape[1]], image)
    ]


def test_random_crops_reach_every_place():
    crops = [apply(transforms.RandomCrop(3, 2), seed=seed) for seed in range(200)]
    assert all(crop["label"] == 3 for crop in crops)
    found = {place for crop in crops for place in places(crop["image"])}
    assert found == {(top, left) for top in range(3) for left in range(3)}
    padded = [apply(transforms.RandomCrop(5, 4, padding=1), seed=seed)["image"] for seed in range(100)]
    assert any(np.array_equal(crop, IMAGE) for crop in padded)
    assert any(not crop[0].any() and crop[1:].any() for crop in padded)
    with pytest.raises(ValueError, match="Cannot crop 6 x 2 out of an image of 5 x 4"):
        apply(transforms.RandomCrop(6, 2))


def test_centre_crop_and_resize():
    np.testing.assert_array_equal(apply(transforms.CentreCrop(3, 2))["image"], IMAGE[1:4, 1:3])
    assert apply(transforms.Resize(10, 8))["image"].shape == (10, 8, 3)
    np.testing.assert_array_equal(apply(transforms.Resize(5, 4))["image"], IMAGE)


def test_half_of_the_images_are_mirrored():
    images = [apply(transforms.RandomFlip(), seed=seed)["image"] for seed in range(400)]
    flipped = [np.array_equal(image, IMAGE[:, ::-1]) for image in images]
    assert abs(np.mean(flipped) - 0.5) < 0.1
    assert sum(flipped) + sum(np.array_equal(image, IMAGE) for image in images) == 400


def test_normalise_centres_each_channel():
    image = apply(transforms.Normalise(mean=(0.1, 0.2, 0.3), std=(0.5, 1.0, 2.0)))["image"]
    assert image.dtype == np.float32
    np.testing.assert_allclose(image, (IMAGE / 255 - [0.1, 0.2, 0.3]) / [0.5, 1, 2], atol=1e-6)


def test_encoded_images_are_decoded():
    data = io.BytesIO()
    Image.fromarray(IMAGE).save(data, "png")
    encoded = np.frombuffer(data.getvalue(), np.uint8)
    np.testing.assert_array_equal(apply(transforms.DecodeImage(), value=encoded)["image"], IMAGE)
    with pytest.raises(CorruptExample, match="field 'image'"):
        apply(transforms.DecodeImage(), value=encoded[:20])


def test_the_spectrogram_of_a_tone_peaks_at_its_frequency():
    tone = np.sin(2 * np.pi * 1000 * np.arange(8000) / 8000).astype(np.float32)
    spectrogram = apply(transforms.Spectrogram(window=400, hop=160), "audio", tone)["audio"]
    assert spectrogram.shape == (48, 201)
    assert spectrogram.dtype == np.float32
    assert (spectrogram.argmax(axis=1) == 1000 * 400 // 8000).all()
    with pytest.raises(ValueError, match="at least one window"):
        apply(transforms.Spectrogram(), "audio", tone[:10])


def test_spectrograms_are_those_of_scipy_and_mel_bands_the_formula():
    random, rate = np.random.default_rng(0), 16000
    audio = random.normal(size=4000).astype(np.float32)
    window = np.hanning(400)
    stft = scipy.signal.ShortTimeFFT(window, 160, rate, mfft=400, phase_shift=None)
    padded = np.concatenate([np.zeros(1400), audio, np.zeros(400)])  # slices are centred at multiples of the hop
    wanted = np.abs(stft.stft(padded, p0=10)).T[:23] ** 2
    found = apply(transforms.Spectrogram(), "audio", audio)["audio"]
    np.testing.assert_allclose(found, np.log(wanted + 1e-10), rtol=1e-3, atol=1e-3)
    mel = transforms.MelSpectrogram(rate, num_mels=40, low=50, high=7000)

    def in_mel(hertz):
        return 2595 * math.log10(1 + hertz / 700)

    step = (in_mel(7000) - in_mel(50)) / 41
    hertz = [700 * (10 ** ((in_mel(50) + i * step) / 2595) - 1) for i in range(42)]
    bands = np.zeros((201, 40))
    for (frequency, band), _ in np.ndenumerate(bands):
        low, centre, high = hertz[band : band + 3]
        rising, falling = (40 * frequency - low) / (centre - low), (high - 40 * frequency) / (high - centre)
        bands[frequency, band] = max(0, min(rising, falling))
    np.testing.assert_allclose(mel.bands(), bands, atol=1e-6)
    found = apply(mel, "audio", audio)["audio"]
    assert found.shape == (23, 40)
    np.testing.assert_allclose(found, np.log(wanted @ bands + 1e-10), rtol=1e-3, atol=1e-3)
    assert transforms.MelSpectrogram(rate).bands().shape == (201, 80)
    for wrong, message in (({"num_mels": 200}, "no frequency"), ({"high": 9000}, "half the sample rate, 8000")):
        with pytest.raises(ValueError, match=message):
            transforms.MelSpectrogram(rate, **wrong)


def test_labels_out_of_range_are_refused():
    with pytest.raises(ValueError, match="Label out of range"):
        apply(transforms.CheckLabel(3))
    apply(transforms.CheckLabel(4))


def test_a_chain_augments_the_same_in_any_batch():
    source = ArraySource({"image": np.stack([IMAGE + i for i in range(9)]), "label": np.arange(9)})
    chain = transforms.Chain((transforms.RandomCrop(3, 3, padding=1), transforms.RandomFlip(), transforms.Normalise()))

    def load(**settings):
        loader = Loader(source, seed=0, num_epochs=1, example_fn=chain, **settings)
        batches = [batch for batch, _ in loader]
        true_rows = np.concatenate([batch["mask"] for batch in batches]) == 1
        labels = np.concatenate([batch["label"] for batch in batches])[true_rows]
        return np.concatenate([batch["image"] for batch in batches])[true_rows][np.argsort(labels)]

    np.testing.assert_array_equal(load(global_batch_size=4), load(global_batch_size=3, num_threads=0))


@pytest.fixture
def photographs(tmp_path):
    """A folder of encoded images, JPEG and PNG, of a size each."""
    random = np.random.default_rng(0)
    for number, (height, width) in enumerate([(40, 56), (33, 41), (40, 40), (35, 34)]):
        ramp = np.linspace(0, 200, height * width * 3).reshape(height, width, 3) + random.normal(0, 9, (1, width, 3))
        picture = Image.fromarray(np.clip(ramp, 0, 255).astype(np.uint8))
        (tmp_path / "class").mkdir(exist_ok=True)
        picture.save(tmp_path / "class" / f"{number}.{'png' if number == 2 else 'jpg'}")
    return tmp_path


@pytest.mark.parametrize(("height", "width"), [(32, 32), (33, 34), (1, 1), (33, 5)])
def test_decoding_cropping_and_flipping_in_one_go_changes_no_bit(photographs, height, width):
    source = ImageFolder(photographs, decode=False)
    chain = transforms.Chain((transforms.DecodeImage(), transforms.RandomCrop(height, width), transforms.RandomFlip()))
    for settings in ({"num_threads": 0}, {"num_threads": 2}):
        loaders = [
            Loader(source, global_batch_size=3, seed=1, num_epochs=4, example_fn=example_fn, **settings)
            for example_fn in (chain, transforms.DecodeCropFlip(height, width))
        ]
        for (expected, _), (found, _) in zip(*loaders, strict=True):
            np.testing.assert_array_equal(found["image"], expected["image"])
            assert found["image"].flags.c_contiguous


def test_a_broken_file_is_named_however_it_is_decoded(photographs):
    path = photographs / "class" / "1.jpg"
    path.write_bytes(path.read_bytes()[:100])
    for decode, example_fn in (
        (True, None),
        (False, transforms.DecodeImage()),
        (False, transforms.DecodeCropFlip(8, 8)),
    ):
        loader = Loader(
            ImageFolder(photographs, decode=decode), global_batch_size=4, seed=0, num_epochs=1, example_fn=example_fn
        )
        with pytest.raises(ValueError, match=r"Example 1 (?=.*class/1\.jpg).*Unreadable image"):
            list(loader)
    with pytest.raises(ValueError, match="Cannot crop 99 x 8"):
        apply(transforms.DecodeCropFlip(99, 8), value=np.fromfile(photographs / "class" / "0.jpg", np.uint8))


@hypothesis.given(st.integers(0, 5), st.integers(1, 9), st.integers(1, 4), st.integers(0, 2))
def test_mirrored_views_are_copied_as_they_are(height, width, channels, margin):
    random = np.random.default_rng(0)
    image = random.integers(0, 255, (height + 1, width + margin, channels), np.uint8)[1:, margin:]
    for view in (image, image[:, ::-1, ::-1], image[:, ::-1], image[::-1, ::-1, ::-1]):
        rows = np.zeros((3, *image.shape), np.uint8)
        assembly.copy_into(rows[1], view)
        np.testing.assert_array_equal(rows[1], view)
        assert not rows[[0, 2]].any()
