"""TFDS data sets of every format, all without TensorFlow."""

import json
import pathlib
import pickle
import shutil
import sys
import tempfile
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow_datasets as tfds
from sklearn.datasets import load_digits
from tfrecord_files import write_tfrecord

from jaxdist.data import CorruptExample, Loader
from jaxdist.data.tfds.prepared import TfdsSource

sys.path.append(str(pathlib.Path(__file__).parents[3] / "experiments"))
import digits_builder


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    """The digits as TFDS data set in every format.

    tfds needs TensorFlow to write TFRecord and loses rows where it writes Parquet (4.9.10), so both are made here of
    the records that it wrote as ArrayRecord.
    """
    root = tmp_path_factory.mktemp("tfds")
    with mock.patch.object(tempfile, "tempdir", str(root)):  # TFDS leaves an empty folder there
        source = pathlib.Path(digits_builder.prepare(root))
    return {name: str(convert(source, root / name, name)) for name in ("tfrecord", "parquet")} | {
        "array_record": str(source)
    }


def convert(source, folder, file_format):
    folder.mkdir()
    info = json.loads((source / "dataset_info.json").read_text())
    raw = tfds.decode.DeserializeMethod.RAW_BYTES
    for split in info["splits"]:
        split["filepathTemplate"] = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
        data = tfds.builder_from_directory(source).as_data_source(split["name"], deserialize_method=raw)
        half = len(data) // 2
        split["shardLengths"] = [str(half), str(len(data) - half)]
        for part, ids in enumerate((range(half), range(half, len(data)))):
            path = folder / f"{info['name']}-{split['name']}.{file_format}-0000{part}-of-00002"
            records = [data[index] for index in ids]
            if file_format == "tfrecord":
                write_tfrecord(path, records)
            else:
                pq.write_table(pa.table({"data": records}), path, row_group_size=100)
    (folder / "dataset_info.json").write_text(json.dumps(info | {"fileFormat": file_format}))
    shutil.copy(source / "features.json", folder)
    return folder


@pytest.mark.parametrize("file_format", ["array_record", "parquet", "tfrecord"])
def test_tfds_data_sets_of_every_format_hold_the_digits(prepared, file_format):
    images, labels = load_digits(return_X_y=True)
    for split in ("train", "test"):
        source = pickle.loads(pickle.dumps(TfdsSource(prepared[file_format], split=split)))
        found = [source[index] for index in range(len(source))]
        rows = sorted((*example["image"].ravel().tolist(), int(example["label"])) for example in found)
        chosen = (np.arange(len(labels)) % 5 == 4) == (split == "test")
        assert rows == sorted((*map(int, image), int(label)) for image, label in zip(images[chosen], labels[chosen]))
    assert "tensorflow" not in sys.modules


@pytest.mark.parametrize("file_format", ["array_record", "parquet", "tfrecord"])
def test_small_examples_are_read_in_batches_equal_to_single_ones(prepared, file_format):
    source = TfdsSource(prepared[file_format], split="train")
    ids = np.random.default_rng(0).integers(0, len(source), 20)
    batch = source.__getitems__(ids)
    for row, index in enumerate(ids):
        for name, value in source[index].items():
            np.testing.assert_array_equal(batch[name][row], value)
            assert batch[name].dtype == value.dtype
    assert {name: array.shape for name, array in source.__getitems__([]).items()} == {
        "image": (0, 8, 8, 1),
        "label": (0,),
    }
    assert Loader(source, global_batch_size=8, seed=0).num_threads == 0


def test_a_parquet_file_that_lost_rows_is_refused(prepared, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(prepared["parquet"], folder)
    (path,) = folder.glob("*test.parquet*0-of-00002")
    pq.write_table(pq.read_table(path).slice(0, 170), path)
    with pytest.raises(CorruptExample, match="has 170 rows, at least 179 were written"):
        TfdsSource(folder, split="test")


@pytest.mark.parametrize("file_format", ["array_record", "parquet", "tfrecord"])
def test_tfds_parts_of_a_split_are_disjoint_and_cover(prepared, file_format):
    whole = TfdsSource(prepared[file_format], split="test", fields=("label",))
    parts = [
        TfdsSource(prepared[file_format], split=f"test[{p}]", fields=("label",)) for p in ("83:301", ":83", "301:")
    ]
    labels = [int(part[index]["label"]) for part in (parts[1], parts[0], parts[2]) for index in range(len(part))]
    assert labels == [int(whole[index]["label"]) for index in range(len(whole))]
    assert set(whole[0]) == {"label"}
    fingerprints = {source.fingerprint() for source in (whole, *parts)}
    assert len(fingerprints) == 4
    assert TfdsSource(prepared[file_format], split="test", fields=("label",)).fingerprint() == whole.fingerprint()


def test_tfds_feeds_the_loader(prepared):
    source = TfdsSource(prepared["tfrecord"], split="train")
    loader = Loader(source, global_batch_size=64, seed=0, num_epochs=1, num_threads=2)
    assert sum(batch["mask"].sum() for batch, _ in loader) == 1438


PUBLIC = ("cifar10", "mnist", "imagenet2012", "speech_commands", "c4/en")


@pytest.mark.parametrize("name", PUBLIC)
def test_public_data_sets_are_opened_by_name_where_they_are(prepared, tmp_path, name):
    """None of them can be downloaded here, so the digits are stored in the place of each."""
    folder = tmp_path / name / "1.0.0"
    shutil.copytree(prepared["tfrecord"], folder)
    base, _, config = name.partition("/")
    info = json.loads((folder / "dataset_info.json").read_text())
    for path in folder.glob("*.tfrecord*"):
        path.rename(folder / path.name.replace(info["name"], base))
    (folder / "dataset_info.json").write_text(
        json.dumps(info | {"name": base} | ({"configName": config} if config else {}))
    )
    for asked in (name, f"{name}:1.0.0"):
        source = TfdsSource(asked, split="test", data_dir=tmp_path)
        assert source[3]["image"].shape == (8, 8, 1)
    assert "tensorflow" not in sys.modules


def test_data_sets_that_are_not_there_are_explained(prepared, tmp_path):
    for name in PUBLIC:
        with pytest.raises(ValueError, match=f"tfds build {name} --file_format=array_record --data_dir={tmp_path}"):
            TfdsSource(name, split="train", data_dir=tmp_path)
    with pytest.raises(ValueError, match=r"no split 'valid'.*test.*train"):
        TfdsSource(prepared["array_record"], split="valid")
    with pytest.raises(ValueError, match="no features"):
        TfdsSource(prepared["array_record"], split="train", fields=("picture",))
