import os

import pytest

from jaxdist.data import CorruptExample
from jaxdist.data.sources.listing import find_files, fingerprint_contents, fingerprint_files, read_file


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


def test_large_files_are_sampled_from_beginning_to_end(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(bytes(2**20))
    before = fingerprint_contents("kind", [str(path)])
    for place in (0, 2**20 - 1):
        content = bytearray(2**20)
        content[place] = 1
        path.write_bytes(content)
        assert fingerprint_contents("kind", [str(path)]) != before
    path.write_bytes(bytes(2**20))
    assert fingerprint_contents("kind", [str(path)]) == before
    assert fingerprint_contents("kind", [str(path)], "setting") != before


def test_a_replaced_class_of_many_files_changes_the_fingerprint(tmp_path):
    files = []
    for number in range(5000):
        path = tmp_path / str(number % 50) / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"%08d" % number)
        files.append(str(path))
    files.sort()
    before = fingerprint_files("images", tmp_path, files)
    for path in files:
        if "/7/" in path:
            with open(path, "wb") as file:
                file.write(b"another!")
    assert fingerprint_files("images", tmp_path, files) != before
