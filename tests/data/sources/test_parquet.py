"""Parquet rows are what pyarrow reads, in the dtype of the schema, or they are refused."""

import datetime
import decimal
import pickle
import re

import hypothesis
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import strategies as st

from jaxdist.data import CorruptExample, Loader, ParquetSource, order
from jaxdist.data.sources.parquet import GroupShuffled

DTYPES = [
    "bool",
    "int8",
    "int16",
    "int32",
    "int64",
    "uint8",
    "uint16",
    "uint32",
    "uint64",
    "float16",
    "float32",
    "float64",
]


def write(path, columns, **settings):
    pq.write_table(pa.table(columns), path, **settings)
    return path


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_is_kept_as_a_number_and_in_lists(tmp_path, dtype):
    values = np.random.default_rng(0).integers(0, 100, 10).astype(dtype)
    kind = pa.from_numpy_dtype(np.dtype(dtype))
    lists = [values[:i] for i in range(10)]
    columns = {
        "x": values,
        "list": pa.array(lists, pa.list_(kind)),
        "pair": pa.array([values[:2]] * 10, pa.list_(kind, 2)),
    }
    source = ParquetSource(write(tmp_path / "t.parquet", columns, row_group_size=3))
    for index, example in enumerate(source):
        assert {value.dtype for value in example.values()} == {np.dtype(dtype)}
        assert example["x"] == values[index]
        np.testing.assert_array_equal(example["list"], lists[index])
        np.testing.assert_array_equal(example["pair"], values[:2])


def test_decimals_bytes_and_texts(tmp_path):
    columns = {
        "price": [decimal.Decimal("1.25"), decimal.Decimal("-3.50")],
        "raw": [b"ab", b""],
        "colour": ["red", "green"],
        "shade": pa.array(["dark", "light"]).dictionary_encode(),
    }
    path = write(tmp_path / "t.parquet", columns)
    words = {"colour": ("green", "red"), "shade": ("light", "dark")}
    source = ParquetSource(path, categories=words)
    assert source.vocabulary == words
    first, second = source
    assert (first["price"], second["price"]) == (1.25, -3.5)
    assert (first["raw"].tobytes(), second["raw"].tobytes()) == (b"ab", b"")
    assert [int(source[i][name]) for name in words for i in range(2)] == [1, 0, 1, 0]
    with pytest.raises(ValueError, match=r"holds \['red'\], which are not among"):
        _ = ParquetSource(path, categories={**words, "colour": ("green", "blue")})[0]
    with pytest.raises(ValueError, match=r"t\.parquet: column 'colour' is string, .*`categories`"):
        ParquetSource(path)
    with pytest.raises(ValueError, match="only columns of texts"):
        ParquetSource(path, categories={**words, "price": ("1",)})


def test_what_is_no_number_is_refused_when_opened(tmp_path):
    for values in ([datetime.date(2020, 1, 2)], [{"a": 1}], [[[1]]], [["a"]]):
        path = write(tmp_path / "t.parquet", {"when": values, "x": [1]})
        with pytest.raises(ValueError, match=r"t\.parquet: column 'when' is .*, which is not a number"):
            ParquetSource(path)
        assert ParquetSource(path, columns=["x"])[0] == {"x": 1}


def test_a_missing_value_changes_neither_the_dtype_nor_other_rows(tmp_path):
    columns = {"f": pa.array([1.5, None, 3], pa.float32()), "i": pa.array([1, 2, None], pa.int32())}
    path = write(tmp_path / "t.parquet", columns)
    source = ParquetSource(path)
    assert source[0]["f"].dtype == np.float32
    with pytest.raises(CorruptExample, match="'f' of row 1 has no value"):
        source[1]
    filled = ParquetSource(path, missing=-1)
    assert [(float(e["f"]), int(e["i"])) for e in filled] == [(1.5, 1), (-1, 2), (3, -1)]
    assert {filled[2][name].dtype.name for name in "fi"} == {"float32", "int32"}
    with pytest.raises(ValueError, match="int32, which cannot hold missing=nan"):
        ParquetSource(path, missing=float("nan"))[2]
    path = write(tmp_path / "l.parquet", {"l": [[1, 2], None]})
    with pytest.raises(CorruptExample, match="'l' of row 1"):
        ParquetSource(path)[1]
    with pytest.raises(CorruptExample, match="row 0 has no value, or an element without one"):
        ParquetSource(write(tmp_path / "l.parquet", {"l": [[1, None]]}))[0]


def test_files_of_one_set_have_one_schema(tmp_path):
    write(tmp_path / "a.parquet", {"x": pa.array([1], pa.int32()), "y": [1]})
    write(tmp_path / "b.parquet", {"y": [2], "x": pa.array([2], pa.int32())})
    assert [int(example["x"]) for example in ParquetSource(tmp_path)] == [1, 2]
    for columns, message in (
        ({"x": [2], "y": [2]}, "'x' is int64 in .*b.parquet, and int32 in"),
        ({"x": pa.array([2], pa.int32())}, "'y' is missing in .*b.parquet"),
        ({"x": pa.array([2], pa.int32()), "y": [2], "z": [3]}, r"b.parquet has the columns \['z'\]"),
    ):
        write(tmp_path / "b.parquet", columns)
        with pytest.raises(ValueError, match=message):
            ParquetSource(tmp_path)
    assert len(ParquetSource(tmp_path, columns=["x"])) == 2


def test_rows_are_read_by_group_and_a_few_groups_are_kept(tmp_path):
    columns = {"id": range(7), "vector": [[i, i + 0.5] for i in range(7)]}
    write(tmp_path / "a.parquet", columns, row_group_size=3)
    write(tmp_path / "b.parquet", {"id": range(7, 10), "vector": [[i, i + 0.5] for i in range(7, 10)]})
    source = pickle.loads(pickle.dumps(ParquetSource(tmp_path, cache_bytes=150)))
    loader = Loader(source, global_batch_size=4, seed=0, shuffle=False, num_epochs=1, num_threads=2)
    batches = [batch for batch, _ in loader]
    np.testing.assert_array_equal(np.concatenate([b["id"][b["mask"] == 1] for b in batches]), np.arange(10))
    np.testing.assert_array_equal(batches[2]["vector"][1], [9, 9.5])
    assert len(source._cache) <= 2
    assert source[-1]["id"] == 9
    assert source.fingerprint() == ParquetSource(tmp_path).fingerprint()
    assert source.fingerprint() != ParquetSource(tmp_path, columns=["id"]).fingerprint()
    with pytest.raises(ValueError, match="no columns"):
        ParquetSource(tmp_path, columns=["x"])


def test_a_changed_label_changes_the_fingerprint(tmp_path):
    labels = np.array([0, 5, 2, 9])
    before = ParquetSource(write(tmp_path / "t.parquet", {"y": labels})).fingerprint()
    labels[2] = 3
    assert ParquetSource(write(tmp_path / "t.parquet", {"y": labels})).fingerprint() != before


def test_a_broken_file_is_named(tmp_path):
    (tmp_path / "c.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(CorruptExample, match=r"c\.parquet"):
        ParquetSource(tmp_path / "c.parquet")


def test_a_page_that_is_not_what_was_written_is_a_bad_example(tmp_path):
    settings = {"write_page_checksum": True, "use_dictionary": False, "compression": "none"}
    content = write(tmp_path / "t.parquet", {"x": np.arange(64.0)}, **settings).read_bytes()
    in_page, in_head = content.index(np.float64(7).tobytes()) + 6, 5
    for place, message in ((in_page, "cannot be read.*CRC"), (in_head, "is damaged: 0 of its 64 rows")):
        changed = bytearray(content)
        changed[place] ^= 1
        (tmp_path / "t.parquet").write_bytes(changed)
        with pytest.raises(CorruptExample, match=rf"t\.parquet, row group 0, {message}"):
            ParquetSource(tmp_path / "t.parquet")[0]


@hypothesis.settings(max_examples=40)
@hypothesis.given(st.lists(st.integers(0, 9), min_size=1, max_size=8).filter(any), st.integers(1, 4), st.data())
def test_groups_are_read_together_each_row_once_and_any_part_is_found_alone(sizes, together, data):
    scheme, total = GroupShuffled(tuple(sizes), together), sum(sizes)
    ids = scheme(total, 3, 1, 0, total)
    assert sorted(ids.tolist()) == list(range(total))
    owner = np.searchsorted(np.cumsum(sizes), ids, side="right")
    last_seen = {group: int(np.flatnonzero(owner == group)[-1]) for group in set(owner.tolist())}
    for place in range(total):  # the groups that were begun and not ended are never more than `together`
        begun = {group for group in owner[: place + 1].tolist() if last_seen[group] >= place}
        assert len(begun) <= together
    start = data.draw(st.integers(0, total))
    stop = data.draw(st.integers(start, total))
    np.testing.assert_array_equal(scheme(total, 3, 1, start, stop), ids[start:stop])


def test_row_groups_beyond_the_cache_are_read_about_once_in_an_order_that_is_named(tmp_path, caplog, monkeypatch):
    values = np.random.default_rng(0).random(4000)
    path = write(tmp_path / "t.parquet", {"x": values, "id": np.arange(4000)}, row_group_size=200)
    reads = []
    original = pq.ParquetFile.read_row_group
    counted = lambda self, group, **more: reads.append(group) or original(self, group, **more)  # noqa: E731
    monkeypatch.setattr(pq.ParquetFile, "read_row_group", counted)
    small = ParquetSource(path, cache_bytes=5 * 200 * 16)
    loader = Loader(small, global_batch_size=32, seed=0, num_epochs=1)
    batches = list(loader)
    assert isinstance(loader.order, GroupShuffled)
    assert loader.order.together in (3, 4)
    assert "GroupShuffled" in caplog.text
    assert len(reads) <= 1.2 * 20
    seen = np.concatenate([batch["id"][batch["mask"] == 1] for batch, _ in batches])
    assert sorted(seen.tolist()) == list(range(4000))
    again = [batch["id"].tolist() for batch, _ in loader.starting_at(batches[50].position)]
    assert again == [batch["id"].tolist() for batch, _ in batches[51:]]
    caplog.clear()
    assert isinstance(Loader(ParquetSource(path), global_batch_size=32, seed=0).order, order.Shuffled)
    assert isinstance(Loader(small, global_batch_size=32, seed=0, shuffle=False).order, order.Sequential)
    assert caplog.text == ""


def test_rows_read_together_are_the_rows_read_alone(tmp_path):
    columns = {
        "x": pa.array([None if i % 7 == 3 else i for i in range(40)], pa.int16()),
        "list": pa.array([[i, i + 1] for i in range(40)], pa.list_(pa.float32())),
        "raw": [b"%02d" % i for i in range(40)],
        "ragged": [[0] * (1 + i % 2) for i in range(40)],
    }
    path = write(tmp_path / "t.parquet", columns, row_group_size=9)
    source = ParquetSource(path, columns=("x", "list", "raw"), missing=-1)
    ids = [39, 0, 9, 8, -30, 3, 3]
    found = source.__getitems__(ids)
    for name, array in found.items():
        alone = np.stack([source[index][name] for index in ids])
        assert array.dtype == alone.dtype
        np.testing.assert_array_equal(array, alone)
    assert source.__getitems__([])["list"].shape == (0, 2)
    with pytest.raises(ValueError, match=r"'ragged' has lists of the shapes \[\(1,\), \(2,\)\]"):
        ParquetSource(path, columns=("ragged",)).__getitems__([0, 1])
    with pytest.raises(ValueError, match=r"'ragged' has lists of the shapes"):
        ParquetSource(path, columns=("ragged",)).__getitems__([0, 9])
    with pytest.raises(CorruptExample, match="'x' of row 10 has no value"):
        ParquetSource(path, columns=("x",)).__getitems__([1, 10])


def test_a_list_without_a_value_or_with_an_element_without_one_is_refused_and_no_other(tmp_path):
    lists = [[1, 2], None, [3, None], [4, 5]]
    columns = {"list": pa.array(lists, pa.list_(pa.int32())), "pair": pa.array(lists, pa.list_(pa.int32(), 2))}
    for name, values in columns.items():
        source = ParquetSource(write(tmp_path / f"{name}.parquet", {"x": values}))
        assert source.__getitems__([3, 0])["x"].tolist() == [[4, 5], [1, 2]]
        for row in (1, 2):
            for read in (source.__getitem__, lambda row, source=source: source.__getitems__([0, row])["x"]):
                with pytest.raises(CorruptExample, match=rf"{name}\.parquet: column 'x' of row {row} has no value, or"):
                    read(row)


@pytest.mark.parametrize(
    ("kind", "missing", "found"),
    [("bool_", 1, True), ("bool_", 2, None), ("int8", 300, None), ("float32", 1e300, None), ("float32", 7, 7.0)],
)
def test_what_stands_for_a_missing_number_is_one_of_its_kind(tmp_path, kind, missing, found):
    path = write(tmp_path / "t.parquet", {"x": pa.array([0, None]).cast(getattr(pa, kind)())})
    assert ParquetSource(path)[0]["x"] == 0
    if found is None:
        with pytest.raises(ValueError, match=f"cannot hold missing={re.escape(str(missing))}. Choose"):
            ParquetSource(path, missing=missing)[1]
    else:
        assert ParquetSource(path, missing=missing)[1]["x"] == found


def test_two_columns_of_one_name_are_refused_and_the_index_of_pandas_is_no_field(tmp_path):
    pq.write_table(pa.Table.from_arrays([pa.array([1]), pa.array([2])], names=["a", "a"]), tmp_path / "t.parquet")
    with pytest.raises(ValueError, match=r"t\.parquet has several columns named \['a'\]"):
        ParquetSource(tmp_path / "t.parquet")
    path = write(tmp_path / "u.parquet", {"a": [1], "__index_level_0__": [5]})
    assert list(ParquetSource(path)[0]) == ["a"]
    assert ParquetSource(path, columns=["__index_level_0__"])[0]["__index_level_0__"] == 5
