import io
import os
import pathlib

import numpy as np
import pytest
from PIL import Image

from jaxdist.data import ArraySource, Loader, csv_source, prepare, transforms
from jaxdist.data.decoders import csv_text
from jaxdist.data.inspect import inspect, render
from jaxdist.data.sources.combine import Sharded
from jaxdist.data.sources.memmap import TokenSource
from jaxdist.data.sources.records import ArrayRecordSource

TEXTS = {"a.txt": "to be or not to be", "b.txt": "", "c.txt": "that is the question"}


@pytest.fixture
def texts(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for name, text in TEXTS.items():
        (folder / name).write_text(text)
    return folder


def tokens_of(folder):
    return b"".join(np.load(path).tobytes() for path in sorted(folder.glob("*.npy"))).decode()


def test_text_becomes_tokens_in_shards(texts, tmp_path):
    made = prepare.prepare(str(texts), tmp_path / "out", shard_size=10, stream=io.StringIO())
    assert made.total == 38
    assert [os.path.basename(path) for path in made.paths] == [f"tokens-0000{i}-of-00004.npy" for i in range(4)]
    assert tokens_of(tmp_path / "out") == "".join(TEXTS.values())
    source = TokenSource(tmp_path / "out", length=5)
    assert bytes(source[3]["tokens"].astype(np.uint8)) == b" beth"
    assert tokens_of(tmp_path / "out").startswith("to be or")


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("kind", ["tokens", "records"])
def test_an_interrupted_preparation_goes_on(texts, tmp_path, kind):
    source = ArraySource({"id": np.arange(35)})

    def run(out, progress=None):
        if kind == "tokens":
            return prepare.prepare_tokens(texts, out, tokens_per_shard=10, progress=progress)
        return prepare.prepare_records(source, out, examples_per_shard=10, progress=progress)

    def interrupt(done, total):
        if done == 20:
            raise Interrupted

    with pytest.raises(Interrupted):
        run(tmp_path / "out", interrupt)
    kept = sorted(tmp_path.glob("out/*-of-00004.*"))
    (tmp_path / "out" / f".{kept[0].name.replace('00000', '00002', 1)}.tmp").write_bytes(b"half a shard")
    before = [path.stat().st_mtime_ns for path in kept]
    seen = []
    made = run(tmp_path / "out", lambda done, total: seen.append((done, total)))
    assert (made.num_kept, len(made.paths)) == (2, 4)
    what = "tokens" if kind == "tokens" else "examples"
    assert str(made) == f"{made.total} {what} in 4 shards, 2 of them from before: {tmp_path / 'out'}"
    assert [path.stat().st_mtime_ns for path in kept] == before
    assert [done for done, _ in seen] == [10, 20, 30, made.total]
    whole = run(tmp_path / "whole")
    for ours, theirs in zip(made.paths, whole.paths):
        with open(ours, "rb") as one, open(theirs, "rb") as other:
            assert one.read() == other.read()
    assert not list((tmp_path / "out").glob(".*"))


def test_a_folder_of_another_preparation_is_refused(texts, tmp_path):
    prepare.prepare_tokens(texts, tmp_path / "out", tokens_per_shard=10)
    with pytest.raises(ValueError, match=r"holds another preparation.*'shard_size': 10.*'shard_size': 9"):
        prepare.prepare_tokens(texts, tmp_path / "out", tokens_per_shard=9)
    (texts / "a.txt").write_text("To be or not to be")
    with pytest.raises(ValueError, match="made_of"):
        prepare.prepare_tokens(texts, tmp_path / "out", tokens_per_shard=10)
    with pytest.raises(ValueError, match="no shard list"):
        prepare.read_shard_list(tmp_path / "out")


def test_records_are_the_examples_and_can_be_dealt_to_hosts(tmp_path):
    source = ArraySource({"id": np.arange(25), "x": np.random.default_rng(0).random((25, 2))})
    made = prepare.prepare(source, tmp_path / "out", shard_size=10, stream=io.StringIO())
    records = ArrayRecordSource(tmp_path / "out")
    assert len(records) == 25
    for index in range(25):
        np.testing.assert_array_equal(records[index]["x"], source[index]["x"])
    shard_list = prepare.read_shard_list(tmp_path / "out")
    assert shard_list.sizes == (10, 10, 5)
    sharded = Sharded({2: ArrayRecordSource(made.paths[2])}, shard_list)
    assert sharded[22]["id"] == 22


def test_folders_of_images_keep_their_encoding(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / "in" / name).mkdir(parents=True)
        Image.fromarray(np.full((4, 5, 3), len(name) + (name == "dog"), np.uint8)).save(
            tmp_path / "in" / name / "1.png"
        )
    prepare.prepare(str(tmp_path / "in"), tmp_path / "out", stream=io.StringIO())
    source = ArrayRecordSource(tmp_path / "out")
    assert source[1]["image"].tobytes() == (tmp_path / "in" / "dog" / "1.png").read_bytes()
    ((batch, _),) = Loader(
        source, global_batch_size=2, seed=0, shuffle=False, num_epochs=1, example_fn=transforms.DecodeImage()
    )
    assert batch["image"].shape == (2, 4, 5, 3)
    assert batch["label"].tolist() == [0, 1]


def test_tables_are_opened_and_unknown_sources_explained(tmp_path):
    (tmp_path / "t.csv").write_text("a,b\n1,2\n")
    assert len(prepare.open_source(str(tmp_path / "t.csv"))) == 1
    with pytest.raises(ValueError, match=r"There is no file or folder .*nothing"):
        prepare.open_source(str(tmp_path / "nothing"))
    with pytest.raises(ValueError, match="Cannot tell how to read"):
        prepare.open_source(__file__)
    with pytest.raises(ValueError, match="tfds:NAME:SPLIT"):
        prepare.open_source("tfds:mnist")


def test_text_beside_images_is_not_taken_for_the_data(tmp_path):
    folder = tmp_path / "in"
    for name in ("cat", "dog"):
        (folder / name).mkdir(parents=True)
        Image.fromarray(np.zeros((4, 5, 3), np.uint8)).save(folder / name / "1.png")
    (folder / "README.txt").write_text("pictures of animals")
    with pytest.raises(ValueError, match="several kinds of data: text and images"):
        prepare.prepare(str(folder), tmp_path / "out", stream=io.StringIO())
    assert not (tmp_path / "out").exists()
    (folder / "README.txt").rename(folder / "README")
    prepare.prepare(str(folder), tmp_path / "out", stream=io.StringIO())
    source = ArrayRecordSource(tmp_path / "out")
    assert source.vocabulary == {"label": ("cat", "dog")}
    text = render(inspect(Loader(source, global_batch_size=2, seed=0)))
    assert "names of label: 0 cat, 1 dog" in text


def test_addresses_are_refused(tmp_path):
    with pytest.raises(ValueError, match="on this machine only"):
        prepare.prepare("gs://bucket/x", tmp_path / "out", stream=io.StringIO())


def test_a_mistake_is_shown_without_a_progress_bar(texts, tmp_path):
    stream = io.StringIO()
    for source, settings in (
        (str(texts), {"tokenizer": "bpe:3"}),
        (str(tmp_path / "none"), {}),
        (str(texts), {"shard_size": -1}),
    ):
        with pytest.raises(ValueError):
            prepare.prepare(source, tmp_path / "out", stream=stream, **settings)
    assert stream.getvalue() == ""
    prepare.prepare(str(texts), tmp_path / "out", stream=stream)
    assert "Preparing" in stream.getvalue()


def test_a_table_is_read_once_and_its_known_texts_keep_their_numbers(tmp_path, monkeypatch):
    path, opened = tmp_path / "t.csv", []
    path.write_text("x,y\n1,b\n2,c\n")
    train = csv_source(path, categories={"y": ("c", "b", "a")})
    monkeypatch.setattr(csv_text, "read_file", lambda name: opened.append(name) or pathlib.Path(name).read_bytes())
    found = prepare.open_source(str(path), like=train)
    assert (found.arrays["y"].tolist(), opened) == ([1, 0], [str(path)])
    path.write_text("x\n1\n")
    assert list(prepare.open_source(str(path), like=train).arrays) == ["x"]
