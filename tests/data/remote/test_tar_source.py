"""Tar shards with random access: equal to reading by hand, plain, compressed and remote, each sample exactly once."""

import pickle

import file_server
import numpy as np
import pytest
import tar_files

from jaxdist import data

SIZES = (5, 3, 7, 4)
NUMBERS = [range(sum(SIZES[:shard]), sum(SIZES[: shard + 1])) for shard in range(len(SIZES))]
FIELDS = {"image": "png", "label": "cls", "array": "npy"}


def write(folder, suffix=""):
    for number, numbers in enumerate(NUMBERS):
        (folder / f"train-{number}.tar{suffix}").write_bytes(tar_files.PACK[suffix](tar_files.shard(numbers)))
    return folder


def check_examples(source):
    assert len(source) == sum(SIZES)
    for number in np.random.default_rng(0).permutation(sum(SIZES)).tolist():
        example, (_, pixels) = source[number], tar_files.sample(number)
        np.testing.assert_array_equal(example["image"], pixels)
        assert (example["label"], example["array"][0]) == (number % 10, number)


def numbers_of(loader):
    return [int(x) for batch, _ in loader for x in batch["array"][batch["mask"] == 1][:, 0]]


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_any_sample_is_what_was_written(tmp_path, suffix):
    cache = data.FileCache(tmp_path / "cache", limit_gb=1e-3)
    (tmp_path / "shards").mkdir()
    source = data.TarSource(write(tmp_path / "shards", suffix), fields=FIELDS, cache=cache)
    assert source.sizes == SIZES
    check_examples(source)
    check_examples(pickle.loads(pickle.dumps(source)))
    assert (type(source.order()) is data.Shuffled) == (suffix == "")
    loader = data.Loader(source, global_batch_size=4, seed=0, num_epochs=1)
    assert sorted(numbers_of(loader)) == list(range(sum(SIZES)))
    assert source.location(6) == f"{source.shards[1]}, sample 1"
    assert source.fingerprint() == data.TarSource(tmp_path / "shards", fields=FIELDS, cache=cache).fingerprint()
    assert source.fingerprint() != data.TarSource(tmp_path / "shards", cache=cache).fingerprint()


def test_shards_on_a_server_are_copied_when_needed_through_a_cache_that_holds_few(tmp_path):
    with file_server.serving() as files:
        for number, numbers in enumerate(NUMBERS):
            files.contents[f"/train-{number}.tar"] = tar_files.shard(numbers)
        biggest = max(map(len, files.contents.values()))
        cache = data.FileCache(tmp_path, limit_gb=2.5 * biggest / 1e9)
        names = f"{files.url}/train-{{0..3}}.tar"
        source = data.TarSource(names, fields=FIELDS, cache=cache, sizes=SIZES, lanes=2)
        assert not files.asked
        first = data.Loader(source, global_batch_size=4, seed=0, num_epochs=1)
        found = numbers_of(first)
        assert sorted(found) == list(range(sum(SIZES)))
        position = next(iter(first)).position
        again = data.TarSource(names, fields=FIELDS, cache=data.FileCache(tmp_path), sizes=SIZES, lanes=2)
        assert found[4:] == numbers_of(data.Loader(again, global_batch_size=4, seed=0, num_epochs=1, start=position))
        files.asked.clear()
        check_examples(data.TarSource(names, fields=FIELDS, cache=data.FileCache(tmp_path / "all")))
        for path in (tmp_path / "all").glob("*.tar"):
            path.unlink()
        assert data.TarSource(names, cache=data.FileCache(tmp_path / "all")).sizes == SIZES
        assert sorted(files.asked.values()) == [1] * 4, "the indices were kept"
        wrong = data.TarSource(names, fields=FIELDS, cache=cache, sizes=(5, 3, 7, 5))
        with pytest.raises(ValueError, match=r"train-3.tar has 4 samples, and sizes says 5"):
            wrong[18]
        with pytest.raises(ValueError, match=r"There is no file http.*train-4.tar"):
            data.TarSource(f"{files.url}/train-{{0..4}}.tar", cache=cache)


def test_a_damaged_sample_is_skipped_and_named_and_a_damaged_shard_is_refused(tmp_path):
    samples = [tar_files.sample(number)[0] for number in range(4)]
    samples[2]["png"] = b"no image"
    members = [(f"{n}.{kind}", parts[kind]) for n, parts in enumerate(samples) for kind in ("png", "npy")]
    (tmp_path / "a.tar").write_bytes(tar_files.tar_of(members))
    source = data.TarSource(tmp_path / "a.tar", fields={"image": "png", "array": "npy"})
    loader = data.Loader(source, global_batch_size=4, seed=0, num_epochs=1, on_bad="skip")
    assert sorted(numbers_of(loader)) == [0, 1, 3]
    assert "a.tar: 2.png" in loader.skipped[0]
    (tmp_path / "b.tar").write_bytes(tar_files.tar_of(members)[:3000])
    with pytest.raises(ValueError, match=r"b.tar is not a whole tar file"):
        data.TarSource(tmp_path / "b.tar")
    (tmp_path / "c.tar").write_bytes(tar_files.tar_of([]))
    with pytest.raises(ValueError, match="The shards have no samples"):
        data.TarSource(tmp_path / "c.tar")
    with pytest.raises(ValueError, match="a number for each of the 1 shards; got 2"):
        data.TarSource(tmp_path / "a.tar", sizes=[2, 2])


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_samples_are_those_of_the_package_webdataset(tmp_path):
    webdataset = pytest.importorskip("webdataset")
    urls = [str(path) for path in sorted(write(tmp_path).iterdir())]
    theirs = list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False))
    source = data.TarSource(urls, image_type=None)
    assert len(theirs) == len(source)
    for index, their in enumerate(theirs):
        ours = source[index]
        assert bytes(ours["png"]) == their["png"]
        assert int(their["cls"]) == ours["cls"]
        assert set(ours) == {name for name in their if not name.startswith("__")}
