"""Record files and TFDS data sets, all without TensorFlow."""

import json
import pathlib
import pickle
import shutil
import struct
import sys

import google_crc32c
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorboardX
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from sklearn.datasets import load_digits

from jaxdist import extras
from jaxdist.data import CorruptExample, Loader
from jaxdist.data.sources.records import ArrayRecordSource, FilePart, TfRecords, decode_example, encode_example
from jaxdist.data.sources.tfds import TfdsSource

sys.path.append(str(pathlib.Path(__file__).parents[3] / "experiments"))
import digits_builder


def masked(data):
    crc = google_crc32c.value(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def write_tfrecord(path, records):
    with open(path, "wb") as file:
        for data in records:
            length = struct.pack("<Q", len(data))
            file.write(length + masked(length) + data + masked(data))


@pytest.fixture
def tfrecord(tmp_path):
    write_tfrecord(tmp_path / "r", [b"zero", b"", b"two" * 100, b"three"])
    return tmp_path / "r"


def test_tfrecords_are_read_by_number(tfrecord):
    records = TfRecords([FilePart(str(tfrecord), 0, 4), FilePart(str(tfrecord), 1, 2)])
    copy = pickle.loads(pickle.dumps(records))
    for some in (records, copy):
        assert [some[index] for index in range(len(some))] == [b"zero", b"", b"two" * 100, b"three", b"", b"two" * 100]


def test_event_files_of_tensorboard_are_tfrecords(tmp_path):
    """Written by somebody else's code, so the framing and the checksums are the real ones."""
    writer = tensorboardX.SummaryWriter(str(tmp_path))
    for step in range(3):
        writer.add_scalar("loss", 1.0, step)
    writer.close()
    (path,) = tmp_path.iterdir()
    records = TfRecords([FilePart(str(path), 0, 4)])
    assert b"brain.Event" in records[0]
    assert all(b"loss" in records[index] for index in (1, 2, 3))


def test_every_truncation_is_noticed_and_names_file_and_record(tfrecord):
    whole = tfrecord.read_bytes()
    starts = [0, 20, 36, 352, 373]
    assert len(whole) == starts[-1]
    for size in range(1, len(whole)):
        tfrecord.write_bytes(whole[:size])
        number = next(i for i in range(4) if size < starts[i + 1])
        if size in starts:
            match = f"has {number} records"
        else:
            match = f"record {number}: the file ends"
        with pytest.raises(CorruptExample, match=match):
            TfRecords([FilePart(str(tfrecord), 0, 4)])


def test_every_flipped_bit_is_noticed(tfrecord):
    whole = bytearray(tfrecord.read_bytes())
    for place in range(0, len(whole), 3):
        broken = bytearray(whole)
        broken[place] ^= 1 << place % 8
        tfrecord.write_bytes(broken)
        with pytest.raises(CorruptExample, match="record"):
            [TfRecords([FilePart(str(tfrecord), 0, 4)])[index] for index in range(4)]


def test_examples_survive_their_encoding():
    example = {"x": np.arange(6, dtype=np.float16).reshape(2, 3), "n": np.int64(4), "empty": np.zeros((0, 2))}
    decoded = decode_example(encode_example(example))
    for name, value in example.items():
        np.testing.assert_array_equal(decoded[name], value)
        assert decoded[name].dtype == value.dtype
    with pytest.raises(CorruptExample, match="decode_fn"):
        decode_example(b"\x00\x01")


def write_array_record(path, records):
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()


def test_array_records_are_examples(tmp_path):
    for part in range(2):
        write_array_record(
            tmp_path / f"{part}.array_record", [encode_example({"id": np.int32(10 * part + i)}) for i in range(6)]
        )
    source = pickle.loads(pickle.dumps(ArrayRecordSource(tmp_path)))
    loader = Loader(source, global_batch_size=5, seed=0, num_epochs=1, num_threads=3)
    ids = np.concatenate([batch["id"][batch["mask"] == 1] for batch, _ in loader])
    assert sorted(ids) == [*range(6), *range(10, 16)]
    assert source.fingerprint() == ArrayRecordSource(tmp_path).fingerprint()
    assert ArrayRecordSource(tmp_path, decode_fn=lambda data: {"size": np.int32(len(data))})[0]["size"] > 4
    path = tmp_path / "1.array_record"
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(CorruptExample, match=r"1\.array_record"):
        ArrayRecordSource(path)


def test_a_flipped_bit_in_an_array_record_is_noticed(tmp_path):
    path = tmp_path / "0.array_record"
    records = [np.random.default_rng(number).bytes(2000) for number in range(3)]  # cannot be compressed
    write_array_record(path, records)
    data = bytearray(path.read_bytes())
    data[data.index(records[1][500:600])] ^= 4
    path.write_bytes(data)
    source = ArrayRecordSource(path, decode_fn=lambda data: {"size": np.int32(len(data))})
    with pytest.raises(CorruptExample, match=r"Record 1 of .*0\.array_record"):
        source[1]


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    """The digits as TFDS data set in every format.

    tfds needs TensorFlow to write TFRecord and loses rows where it writes Parquet (4.9.10), so both are made here of
    the records that it wrote as ArrayRecord.
    """
    root = tmp_path_factory.mktemp("tfds")
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
    """None of them can be downloaded here, so the digits stand where each of them would be."""
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


def test_a_missing_package_names_its_extra():
    with pytest.raises(extras.MissingExtra, match=r"pip install 'jaxdist\[data\]'"):
        extras.require("no_such_package_here")
