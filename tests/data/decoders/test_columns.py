"""Columns of Parquet files as numpy arrays."""

import decimal

import hypothesis
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import strategies as st

from jaxdist.data import CorruptExample, ParquetSource
from jaxdist.data.decoders.columns import Column


@pytest.mark.parametrize("make", [lambda kind: pa.list_(kind, 2), pa.list_, pa.large_list])
def test_a_row_without_a_list_leaves_the_others_readable(tmp_path, make):
    lists = pa.array([[1, 2], None, [3, 4], [5, 6]], make(pa.int16()))
    pq.write_table(pa.table({"x": lists}), tmp_path / "t.parquet", row_group_size=3)
    source = ParquetSource(tmp_path / "t.parquet")
    assert [source[index]["x"].tolist() for index in (0, 2, 3)] == [[1, 2], [3, 4], [5, 6]]
    assert source.__getitems__([3, 0, 2])["x"].tolist() == [[5, 6], [1, 2], [3, 4]]
    with pytest.raises(CorruptExample, match="row 1 has no value"):
        source[1]


def test_columns_of_all_groups_become_one_array_whose_rows_cannot_be_changed(tmp_path):
    values = np.arange(40, dtype=np.float32)
    table = pa.table({"x": pa.array(values), "y": pa.array(values.reshape(20, 2).repeat(2, 0).tolist())})
    pq.write_table(table, tmp_path / "t.parquet", row_group_size=7)
    source = ParquetSource(tmp_path / "t.parquet")
    ids = np.random.default_rng(0).integers(0, 40, 30)
    for _ in range(2):  # the second time, all groups have been read
        batch = source.__getitems__(ids)
        np.testing.assert_array_equal(batch["x"], values[ids])
        np.testing.assert_array_equal(batch["y"], values.reshape(20, 2).repeat(2, 0)[ids])
        batch["x"][:] = -1
    with pytest.raises(ValueError, match="read-only"):
        source[3]["y"][0] = 1


@hypothesis.given(
    st.sampled_from([pa.decimal64(18, 5), pa.decimal128(20, 3), pa.decimal128(9, -2), pa.decimal256(50, 30)]), st.data()
)
def test_a_decimal_becomes_the_nearest_float_also_in_lists(kind, data):
    most = 10 ** min(kind.precision, 28) - 1
    units = data.draw(st.lists(st.integers(-most, most), min_size=2, max_size=20))
    values = [decimal.Decimal(unit).scaleb(-kind.scale) for unit in units]
    single = Column("t.parquet", "x", pa.chunked_array([pa.array(values, kind)]), None, None)
    assert single.values.tolist() == [float(value) for value in values]
    lists = Column("t.parquet", "x", pa.chunked_array([pa.array([values], pa.list_(kind))]), None, None)
    assert lists.row(0, "x", 0).tolist() == [float(value) for value in values]
