"""A file of another kind is refused by what it is, whichever source it is given to."""

import bz2
import gzip
import io
import lzma
import pickle
import sqlite3
import zipfile

import numpy as np
import pyarrow
import pyarrow.feather
import pyarrow.orc
import pyarrow.parquet
import pytest

from jaxdist import data


def zipped():
    with zipfile.ZipFile(file := io.BytesIO(), "w") as archive:
        archive.writestr("xl/workbook.xml", "<workbook/>")
    return file.getvalue()


def database(path):
    with sqlite3.connect(path) as connection:
        connection.execute("create table t (a int)")
    connection.close()


def array(path):
    with open(path, "wb") as file:  # np.save would add a suffix
        np.save(file, np.arange(2))


TABLE = pyarrow.table({"a": [1, 2]})
FILES = {
    "ZIP archive": lambda path: path.write_bytes(zipped()),
    "gzip": lambda path: path.write_bytes(gzip.compress(b"a\n1\n")),
    "bzip2": lambda path: path.write_bytes(bz2.compress(b"a\n1\n")),
    "xz": lambda path: path.write_bytes(lzma.compress(b"a\n1\n")),
    "Zstandard": lambda path: path.write_bytes(pyarrow.Codec("zstd").compress(b"a\n1\n", asbytes=True)),
    "Parquet": lambda path: pyarrow.parquet.write_table(TABLE, path),
    "Arrow": lambda path: pyarrow.feather.write_feather(TABLE, path),
    "ORC": lambda path: pyarrow.orc.write_table(TABLE, path),
    "pickle": lambda path: path.write_bytes(pickle.dumps({"a": 1})),
    "SQLite": database,
    ".npy": array,
}
READERS = {
    ".csv": data.csv_source,
    ".parquet": data.ParquetSource,
    ".npy": lambda path: data.NpySource({"a": path}),
    ".txt": lambda path: data.text_bytes(path, length=1),
}


@pytest.mark.parametrize("suffix", READERS)
@pytest.mark.parametrize("kind", FILES)
def test_a_file_of_another_kind_is_named(tmp_path, kind, suffix):
    path = tmp_path / f"x{suffix}"
    FILES[kind](path)
    if kind.lower().lstrip(".") == suffix[1:]:
        assert len(READERS[suffix](path)) == 2
    else:
        known = ".npz" if (kind, suffix) == ("ZIP archive", ".npy") else kind
        with pytest.raises(ValueError, match=known):
            READERS[suffix](path)
