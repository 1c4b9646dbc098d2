import os

import fsspec
import numpy as np
import pytest

from jaxdist.data import CorruptExample, NpySource, csv_source
from jaxdist.data.remote import file_cache
from jaxdist.data.sources.listing import find_files, list_by_class, read_file


def test_files_are_found_by_pattern_in_folders_and_taken_as_given_otherwise(tmp_path):
    for name in ("b.csv", "a.csv", ".hidden.csv", "_c.txt"):
        (tmp_path / name).write_text("x")
    found = find_files([tmp_path, tmp_path / "_c.txt"], "*.csv")
    assert [os.path.basename(path) for path in found] == ["a.csv", "b.csv", "_c.txt"]
    with pytest.raises(ValueError, match="No such file or folder"):
        find_files(tmp_path / "none", "*.csv")
    with pytest.raises(ValueError, match=r"No file matches \*\.npy"):
        find_files(tmp_path, "*.npy")


def test_files_of_a_folder_count_in_capitals_but_not_as_copies_and_are_not_left_out_below_it(tmp_path):
    for name in (
        "a.csv",
        "B.CSV",
        "c.csv.gz",
        "a.csv~",
        "a.csv.bak",
        "d.csv.tmp",
        ".x/f.csv",
        "sub/g.txt",
        "README.txt",
        "_SUCCESS",
        "sizes.json",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    found = find_files(tmp_path, "*.csv", "*.csv.gz")
    assert [os.path.basename(path) for path in found] == ["B.CSV", "a.csv", "c.csv.gz"]
    (tmp_path / "e.csv.old").write_text("x")
    with pytest.warns(UserWarning, match=r"1 files in .* are left out, such as .*/e\.csv\.old: .* none of \*\.csv, "):
        assert find_files(tmp_path, "*.csv", "*.csv.gz") == found
    (tmp_path / "sub" / "h.csv").write_text("x")
    with pytest.raises(ValueError, match=r"1 in folders below it, such as .*sub/h\.csv"):
        find_files(tmp_path, "*.csv", "*.csv.gz")
    (tmp_path / "sub" / "g.txt").unlink()
    assert find_files(tmp_path / "sub", "*.csv") == [str(tmp_path / "sub" / "h.csv")]


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


def a_folder(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")
    return root


def test_files_that_would_be_left_out_are_named(tmp_path):
    root = a_folder(tmp_path, "a/1.png", "a/notes.md", "b/deep/2.png")
    with pytest.warns(UserWarning, match=r"1 files in the folders of .* are left out, such as .*notes\.md"):
        found = list_by_class(root, (".png",), None, unread=(".heic",))[1]
    assert found == [f"{root}/a/1.png", f"{root}/b/deep/2.png"]
    a_folder(root, "b/deep/3.HEIC")
    with pytest.raises(ValueError, match=r"would be left out: .*b/deep/3\.HEIC"):
        list_by_class(root, (".png",), None, unread=(".heic",))
    a_folder(root, "4.png")
    with pytest.raises(ValueError, match=r"1 files are beside the folders of the classes, such as '4\.png'"):
        list_by_class(root, (".png",), None)


@pytest.mark.parametrize(("names", "is_split"), [(("train", "test"), True), (("Train", "val", "test"), True)])
def test_the_parts_of_a_data_set_are_no_classes(tmp_path, names, is_split):
    root = a_folder(tmp_path, *(f"{name}/cat/1.png" for name in names))
    with pytest.raises(ValueError, match="parts of a data set and no classes"):
        list_by_class(root, (".png",), None)
    a_folder(root, "cat/1.png")
    assert len(list_by_class(root, (".png",), None)[1]) == len(names) + 1


def test_links_in_a_circle_and_names_that_are_no_text_are_refused(tmp_path):
    root = a_folder(tmp_path / "root", "a/1.png", "b/2.png")
    (root / "b" / "other").symlink_to(root / "a")
    assert len(list_by_class(root, (".png",), None)[1]) == 3
    (root / "a" / "deep").mkdir()
    (root / "a" / "deep" / "up").symlink_to(root)
    with pytest.raises(ValueError, match="up is a link to a folder that it is in"):
        list_by_class(root, (".png",), None)
    (root / "a" / "deep" / "up").unlink()
    os.mkdir(os.fsencode(root) + b"/\xff")
    with pytest.raises(ValueError, match="The name of a class is not UTF-8"):
        list_by_class(root, (".png",), None)


@pytest.mark.timeout(20)
def test_a_pipe_is_no_file_and_nothing_waits_for_it(tmp_path):
    os.mkfifo(tmp_path / "x.png")
    with pytest.raises(CorruptExample, match=r"x\.png is no file"):
        read_file(str(tmp_path / "x.png"))


def test_a_folder_above_the_data_and_a_pattern_say_what_to_name(tmp_path):
    (tmp_path / "year=2020").mkdir()
    (tmp_path / "year=2020" / "x.csv").write_text("a")
    with pytest.raises(ValueError, match=r"holds no files.*1 in folders below it, such as .*is no column"):
        find_files(tmp_path, "*.csv")
    for path in (tmp_path / "year=2020" / "*.csv", "~/x.csv"):
        with pytest.raises(ValueError, match="Patterns and ~ are not expanded"):
            find_files(path, "*.csv")
    (tmp_path / "root" / "train" / "cat").mkdir(parents=True)
    (tmp_path / "root" / "train" / "cat" / "x.png").touch()
    with pytest.raises(ValueError, match="holds train, parts of a data set and no classes"):
        list_by_class(tmp_path / "root", [".png"], None)


def test_files_without_a_suffix_are_left_out_with_a_word_and_those_of_systems_without(tmp_path):
    root = a_folder(tmp_path, "a/1.png", "a/2", "b/3.PNG", "b/4.psd", "b/Thumbs.db", "b/.DS_Store")
    with pytest.warns(UserWarning, match=r"2 files in the folders of .* left out, such as .*a/2: .*none of \.png"):
        _, files, labels = list_by_class(root, (".png",), None)
    assert ([os.path.basename(path) for path in files], labels) == (["1.png", "3.PNG"], [0, 1])


def test_what_is_named_beside_its_folder_is_there_once_and_not_left_out(tmp_path, recwarn):
    root = a_folder(tmp_path, "1.csv", "2.csv", "old.dat", "more/3.csv", "more/4.csv")
    named = [root / "old.dat", root, root / "more", root / "2.csv"]
    assert [os.path.basename(path) for path in find_files(named, "*.csv")] == [
        *("old.dat", "1.csv", "3.csv", "4.csv", "2.csv")
    ]
    assert not recwarn.list
    with pytest.raises(ValueError, match="is named twice"):
        find_files([root / "1.csv", root / "more" / ".." / "1.csv"], "*.csv")
