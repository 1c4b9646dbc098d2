import io
import zipfile

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from jaxdist import errors
from jaxdist.run.use import npz

NAMES = st.text("abf./_ é", min_size=1, max_size=4) | st.sampled_from(["file", "allow_pickle", "args", "kwds", "self"])
NUMBERS = st.one_of(
    *[arrays.arrays(kind, (2, 3)) for kind in (np.float16, np.float32, np.complex64, np.int8, np.bool_)]
)


@settings(max_examples=30)
@given(st.dictionaries(NAMES, NUMBERS, max_size=5))
def test_numpy_reads_the_very_arrays_whatever_their_names(named):
    with np.load(io.BytesIO(npz.content(named)), allow_pickle=False) as found:
        assert sorted(found.files) == sorted(named)
        for name, array in named.items():
            assert (found[name].dtype, found[name].tobytes()) == (array.dtype, array.tobytes())


@pytest.mark.parametrize("kind", [ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.int4])
def test_what_numpy_would_read_as_bytes_without_a_type_is_refused(kind):
    with pytest.raises(errors.UserError, match=rf"NumPy has no {np.dtype(kind)}.* cannot hold b\. Choose another"):
        npz.content({"a": np.ones(2), "b": np.ones(2, kind)})


FIELDS = {"a": np.arange(7, dtype=np.float32), "b": np.ones((7, 2), np.int32)}


def test_arrays_that_no_one_asked_for_are_not_looked_at(tmp_path):
    path = tmp_path / "x.npz"
    np.savez(path, **FIELDS, short=np.arange(3), note=np.float32(1), texts=np.array(["a", None], object))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("README", "not an array")
    found = npz.read(path, ["b", "a"])
    assert [*found] == ["b", "a"]
    for name, array in found.items():
        np.testing.assert_array_equal(array, FIELDS[name])
    with pytest.raises(errors.UserError, match=r"x\.npz has no array 'c'; its arrays are \['README', 'a', 'b', "):
        npz.read(path, ["c"])
    with pytest.raises(errors.UserError, match=r"x\.npz .*[Oo]bject"):
        npz.read(path)
    with pytest.raises(errors.UserError, match=r"x\.npz holds 'README', which is no array"):
        npz.read(path, ["README"])


@pytest.mark.parametrize("content", [b"", b"hello" * 100, b"\x80\x04K\x01.", b"PK\x03\x04"])
def test_a_file_of_another_kind_is_one_message_without_advice_to_unpickle(tmp_path, content):
    path = tmp_path / "x.npz"
    path.write_bytes(content)
    with pytest.raises(
        errors.UserError, match=r"x\.npz cannot be read as an \.npz file of arrays of numbers: "
    ) as told:
        npz.read(path)
    assert "pickle" not in str(told.value)


@settings(max_examples=200)
@given(st.sampled_from([np.savez, np.savez_compressed]), st.floats(0, 1, exclude_max=True), st.integers(0, 255))
def test_a_damaged_file_is_refused_or_read_as_it_was(tmp_path_factory, save, share, change):
    path = tmp_path_factory.mktemp("npz") / "x.npz"
    save(path, **FIELDS)
    content = bytearray(path.read_bytes())
    place = int(share * len(content))
    content = (
        content[:place] if not change else content[:place] + bytes([content[place] ^ change]) + content[place + 1 :]
    )
    path.write_bytes(content)
    try:
        found = npz.read(path, [*FIELDS])
    except errors.UserError:
        return
    for name, array in FIELDS.items():
        np.testing.assert_array_equal(found[name], array)
