"""Arrow arrays as numpy arrays: the values that pyarrow itself gives, and no pandas."""

import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jaxdist.data.decoders.arrow import as_numpy

TYPES = [pa.int8(), pa.uint64(), pa.float16(), pa.float32(), pa.float64(), pa.bool_()]


@pytest.mark.parametrize("kind", TYPES, ids=str)
def test_slices_and_chunks_have_their_values(kind):
    numbers = np.arange(20) % 2 if kind == pa.bool_() else np.arange(20)
    array = pa.array(numbers.astype(kind.to_pandas_dtype()))
    pieces = [array, array.slice(3), array.slice(9, 5), array.slice(20), pa.chunked_array([array.slice(2, 9), array])]
    for piece in [*pieces, pa.chunked_array([array.slice(1)]), pa.chunked_array([], kind)]:
        found, expected = (
            as_numpy(piece),
            piece.to_numpy(zero_copy_only=False) if len(piece) else array[:0].to_numpy(False),
        )
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)


def test_nulls_are_filled_and_arrows_own_memory_is_left_alone():
    array = pa.array([1.5, None, 3.5, None]).slice(1)
    assert as_numpy(array, fill=-1).tolist() == [-1, 3.5, -1]
    assert array.to_pylist() == [None, 3.5, None]
    assert as_numpy(pa.chunked_array([pa.array([True, None]), pa.array([False])]), fill=0).tolist() == [
        True,
        False,
        False,
    ]


def test_tables_are_read_without_pandas(tmp_path):
    """It would cost every process a third of a second and 50 MB."""
    table = pa.table({"x": [1, None], "y": [[1.0], [2.0]], "z": [True, False], "name": ["u", "v"]})
    pq.write_table(table, tmp_path / "t.parquet")
    (tmp_path / "t.csv").write_text("a,b,c\n1,x,2.5\n2,y,\n")
    code = f"""
import sys, pathlib
from jaxdist.data import ParquetSource, csv_source
folder = pathlib.Path({str(tmp_path)!r})
print(ParquetSource(folder / "t.parquet", categories={{"name": ["u", "v"]}}, missing=0)[1])
print(csv_source(folder / "t.csv", categories=["b"], missing=0)[1])
print("pandas" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
    assert done.stdout.strip().endswith("False"), done
