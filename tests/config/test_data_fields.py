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


@pytest.mark.parametrize(
    "given",
    [{}, {"image": IMAGES, "label": LABELS[:3]}, {"name": np.array(["a"], object)}, [1, 2]],
    ids=["empty", "lengths", "objects", "numbers"],
)
def test_the_setting_with_unusable_examples_is_named(given):
    with pytest.raises(ConfigError, match=r"Data\.eval cannot be used: "):
        data_fields.as_source(given, "Data.eval")
