import os

import pytest

from jaxdist.data import CorruptExample
from jaxdist.data.sources.listing import find_files, read_file


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
