import pickle

import numpy as np
import pytest

from jaxdist.data import CorruptExample, Loader
from jaxdist.data.sources.memmap import NpySource, TokenSource, text_bytes


def one_epoch(source, size=4):
    return [batch for batch, _ in Loader(source, global_batch_size=size, seed=0, shuffle=False, num_epochs=1)]


@pytest.fixture
def npy(tmp_path):
    np.save(tmp_path / "x.npy", np.arange(24.0).reshape(12, 2))
    np.save(tmp_path / "y.npy", np.arange(12))
    return NpySource({"x": tmp_path / "x.npy", "y": tmp_path / "y.npy"})


def test_npy_files_are_mapped_and_travel_as_names(npy):
    assert isinstance(npy.arrays["x"], np.memmap)
    assert len(pickle.dumps(npy)) < 1000
    copy = pickle.loads(pickle.dumps(npy))
    assert copy.fingerprint() == npy.fingerprint()
    np.testing.assert_array_equal(one_epoch(copy)[2]["x"], np.arange(16.0, 24.0).reshape(4, 2))


def test_a_truncated_npy_file_is_named(npy, tmp_path):
    path = tmp_path / "x.npy"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(CorruptExample, match=r"x\.npy"):
        NpySource({"x": path})
    with pytest.raises(ValueError, match="No such file"):
        NpySource({"x": tmp_path / "z.npy"})


def test_each_token_is_in_one_window(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(11, dtype=np.uint16))
    np.save(tmp_path / "b.npy", np.arange(100, 109, dtype=np.uint16))
    source = TokenSource(tmp_path, length=3)
    assert len(source) == 3 + 3
    tokens = np.concatenate([batch["tokens"][batch["mask"] == 1] for batch in one_epoch(source)])
    assert tokens.dtype == np.int32
    np.testing.assert_array_equal(tokens.ravel(), [*range(9), *range(100, 109)])
    for index in range(6):
        np.testing.assert_array_equal(source[index]["tokens"], tokens[index])
    assert pickle.loads(pickle.dumps(source)).fingerprint() == source.fingerprint()
    assert TokenSource(tmp_path, length=4).fingerprint() != source.fingerprint()


def test_raw_tokens_and_text_bytes(tmp_path):
    np.arange(10, dtype=np.uint16).tofile(tmp_path / "tokens.bin")
    np.testing.assert_array_equal(
        TokenSource(tmp_path / "tokens.bin", length=5, dtype=np.uint16)[1]["tokens"], np.arange(5, 10)
    )
    (tmp_path / "book.txt").write_text("to be or not")
    (window,) = one_epoch(text_bytes(tmp_path, length=6), size=2)
    assert bytes(window["tokens"][1].astype(np.uint8)) == b"or not"


def test_unusable_token_files_are_refused(tmp_path):
    (tmp_path / "odd.bin").write_bytes(b"123")
    with pytest.raises(CorruptExample, match="3 bytes"):
        TokenSource(tmp_path / "odd.bin", length=1, dtype=np.uint16)
    with pytest.raises(ValueError, match="give the dtype"):
        TokenSource(tmp_path / "odd.bin", length=1)
    with pytest.raises(ValueError, match="length of a window"):
        TokenSource(tmp_path / "odd.bin", length=4, dtype=np.uint8)
    with pytest.raises(ValueError, match="No such file"):
        TokenSource(tmp_path / "none.npy", length=4)
    with pytest.raises(ValueError, match="No file matches"):
        TokenSource(tmp_path, length=4)
    np.save(tmp_path / "float.npy", np.zeros(9))
    with pytest.raises(ValueError, match="integers in one dim"):
        TokenSource(tmp_path, length=4)


def test_examples_are_counted_from_the_end_as_in_any_sequence(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(11))
    source = TokenSource(tmp_path / "a.npy", length=3)
    assert source[-1]["tokens"].tolist() == [6, 7, 8]
    with pytest.raises(IndexError, match="no example 3"):
        source[3]
    assert len(list(source)) == 3


def test_an_address_is_no_local_path():
    with pytest.raises(ValueError, match="local folders only; got 'gs://bucket/x'"):
        TokenSource("gs://bucket/x", length=3)
    with pytest.raises(ValueError, match="local folders only"):
        NpySource({"x": "s3://bucket/x.npy"})
