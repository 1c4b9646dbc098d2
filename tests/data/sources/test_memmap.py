import importlib
import pickle

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from jaxdist.data import ArraySource, CorruptExample, Loader, Packed, Subset
from jaxdist.data.sources.memmap import NpySource, TokenDocuments, TokenSource, text_bytes


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


@pytest.mark.parametrize("open_file", [lambda path: NpySource({"x": path}), lambda path: TokenSource(path, length=2)])
def test_an_array_behind_the_array_of_a_npy_file_is_not_left_out_silently(tmp_path, open_file):
    with open(tmp_path / "x.npy", "wb") as file:
        np.save(file, np.arange(4))
        file.flush()
        assert len(open_file(tmp_path / "x.npy")) in (2, 4)
        np.save(file, np.arange(4))
    with pytest.raises(CorruptExample, match=r"x\.npy has more after the end of its array"):
        open_file(tmp_path / "x.npy")


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
    (tmp_path / "books").mkdir()
    (tmp_path / "books" / "one.txt").write_text("to be or not")
    (window,) = one_epoch(text_bytes(tmp_path / "books", length=6), size=2)
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
        TokenSource(tmp_path / "float.npy", length=4)


def test_examples_are_counted_from_the_end_as_in_any_sequence(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(11))
    source = TokenSource(tmp_path / "a.npy", length=3)
    assert source[-1]["tokens"].tolist() == [6, 7, 8]
    with pytest.raises(IndexError, match="no example 3"):
        source[3]
    assert len(list(source)) == 3


def test_an_address_is_no_local_path(monkeypatch):
    def without(name):
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(importlib, "import_module", without)
    with pytest.raises(ValueError, match=r"fsspec is not installed.*pip install 'jaxdist\[remote\]'"):
        TokenSource("gs://bucket/x", length=3)
    with pytest.raises(ValueError, match="fsspec is not installed"):
        NpySource({"x": "s3://bucket/x.npy"})


documents_of_tokens = st.lists(st.lists(st.integers(1, 9), max_size=7), min_size=1, max_size=8)


@hypothesis.settings(max_examples=40)
@hypothesis.given(
    documents_of_tokens, st.booleans(), st.lists(st.integers(0, 60), max_size=3), st.none() | st.integers(1, 5)
)
def test_documents_are_the_tokens_up_to_each_end_token_across_files(tmp_path_factory, documents, ended, cuts, longest):
    folder = tmp_path_factory.mktemp("tokens")
    tokens = [token for document in documents for token in [*document, 0]]
    tokens = tokens if ended else tokens[:-1] or [3]
    for number, part in enumerate(np.split(np.array(tokens, np.uint16), sorted(cut % len(tokens) for cut in cuts))):
        np.save(folder / f"{number}.npy", part)
    source = pickle.loads(pickle.dumps(TokenDocuments(folder, end_token=0, longest=longest)))
    found = [source[index]["tokens"] for index in range(len(source))]
    assert np.concatenate(found).tolist() == tokens  # each token once, in order
    assert source.lengths.tolist() == [len(each) for each in found]
    assert all(0 not in each[:-1] for each in found)
    if longest is None:
        assert all(each[-1] == 0 for each in found[: None if ended else -1])
    else:
        assert max(map(len, found)) <= longest
        assert all(len(each) == longest or each[-1] == 0 for each in found[:-1])


def test_packed_documents_are_kept_whole_are_divided_over_processes_and_resume(tmp_path):
    random = np.random.default_rng(0)
    tokens = np.concatenate([np.append(random.integers(1, 99, random.integers(1, 30)), 0) for _ in range(60)])
    for number, part in enumerate(np.array_split(tokens.astype(np.uint16), 3)):
        np.save(tmp_path / f"tokens-{number}.npy", part)
    (tmp_path / "prepared.json").write_text('{"end_token": 0}')
    documents = TokenDocuments(tmp_path, longest=16)
    packed = Packed(documents, documents.lengths, row_length=16)
    loader = Loader(packed, global_batch_size=8, seed=0, num_epochs=1)
    batches = list(loader)
    seen = []
    for batch, _ in batches:
        for row in np.flatnonzero(batch["mask"]):
            tokens, segments = batch["tokens"][row], batch["segment_ids"][row]
            seen += [tuple(tokens[segments == number].tolist()) for number in range(1, segments.max() + 1)]
    assert sorted(seen) == sorted(tuple(documents[i]["tokens"].tolist()) for i in range(len(documents)))
    parts = [list(loader.starting_at(batches[1].position).with_rows(np.arange(begin, begin + 4))) for begin in (0, 4)]
    for (one, position), (other, _), (whole, there) in zip(*parts, batches[2:], strict=True):
        assert position == there
        for name, array in whole.items():
            np.testing.assert_array_equal(np.concatenate([one[name], other[name]]), array)
    (tmp_path / "prepared.json").unlink()
    with pytest.raises(ValueError, match="unclear which token ends a document"):
        TokenDocuments(tmp_path)


@pytest.mark.parametrize("num_files", [1, 2])
def test_batches_of_no_ids_of_ids_from_the_end_and_of_none_there(tmp_path, num_files):
    for number in range(num_files):
        np.save(tmp_path / f"{number}.npy", np.arange(12 // num_files, dtype=np.uint16) + 100 * number)
    source = TokenSource(tmp_path, length=3)
    for whole in (
        source,
        Subset(source, range(4)),
        ArraySource({"tokens": np.stack([source[i]["tokens"] for i in range(4)])}),
    ):
        assert whole.__getitems__([])["tokens"].shape == (0, 3)
        np.testing.assert_array_equal(whole.__getitems__([-1, 0])["tokens"], [whole[3]["tokens"], whole[0]["tokens"]])
        for wrong, message in (([4], "no example 4"), ([-5], "no example -5"), ([0.5], "float64")):
            with pytest.raises(IndexError, match=message):
                whole.__getitems__(wrong)


@pytest.mark.parametrize(
    ("dtype", "token"), [("int64", 2**33), ("uint32", 2**31 + 5), ("uint64", 2**63), ("int64", -(2**31) - 1)]
)
def test_tokens_that_would_become_others_are_refused(tmp_path, dtype, token):
    tokens = np.arange(8).astype(dtype)
    np.save(tmp_path / "a.npy", tokens)
    tokens[5] = token
    np.save(tmp_path / "b.npy", tokens)
    whole, documents = TokenSource(tmp_path, length=4), TokenDocuments(tmp_path, end_token=3)
    assert whole[2]["tokens"].tolist() == [0, 1, 2, 3] == documents[1]["tokens"].tolist()[4:]
    for read in (lambda: whole[3], lambda: whole.__getitems__([0, 3]), lambda: documents[2]):
        with pytest.raises(CorruptExample, match=rf"b\.npy holds the token {token}, and tokens are at most"):
            read()


def test_an_archive_of_arrays_is_no_array(tmp_path):
    np.savez(tmp_path / "x.npz", a=np.arange(3))
    with pytest.raises(ValueError, match=r"x\.npz is an \.npz archive"):
        NpySource({"x": tmp_path / "x.npz"})
