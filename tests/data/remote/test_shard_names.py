import os

import fsspec
import pytest

from jaxdist.data.remote import tar_source
from jaxdist.data.remote.shard_names import expand_ranges, find_shards


def test_ranges():
    assert expand_ranges("t-{08..10}.tar") == ["t-08.tar", "t-09.tar", "t-10.tar"]
    assert expand_ranges("{0..1}/{0..1}") == ["0/0", "0/1", "1/0", "1/1"]
    assert expand_ranges("plain.tar") == ["plain.tar"]


def test_paths_folders_and_addresses(tmp_path):
    for name in ("b.tar", "a.tar.gz", "README.txt", ".c.tar"):
        (tmp_path / name).write_bytes(b"")
    folder = [str(tmp_path / "a.tar.gz"), str(tmp_path / "b.tar")]
    assert find_shards(tmp_path, "*.tar*") == folder == find_shards(f"file://{tmp_path}", "*.tar*")
    assert find_shards([tmp_path / "b.tar", "s3://x/{0..1}.tar"], "*.tar*") == [
        folder[1],
        "s3://x/0.tar",
        "s3://x/1.tar",
    ]
    for name in ("1.tar", "0.tar"):
        fsspec.filesystem("memory").pipe(f"/shards/{name}", b"")
    found = ["memory:///shards/0.tar", "memory:///shards/1.tar"]
    assert find_shards("memory://shards/", "*.tar*") == found == find_shards("memory://shards/*.tar", "*.tar*")
    with pytest.raises(ValueError, match=r"No such file or folder: .*none.tar"):
        find_shards(tmp_path / "none.tar", "*.tar*")
    with pytest.raises(ValueError, match="got an empty list"):
        find_shards([], "*.tar*")


def test_a_folder_of_shards_means_all_kinds_and_no_index_beside_them(tmp_path):
    for name in ("a.tar", "b.tgz", "c.TAR.GZ", "d.tar.zst", "a.tar.idx", "b.tar.json", "c.tar.bak", "d.tar.gz.part"):
        (tmp_path / name).write_bytes(b"")
    found = find_shards(tmp_path, *tar_source.TAR_PATTERNS)
    assert sorted(os.path.basename(name) for name in found) == ["a.tar", "b.tgz", "c.TAR.GZ", "d.tar.zst"]
