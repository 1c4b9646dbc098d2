import numpy as np
import pytest
import tar_files

from jaxdist import data
from jaxdist.data.remote.tar_parts import PartsDecoder


def test_each_kind_of_part_is_decoded():
    parts, pixels = tar_files.sample(17)
    made = PartsDecoder()("x: 17", parts | {"bin": b"ab"})
    assert list(made) == ["png", "cls", "npy", "json", "txt", "bin"]
    np.testing.assert_array_equal(made["png"], pixels)
    np.testing.assert_array_equal(made["npy"], np.full(3, 17, np.float32))
    assert (made["cls"], made["json"], made["txt"], made["bin"].tolist()) == (7, {"number": 17}, "sample 17", [97, 98])


def test_fields_choose_and_name_the_parts():
    parts, pixels = tar_files.sample(3)
    made = PartsDecoder({"image": "jpg;png", "label": "cls"})("x: 3", parts)
    assert (list(made), made["label"]) == (["image", "label"], 3)
    np.testing.assert_array_equal(made["image"], pixels)
    undecoded = PartsDecoder({"image": "png"}, None)("x: 3", parts)["image"]
    assert bytes(undecoded) == parts["png"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"png": b"no image"}, "x: 3.png"),
        ({"cls": b"cat"}, "x: 3.cls cannot be decoded: invalid literal"),
        ({"npy": b"\x93NUMPY"}, "x: 3.npy cannot be decoded"),
        ({"npy": 2 * tar_files.sample(3)[0]["npy"]}, "x: 3.npy cannot be decoded: it has more after the end"),
        ({"json": b"{"}, "x: 3.json cannot be decoded"),
        ({"txt": b"\xff"}, "x: 3.txt cannot be decoded"),
    ],
)
def test_a_damaged_part_is_a_corrupt_example(changes, message):
    parts, _ = tar_files.sample(3)
    with pytest.raises(data.CorruptExample, match=message):
        PartsDecoder()("x: 3", parts | changes)
    with pytest.raises(data.CorruptExample, match=r"x: 3 has no part 'jpg' for the field 'image'; it has \['png'"):
        PartsDecoder({"image": "jpg"})("x: 3", parts)
