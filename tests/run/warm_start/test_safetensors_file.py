"""Our reading of safetensors, beside the format's own library."""

import json

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from jaxdist.errors import UserError
from jaxdist.run.warm_start import safetensors_file

RANDOM = np.random.default_rng(0)
ARRAYS = {
    "float32": RANDOM.normal(size=(2, 3)).astype(np.float32),
    "float16": RANDOM.normal(size=5).astype(np.float16),
    "float64": RANDOM.normal(size=()).astype(np.float64),
    "int64": np.array([-(2**40), 3]),
    "uint8": np.arange(7, dtype=np.uint8),
    "bool": np.array([[True], [False]]),
    "empty": np.zeros((0, 3), np.float32),
}


@pytest.fixture
def path(tmp_path):
    safetensors.numpy.save_file(ARRAYS, tmp_path / "model.safetensors", metadata={"format": "np"})
    return tmp_path / "model.safetensors"


def test_the_arrays_are_those_of_the_library(path):
    opened = safetensors_file.open_file(path)
    assert set(opened.entries) == set(ARRAYS)
    for name, array in ARRAYS.items():
        found = opened.read(name)
        assert (found.dtype, found.shape, found.tobytes()) == (array.dtype, array.shape, array.tobytes())


def test_bfloat16_is_read(tmp_path):
    array = np.array([1.5, -2.0], ml_dtypes.bfloat16)
    header = json.dumps({"x": {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]}}).encode()
    (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + array.tobytes())
    assert np.array_equal(safetensors_file.open_file(tmp_path / "x.safetensors").read("x"), array)


def test_no_part_of_a_file_is_taken_for_a_file(path):
    content = path.read_bytes()
    for size in [*range(0, len(content), 13), len(content) - 1]:
        path.write_bytes(content[:size])
        with pytest.raises(UserError, match="is no whole safetensors file"):
            safetensors_file.open_file(path)


@pytest.mark.parametrize(
    "entry",
    [[], {"dtype": "F32", "shape": [3]}, {"dtype": 3, "shape": [], "data_offsets": [0, 4]}, {"data_offsets": "ab"}],
)
def test_a_header_that_describes_no_arrays_is_refused(tmp_path, entry):
    header = json.dumps({"x": entry}).encode()
    (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(UserError, match="is no whole safetensors file"):
        safetensors_file.open_file(tmp_path / "x.safetensors").read("x")


def test_a_shape_of_other_bytes_and_an_unknown_dtype_are_refused(tmp_path):
    for dtype, message in {"F64": "needs others", "F8_E4M3": "are read"}.items():
        header = json.dumps({"x": {"dtype": dtype, "shape": [1], "data_offsets": [0, 4]}}).encode()
        (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
        with pytest.raises(UserError, match=message):
            safetensors_file.open_file(tmp_path / "x.safetensors").read("x")


@pytest.mark.parametrize(
    ("ranges", "what"),
    [(((0, 8), (4, 12)), "overlap"), (((0, 8), (0, 8)), "overlap"), (((0, 4), (8, 12)), "leave bytes out")],
)
def test_arrays_that_share_bytes_or_leave_some_out_are_refused(tmp_path, ranges, what):
    entries = {
        name: {"dtype": "U8", "shape": [end - begin], "data_offsets": [begin, end]}
        for name, (begin, end) in zip("ab", ranges)
    }
    header = json.dumps(entries).encode()
    content = len(header).to_bytes(8, "little") + header + bytes(max(end for _, end in ranges))
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=f"a and b {what}"):
        safetensors_file.open_file(tmp_path / "x.safetensors")
    with pytest.raises(safetensors.SafetensorError):
        safetensors.numpy.load(content)
