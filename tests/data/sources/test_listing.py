import os

import fsspec
import numpy as np
import pytest

from jaxdist.data import CorruptExample, NpySource, csv_source
from jaxdist.data.remote import file_cache
from jaxdist.data.sources.listing import find_files, list_by_class, read_file


def test_files_are_found_by_pattern_in_folders_and_taken_as_given_otherwise(tmp_path):
    for name in ("b.csv", "a.csv", ".hidden.csv", "c.txt"):
        (tmp_path / name).write_text("x")
    found = find_files([tmp_path, tmp_path / "c.txt"], "*.csv")
    assert [os.path.basename(path) for path in found] == ["a.csv", "b.csv", "c.txt"]
    with pytest.raises(ValueError, match="No such file or folder"):
        find_files(tmp_path / "none", "*.csv")
    with pytest.raises(ValueError, match=r"No file matches \*\.npy"):
        find_files(tmp_path, "*.npy")


def test_a_file_is_read_whole_or_is_corrupt(tmp_path):
    (tmp_path / "x").write_bytes(b"abc" * 1000)
    assert read_file(str(tmp_path / "x")) == b"abc" * 1000
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(CorruptExample, match="Unreadable file"):
            read_file(str(path))


def test_files_at_an_address_are_read_from_copies_that_stay(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXDIST_CACHE", str(tmp_path / "cache"))
    file_cache.of_process.cache_clear()
    memory = fsspec.filesystem("memory")
    for number in range(2):
        memory.pipe(f"/table/{number}.csv", f"a,b\n{number},2\n".encode())
    source = csv_source("memory://table/")
    assert [int(source[row]["a"]) for row in range(2)] == [0, 1]
    np.save(tmp_path / "x.npy", np.arange(6))
    memory.pipe("/x.npy", (tmp_path / "x.npy").read_bytes())
    assert NpySource({"x": "memory://x.npy"})[4]["x"] == 4 == NpySource({"x": f"file://{tmp_path}/x.npy"})[4]["x"]
    with pytest.raises(ValueError, match="There is no file memory://x/"):
        csv_source("memory://x/")
    with pytest.raises(ValueError, match="Pack the files into tar shards"):
        list_by_class("s3://bucket/images", (".png",), None)
    file_cache.of_process.cache_clear()
