"""Sources that read files: memory maps, tokens, folders by class, tables."""

import pickle
import wave

import numpy as np
import pytest
from PIL import Image

from jaxdist.data import CorruptExample, Loader
from jaxdist.data.sources.folders import ImageFolder, WavFolder, read_wav
from jaxdist.data.sources.memmap import NpySource, TokenSource, text_bytes
from jaxdist.data.sources.tables import ParquetSource, csv_source


def one_epoch(source, size=4, **settings):
    loader = Loader(source, global_batch_size=size, seed=0, shuffle=False, num_epochs=1, **settings)
    return [batch for batch, _ in loader]


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


@pytest.fixture
def pictures(tmp_path):
    random = np.random.default_rng(0)
    for name, suffix in (("dog", "png"), ("cat", "jpg"), ("dog", "jpg"), ("cat", "png")):
        (tmp_path / name).mkdir(exist_ok=True)
        ramp = np.linspace(0, random.integers(60, 200), 90).reshape(6, 5, 3)  # smooth, as JPEG likes it
        picture = Image.fromarray(ramp.astype(np.uint8))
        picture.save(tmp_path / name / f"one.{suffix}")
    return tmp_path


def test_image_folders_are_classes_in_alphabetical_order(pictures):
    source = ImageFolder(pictures)
    assert source.classes == ["cat", "dog"]
    (batch,) = one_epoch(source)
    assert batch["label"].tolist() == [0, 0, 1, 1]
    assert batch["image"].shape == (4, 6, 5, 3)
    np.testing.assert_array_equal(batch["image"][1], np.asarray(Image.open(pictures / "cat" / "one.png")))
    jpeg = np.asarray(Image.open(pictures / "cat" / "one.jpg")).astype(int)
    assert np.abs(batch["image"][0] - jpeg).mean() < 8


@pytest.mark.parametrize("name", ["one.png", "one.jpg"])
def test_an_unreadable_image_is_named(pictures, name):
    path = pictures / "dog" / name
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(ValueError, match=rf"Example {2 + (name == 'one.png')} .*Unreadable image: .*dog/{name}"):
        one_epoch(ImageFolder(pictures))


def test_a_changed_folder_has_another_fingerprint(pictures):
    before = ImageFolder(pictures).fingerprint()
    assert before == ImageFolder(pictures).fingerprint()
    (pictures / "dog" / "one.png").rename(pictures / "dog" / "two.png")
    assert ImageFolder(pictures).fingerprint() != before
    with pytest.raises(ValueError, match="FILE"):
        ImageFolder(pictures / "dog")


def write_wav(path, samples, *, width=2, channels=1, rate=8000):
    path.parent.mkdir(exist_ok=True)
    with wave.open(str(path), "wb") as file:
        file.setparams((channels, width, rate, 0, "NONE", ""))
        values = np.asarray(samples)
        if width == 3:
            file.writeframes(values.astype("<i4").reshape(-1, 1).view(np.uint8)[:, :3].tobytes())
        else:
            file.writeframes(values.astype(np.uint8 if width == 1 else f"<i{width}").tobytes())


@pytest.mark.parametrize(
    ("width", "values"),
    [(1, [0, 128, 192]), (2, [-(2**15), 0, 2**14]), (3, [-(2**23), 0, 2**22]), (4, [-(2**31), 0, 2**30])],
)
def test_every_width_of_pcm_is_read(tmp_path, width, values):
    write_wav(tmp_path / "a" / "x.wav", values, width=width)
    samples, rate = read_wav(tmp_path / "a" / "x.wav")
    assert rate == 8000
    np.testing.assert_array_equal(samples, np.float32([-1, 0, 0.5]))


def test_wav_folders_are_padded_to_one_length(tmp_path):
    write_wav(tmp_path / "no" / "x.wav", np.full(6, 2**14), channels=2)
    write_wav(tmp_path / "yes" / "x.wav", np.full(9, 2**14))
    (batch,) = one_epoch(WavFolder(tmp_path, num_samples=5, sample_rate=8000), size=2)
    np.testing.assert_array_equal(batch["audio"], [[0.5] * 3 + [0] * 2, [0.5] * 5])
    assert batch["length"].tolist() == [3, 5]
    assert batch["label"].tolist() == [0, 1]
    with pytest.raises(ValueError, match="Resample"):
        WavFolder(tmp_path, sample_rate=16000)[0]
    path = tmp_path / "no" / "x.wav"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(CorruptExample, match=r"no/x\.wav"):
        WavFolder(tmp_path)[0]


def test_csv_columns_become_fields(tmp_path):
    (tmp_path / "t.csv").write_text("size,name,price\n1,b,0.5\n2,a,1\n3,b,2\n")
    source = csv_source(tmp_path / "t.csv", categories=["name"])
    assert source.arrays["size"].tolist() == [1, 2, 3]
    assert source.arrays["size"].dtype == np.int64
    assert source.arrays["price"].tolist() == [0.5, 1.0, 2.0]
    assert source.arrays["name"].tolist() == [1, 0, 1]
    assert set(csv_source(tmp_path / "t.csv", columns=["size"]).arrays) == {"size"}
    with pytest.raises(CorruptExample, match=r"line 2: column 'name' holds 'b'"):
        csv_source(tmp_path / "t.csv")
    with pytest.raises(ValueError, match="no column 'weight'"):
        csv_source(tmp_path / "t.csv", columns=["weight"])
    (tmp_path / "t.csv").write_text("a,b\n1,2\n3\n")
    with pytest.raises(CorruptExample, match="line 3: 1 cells"):
        csv_source(tmp_path / "t.csv")


def test_parquet_rows_are_read_by_group(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table(
        {"id": range(10), "vector": [[i, i + 0.5] for i in range(10)], "name": [f"n{i}" for i in range(10)]}
    )
    pq.write_table(table.slice(0, 7), tmp_path / "a.parquet", row_group_size=3)
    pq.write_table(table.slice(7), tmp_path / "b.parquet")
    source = ParquetSource(tmp_path, columns=["id", "vector"], row_groups_kept=2)
    source = pickle.loads(pickle.dumps(source))
    batches = one_epoch(source, num_threads=2)
    ids = np.concatenate([batch["id"][batch["mask"] == 1] for batch in batches])
    np.testing.assert_array_equal(ids, np.arange(10))
    np.testing.assert_array_equal(batches[2]["vector"][1], [9, 9.5])
    assert len(source._cache) <= 2
    assert source.fingerprint() != ParquetSource(tmp_path, columns=["id"]).fingerprint()
    with pytest.raises(ValueError, match="dtype"):
        one_epoch(ParquetSource(tmp_path))
    with pytest.raises(ValueError, match="no columns"):
        ParquetSource(tmp_path, columns=["x"])
    pq.write_table(pa.table({"id": [1, None]}), tmp_path / "c.parquet")
    with pytest.raises(CorruptExample, match="row 1 is empty"):
        ParquetSource(tmp_path / "c.parquet")[1]
    (tmp_path / "c.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(CorruptExample, match=r"c\.parquet"):
        ParquetSource(tmp_path / "c.parquet")
