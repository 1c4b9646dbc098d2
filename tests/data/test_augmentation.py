import colorsys
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from jaxdist.data import augmentation

RANDOM = np.random.default_rng(0)
IMAGE = RANDOM.integers(0, 256, (12, 16, 3)).astype(np.uint8)
LARGE = RANDOM.integers(20, 150, (64, 64, 3)).astype(np.uint8)
GREY = IMAGE[..., :1]


def apply(transform, value=IMAGE, seed=0, field="image"):
    made = pickle.loads(pickle.dumps(transform))({field: value, "label": 3}, np.random.default_rng(seed))
    assert made["label"] == 3
    return made[field]


@pytest.mark.parametrize("value", [IMAGE, GREY, GREY[..., 0]])
@pytest.mark.parametrize(
    "transform",
    [
        augmentation.RandomResizedCrop(12, 16),
        augmentation.ColourJitter(0.4, 0.4, 0.4, 0.1),
        augmentation.CutOut(4),
        augmentation.RandAugment(),
    ],
)
def test_an_image_keeps_its_shape_and_dtype_and_its_original_stays(transform, value):
    before = value.copy()
    made = [apply(transform, value, seed) for seed in range(20)]
    assert {(each.shape, each.dtype) for each in made} == {(value.shape, np.dtype(np.uint8))}
    assert all(each.flags.writeable for each in made), "the next transform cannot write into it"
    assert len({each.tobytes() for each in made}) > 10, "the same for every seed"
    assert np.array_equal(apply(transform, value, 5), made[5])
    np.testing.assert_array_equal(value, before)


@given(st.integers(1, 60), st.integers(1, 60), st.integers(0, 1000))
def test_a_resized_crop_lies_in_the_image_and_has_the_area_and_shape_asked_for(width, height, seed):
    crop = augmentation.RandomResizedCrop(4, 4, area=(0.2, 0.5), aspect=(0.5, 2.0))
    left, top, cut_width, cut_height = crop._part(width, height, np.random.default_rng(seed))
    assert 0 <= left <= left + cut_width <= width
    assert 0 <= top <= top + cut_height <= height
    assert min(cut_width, cut_height) >= 1
    if min(width, height) >= 20:  # below, rounding to whole pixels decides
        assert 0.15 < cut_width * cut_height / (width * height) < 0.6
        assert 0.45 < cut_width / cut_height < 2.2


def test_a_crop_of_everything_is_pillows_resize():
    crop = augmentation.RandomResizedCrop(6, 5, area=(1.0, 1.0), aspect=(16 / 12, 16 / 12))
    expected = Image.fromarray(IMAGE).resize((5, 6), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(apply(crop), np.asarray(expected))


def test_a_crop_whose_shape_never_fits_is_the_largest_in_the_middle():
    crop = augmentation.RandomResizedCrop(4, 4, area=(0.9, 1.0), aspect=(1.0, 1.0))
    assert crop._part(30, 10, np.random.default_rng(0)) == (10, 0, 10, 10)
    assert crop._part(10, 30, np.random.default_rng(0)) == (0, 10, 10, 10)


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation"])
def test_colours_are_blended_with_black_grey_or_the_grey_image(name):
    grey = np.asarray(Image.fromarray(IMAGE).convert("L")).astype(float)
    towards = {"brightness": 0.0, "contrast": float(round(grey.mean())), "saturation": grey[..., None]}[name]
    made = apply(augmentation.ColourJitter(**{name: 0.5}), seed=1)
    factor = np.random.default_rng(1).uniform(0.5, 1.5)
    expected = np.clip(towards + factor * (IMAGE - towards), 0, 255)
    assert abs(made - expected).max() <= 1


def test_the_hue_is_turned():
    made = apply(augmentation.ColourJitter(hue=0.5), seed=2).reshape(-1, 3)
    part = np.random.default_rng(2).uniform(-0.5, 0.5)
    for before, after in zip(IMAGE.reshape(-1, 3) / 255, made / 255):
        hue, saturation, value = colorsys.rgb_to_hsv(*before)
        assert np.abs(after - colorsys.hsv_to_rgb((hue + part) % 1, saturation, value)).max() < 0.06


def test_what_is_cut_out_is_a_square_clipped_at_the_border():
    areas = set()
    for seed in range(200):
        black = (apply(augmentation.CutOut(4, value=7), np.full((12, 16, 3), 200, np.uint8), seed) == 7).all(-1)
        rows, columns = np.flatnonzero(black.any(1)), np.flatnonzero(black.any(0))
        assert black.sum() == len(rows) * len(columns)
        assert max(len(rows), len(columns)) <= 4
        areas.add(int(black.sum()))
    assert {16, 4} <= areas, "never whole, or never at a corner"


def changed(name, strength, sign=1, value=IMAGE):
    return np.asarray(augmentation._apply(Image.fromarray(value), name, strength, sign, 9))


def test_the_operations_of_randaugment_do_what_their_names_say():
    np.testing.assert_array_equal(changed("identity", 1.0), IMAGE)
    np.testing.assert_array_equal(changed("posterize", 1.0), IMAGE & 0xF0)
    np.testing.assert_array_equal(changed("solarize", 0.5), np.where(IMAGE < 128, IMAGE, 255 - IMAGE))
    np.testing.assert_array_equal(changed("equalize", 0.5), np.asarray(ImageOps.equalize(Image.fromarray(IMAGE))))
    shifted = np.concatenate([IMAGE[:, 4:], np.full((12, 4, 3), 9)], axis=1)
    np.testing.assert_array_equal(changed("translate x", 4 / 16 / 0.45), shifted)
    np.testing.assert_array_equal(changed("translate y", 3 / 12 / 0.45, -1)[3:], IMAGE[:-3])
    assert abs(changed("Brightness", 1.0, -1) - 0.1 * IMAGE).max() <= 1
    for name in augmentation._OPERATIONS:
        if name not in ("autocontrast", "equalize"):
            np.testing.assert_array_equal(changed(name, 0.0), IMAGE)
        if name != "identity":
            assert not np.array_equal(changed(name, 0.9, value=LARGE), LARGE), name


def test_bands_of_a_spectrogram_are_set_to_its_mean():
    values = np.arange(600, dtype=np.float32).reshape(30, 20)
    times = augmentation.MaskSpectrogram(1, 10, 0, 0)
    widths = set()
    for seed in range(100):
        masked = apply(times, values, seed, "audio") == values.mean()
        assert set(np.unique(masked.sum(1)).tolist()) <= {0, 20}
        widths.add(int(masked[:, 0].sum()))
    assert widths == set(range(11))
    both = apply(augmentation.MaskSpectrogram(), values, field="audio")
    assert both.dtype == np.float32
    assert not np.array_equal(both, values)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: augmentation.RandomResizedCrop(4, 4, area=(0.0, 1.0)), "area is a range"),
        (lambda: augmentation.RandomResizedCrop(4, 4, aspect=(2.0, 1.0)), "aspect is a range"),
        (lambda: augmentation.ColourJitter(hue=0.6), "hue at most 0.5"),
        (lambda: augmentation.ColourJitter(brightness=float("nan")), "at least 0"),
        (lambda: augmentation.CutOut(0), "at least 1; got 0"),
        (lambda: augmentation.MaskSpectrogram(most_frames=-1), "whole numbers, at least 0"),
        (lambda: augmentation.RandAugment(magnitude=11), "between 0 and 10"),
        (lambda: apply(augmentation.RandAugment(), IMAGE / 255), "uint8 with one channel or three, before it is made"),
    ],
)
def test_what_makes_no_sense_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
