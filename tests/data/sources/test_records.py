"""Record files, without TensorFlow."""

import pickle

import fsspec
import numpy as np
import pytest
import tensorboardX
from array_record.python.array_record_module import ArrayRecordWriter
from tfrecord_files import write_tfrecord

from jaxdist.data import CorruptExample, Loader
from jaxdist.data.remote import file_cache
from jaxdist.data.sources.records import (
    ArrayRecords,
    ArrayRecordSource,
    FilePart,
    TfRecords,
    decode_example,
    encode_example,
)


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
    """Written by another library, so the framing and the checksums are the real ones."""
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
    assert source[0]["size"] == source[2]["size"] == 2000, "the others can still be read"


def test_parts_of_array_records_are_read_many_at_a_time(tmp_path):
    paths = [str(tmp_path / f"{part}.array_record") for part in range(2)]
    for part, path in enumerate(paths):
        write_array_record(path, [f"{part} {number}".encode() for number in range(6)])
    records = ArrayRecords([FilePart(paths[0], 2, 3), FilePart(paths[1], 0, 2), FilePart(paths[0], 5, 1)])
    expected = [b"0 2", b"0 3", b"0 4", b"1 0", b"1 1", b"0 5"]
    assert [records[index] for index in range(len(records))] == expected
    ids = np.random.default_rng(0).integers(0, 6, 50)
    assert records.read(ids) == [expected[index] for index in ids]
    with pytest.raises(CorruptExample, match=r"1\.array_record has 6 records; 7 were expected"):
        ArrayRecords([FilePart(paths[1], 3, 4)]).read([0, 1])


def test_the_broken_record_of_a_batch_is_named(tmp_path):
    path = tmp_path / "0.array_record"
    records = [np.random.default_rng(number).bytes(2000) for number in range(5)]
    write_array_record(path, records)
    data = bytearray(path.read_bytes())
    data[data.index(records[3][500:600])] ^= 4
    path.write_bytes(data)
    with pytest.raises(CorruptExample, match=r"Record 3 of .*0\.array_record"):
        ArrayRecords.of_files([str(path)]).read(range(5))


def test_names_that_were_prepared_are_read_beside_records_elsewhere(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXDIST_CACHE", str(tmp_path / "cache"))
    file_cache.of_process.cache_clear()
    memory, record = fsspec.filesystem("memory"), encode_example({"label": np.int32(1)})
    write_array_record(tmp_path / "a.array_record", [record])
    memory.pipe("/prepared/a.array_record", (tmp_path / "a.array_record").read_bytes())
    assert ArrayRecordSource("memory://prepared").vocabulary == {}
    memory.pipe("/prepared/prepared.json", b'{"vocabulary": {"label": ["cat", "dog"]}}')
    for paths in ("memory://prepared", "memory://prepared/", "memory://prepared/a.array_record", ["memory://prepared"]):
        assert ArrayRecordSource(paths).vocabulary == {"label": ("cat", "dog")}
    file_cache.of_process.cache_clear()
