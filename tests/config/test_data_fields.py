"""What users type where examples are expected."""

import numpy as np
import pandas
import pytest

import jaxdist
from jaxdist.config import data_fields
from jaxdist.errors import ConfigError

IMAGES, LABELS = np.arange(8, dtype=np.float32).reshape(4, 2), np.arange(4)


@pytest.mark.parametrize(
    "given",
    [
        {"image": IMAGES, "label": LABELS},
        {"image": IMAGES.tolist(), "label": list(LABELS)},
        (IMAGES, LABELS),
        jaxdist.ArraySource({"image": IMAGES, "label": LABELS}),
        [{"image": image, "label": label} for image, label in zip(IMAGES, LABELS)],
    ],
    ids=["dict", "lists", "pair", "source", "items"],
)
def test_examples_are_given_as_users_type_them(given):
    source = data_fields.as_source(given, "Data.train")
    assert len(source) == 4
    np.testing.assert_array_equal(source[3]["image"], IMAGES[3])
    assert source[3]["label"] == 3
    assert isinstance(source.fingerprint(), str)


def test_the_columns_of_a_data_frame_are_the_fields():
    source = data_fields.as_source(pandas.DataFrame({"height": [1.5, 2.5], "label": [0, 1]}), "Data.train")
    assert source[1] == {"height": 2.5, "label": 1}


def test_a_source_is_taken_as_it_is():
    source = jaxdist.ArraySource({"image": IMAGES})
    assert data_fields.as_source(source, "Data.train") is source


@pytest.mark.parametrize(
    "given",
    ["train.csv", b"bytes", IMAGES, (IMAGES,), (IMAGES, LABELS, LABELS), ([1], [2]), 3, None],
    ids=["path", "bytes", "array", "single", "triple", "lists", "number", "None"],
)
def test_what_are_no_examples_is_refused_with_what_to_write(given):
    with pytest.raises(ConfigError, match=r"Write, for example, Data\(train=\{"):
        data_fields.as_source(given, "Data.train")


MASKED = np.ma.array(IMAGES, mask=IMAGES > 2)


@pytest.mark.parametrize(
    "given", [{"image": MASKED}, (MASKED, LABELS), [{"image": MASKED[2]}]], ids=["dict", "pair", "items"]
)
def test_masked_elements_are_refused_however_they_are_given(given):
    with pytest.raises(ConfigError, match=r"Field 'image' has \d masked elements"):
        data_fields.as_source(given, "Data.train")


@pytest.mark.parametrize(
    "given",
    [pandas.DataFrame(IMAGES, columns=["a", "a"]), {1: LABELS, "1": LABELS}],
    ids=["columns", "fields"],
)
def test_two_fields_of_one_name_are_refused(given):
    with pytest.raises(ConfigError, match=r"Each field has a name of its own, and '.' comes twice"):
        data_fields.as_source(given, "Data.train")


@pytest.mark.parametrize(
    "given",
    [{}, {"image": IMAGES, "label": LABELS[:3]}, {"name": np.array(["a"], object)}, [1, 2]],
    ids=["empty", "lengths", "objects", "numbers"],
)
def test_the_setting_with_unusable_examples_is_named(given):
    with pytest.raises(ConfigError, match=r"Data\.eval cannot be used: "):
        data_fields.as_source(given, "Data.eval")


@pytest.mark.parametrize("function", [lambda example, random: example, lambda *args: args[0], max, print, dict])
def test_functions_that_take_what_they_are_called_with(function):
    data_fields.check_call(function, "Data.example_fn", ("example", "random"))


@pytest.mark.parametrize(
    ("setting", "function", "why"),
    [
        ("example_fn", lambda example: example, "too many positional arguments"),
        ("eval_example_fn", lambda example, random, *, size: example, "missing a required .*argument: 'size'"),
        ("batch_fn", lambda batch, random: batch, "too many positional arguments"),
    ],
)
def test_functions_that_do_not_are_refused(setting, function, why):
    arguments = ", ".join(data_fields.CALLED_WITH[setting])
    with pytest.raises(ConfigError, match=rf"Data\.{setting} is called with \({arguments}\), and .* cannot be: {why}"):
        jaxdist.Data(train={"image": np.zeros((4, 2))}, **{setting: function})
