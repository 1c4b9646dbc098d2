"""Fingerprints: of samples, at a bounded cost; strict ones, of all contents; both kept until a file changes."""

import json
import os

import numpy as np
import pytest

from jaxdist.data import (
    ArraySource,
    Bucketed,
    Concatenated,
    Filtered,
    ImageFolder,
    MapSource,
    Packed,
    Subset,
    csv_source,
    fingerprints,
)
from jaxdist.data.fingerprints import FileList, fingerprint_files, strict_fingerprint, times_of
from jaxdist.data.sources import source as arrays_of_source


@pytest.fixture(autouse=True)
def cache_of_the_test(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    monkeypatch.setattr(fingerprints, "_SETTLED_NS", -(10**18))  # the files of a test are never two seconds old
    return folder


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return str(path)


def pictures(tmp_path, count):
    for number in range(count):
        write(tmp_path / "images" / str(number % 10) / f"{number}.png", b"%08d" % number)
    return ImageFolder(tmp_path / "images", decode=False)


def test_large_files_are_sampled_from_beginning_to_end(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(bytes(2**20))
    before = fingerprint_files("kind", FileList([path]))
    for place in (0, 2**20 - 1):
        content = bytearray(2**20)
        content[place] = 1
        path.write_bytes(content)
        assert fingerprint_files("kind", FileList([path])) != before
    path.write_bytes(bytes(2**20))
    assert fingerprint_files("kind", FileList([path])) == before
    assert fingerprint_files("kind", FileList([path]), "setting") != before


def test_a_replaced_class_of_many_files_changes_the_fingerprint(tmp_path, monkeypatch):
    monkeypatch.setattr(fingerprints, "_MANY", 410)
    files = []
    for number in range(500):
        path = tmp_path / str(number % 50) / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"%08d" % number)
        files.append(str(path))
    files.sort()
    before = fingerprint_files("images", FileList(files, tmp_path))
    for path in files:
        if "/7/" in path:
            with open(path, "wb") as file:
                file.write(b"another!")
    assert fingerprint_files("images", FileList(files, tmp_path)) != before


def opened_for_reading(monkeypatch):
    """Return the list of the paths whose contents are read from now on."""
    seen = []
    for name in ("_sample", "_hash_file"):
        original = getattr(fingerprints, name)
        monkeypatch.setattr(fingerprints, name, lambda path, *more, of=original: seen.append(path) or of(path, *more))
    return seen


@pytest.mark.parametrize("take", [lambda source: source.fingerprint(), strict_fingerprint], ids=["sampled", "strict"])
def test_contents_are_read_again_only_where_a_file_has_changed(tmp_path, monkeypatch, take):
    seen = opened_for_reading(monkeypatch)
    first = take(pictures(tmp_path, 20))
    assert len(seen) >= 20
    seen.clear()
    path = tmp_path / "images" / "3" / "3.png"
    assert take(ImageFolder(tmp_path / "images", decode=False)) == first
    assert seen == []
    stat = os.stat(path)
    path.write_bytes(b"another!")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # the time of the content is as before
    assert take(ImageFolder(tmp_path / "images", decode=False)) != first
    assert str(path) in seen
    path.write_bytes(b"%08d" % 3)
    assert take(ImageFolder(tmp_path / "images", decode=False)) == first


def test_what_changed_just_now_is_not_kept(tmp_path, monkeypatch, cache_of_the_test):
    monkeypatch.setattr(fingerprints, "_SETTLED_NS", 10**12)
    pictures(tmp_path, 20).fingerprint()
    assert not list(cache_of_the_test.rglob("*.json"))


def test_a_cache_that_cannot_be_written_or_read_changes_nothing(tmp_path, monkeypatch, cache_of_the_test):
    first = pictures(tmp_path, 20).fingerprint()
    for path in cache_of_the_test.rglob("*.json"):
        path.write_text("{")
    assert ImageFolder(tmp_path / "images", decode=False).fingerprint() == first
    monkeypatch.setenv("XDG_CACHE_HOME", write(tmp_path / "a_file", b""))
    for take in (fingerprints.strict_fingerprint, lambda source: source.fingerprint()):
        assert take(ImageFolder(tmp_path / "images", decode=False))
    assert ImageFolder(tmp_path / "images", decode=False).fingerprint() == first


def test_a_strict_fingerprint_sees_what_samples_do_not(tmp_path, monkeypatch):
    """Equal sizes, equal samples: one file of thousands, one byte of a large file, one number of a large array."""
    monkeypatch.setattr(fingerprints, "_MANY", 7)
    for name, value in (("_WHOLE_BYTES", 2**10), ("_SAMPLE_BYTES", 8), ("_NUM_SAMPLES", 4)):
        monkeypatch.setattr(arrays_of_source, name, value)
    source = pictures(tmp_path, 50)
    sampled, strict, times = source.fingerprint(), strict_fingerprint(source), times_of(source)
    places = np.linspace(0, len(source) - 1, 7, dtype=np.int64)
    unsampled = next(i for i in range(len(source)) if i not in set(places.tolist()))
    write(tmp_path / os.path.relpath(source.files[unsampled], tmp_path), b"another!")
    again = ImageFolder(tmp_path / "images", decode=False)
    assert again.fingerprint() == sampled
    assert strict_fingerprint(again) != strict
    assert times_of(again)["times"] != times["times"]
    assert times == {"files": 50, "bytes": 400, "times": times["times"]}
    large = np.zeros(2000, np.int64)
    before = ArraySource({"x": large}).fingerprint(), strict_fingerprint(ArraySource({"x": large}))
    large[1234] = 1
    assert ArraySource({"x": large}).fingerprint() == before[0]
    assert strict_fingerprint(ArraySource({"x": large})) != before[1]


def test_a_strict_fingerprint_goes_through_sources_made_of_sources(tmp_path):
    class Whole:
        """Items without files or arrays: every one is read."""

        def __init__(self):
            self.items = [{"tokens": np.arange(1 + i % 4)} for i in range(40)]

        def __len__(self):
            return len(self.items)

        def __getitem__(self, index):
            return self.items[index]

    data, table = Whole(), write(tmp_path / "t.csv", b"a,b\n1,2\n3,4\n")
    lengths = np.array([len(item["tokens"]) for item in data.items])
    leaf = MapSource(data, fingerprint="fixed")
    made = [
        lambda: Concatenated([csv_source(table), leaf]),
        lambda: Filtered(Subset(leaf, range(40)), len, version="1"),
        lambda: Packed(leaf, lengths, row_length=8),
        lambda: Bucketed(leaf, lengths, boundaries=(4,)),
    ]
    before = [strict_fingerprint(make()) for make in made]
    assert len(set(before)) == len(made)
    data.items[21]["tokens"] = data.items[21]["tokens"] + 1
    after = [strict_fingerprint(make()) for make in made]
    assert all(one != other for one, other in zip(before, after))
    assert times_of(leaf) == {}
    assert times_of(made[0]())["files"] == 1


def test_the_cache_holds_one_entry_a_data_set(tmp_path, cache_of_the_test):
    pictures(tmp_path, 20).fingerprint()
    write(tmp_path / "images" / "3" / "more.png", b"x")
    ImageFolder(tmp_path / "images", decode=False).fingerprint()
    (entry,) = cache_of_the_test.rglob("*.json")
    assert set(json.loads(entry.read_text())) == {"files", "fingerprint"}


def test_stats_are_those_of_each_file_wherever_it_is(tmp_path, monkeypatch):
    (tmp_path / "a" / "b").mkdir(parents=True)
    for number, name in enumerate(("x", "a/x", "a/b/x", "a/b/y", "z")):
        (tmp_path / name).write_bytes(bytes(number + 1))
    (tmp_path / "a" / "link").symlink_to(tmp_path / "z")
    monkeypatch.chdir(tmp_path)
    paths = ["x", "a/x", f"{tmp_path}/a/b/x", "a/b/y", "gone", "nowhere/x", "z", "./a/../z", "/", "a/link", "x/y"]
    for path, found in zip(paths, FileList(paths).stats.tolist()):
        if os.path.exists(path):
            stat = os.stat(path)
            assert found == [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino], path
        else:
            assert found == [-1] * 4, path


class Own:
    """A source of a user, whose attributes have names that sources of the package have, too."""

    def __init__(self, values, **attributes):
        self.values = values
        self.__dict__.update(attributes)

    def __len__(self):
        return len(self.values)

    def __getitem__(self, index):
        return {"x": self.values[index]}

    def fingerprint(self):
        return "own"


@pytest.mark.parametrize(
    "attributes",
    [
        {"files": ["a.png", "b.png"]},
        {"files": 2},
        {"parts": ["a.npz", "b.npz"]},
        {"parts": 4},
        {"arrays": [np.zeros(3)]},
        {"arrays": {"something else": np.zeros(3)}},
    ],
    ids=str,
)
def test_attributes_of_a_users_source_may_have_any_name_and_every_example_is_read(attributes):
    assert times_of(Own(np.zeros(3), **attributes)) == {}
    one, other = (strict_fingerprint(Own(values, **attributes)) for values in (np.zeros(3), np.arange(3.0)))
    assert one != other
