import gzip
import os
import pathlib
import signal
import subprocess
import sys
import threading

import file_server
import fsspec
import pytest

from jaxdist.data.remote import addresses, file_cache


def limited(folder, num_bytes):
    return file_cache.FileCache(folder, limit_gb=num_bytes / 10**9)


def put(name, content):
    fsspec.filesystem("memory").pipe(f"/{name}", content)
    return f"memory://{name}"


def copies(folder):
    return sorted(path.name.split("-", 1)[1] for path in pathlib.Path(folder).iterdir() if path.name[0] != ".")


def read(cache, address):
    with cache.open(address) as file:
        return file.read()


def test_a_file_is_copied_once_and_again_when_it_changes(tmp_path):
    with file_server.serving() as files:
        files.contents["/a.txt"] = b"one"
        cache = limited(tmp_path, 1000)
        assert [read(cache, f"{files.url}/a.txt") for _ in range(3)] == [b"one"] * 3
        assert read(limited(tmp_path, 1000), f"{files.url}/a.txt") == b"one"
        assert files.asked["/a.txt"] == 1
        files.contents["/a.txt"] = b"two"
        assert read(limited(tmp_path, 1000), f"{files.url}/a.txt") == b"two"
        assert files.asked["/a.txt"] == 2


def test_what_was_not_used_for_longest_is_removed_and_an_open_file_is_read_to_its_end(tmp_path):
    cache = limited(tmp_path, 250)
    names = {name: put(name, name.encode() * 100) for name in "abcd"}
    opened = cache.open(names["a"])
    read(cache, names["b"])
    read(cache, names["a"])
    read(cache, names["c"])
    assert copies(tmp_path) == ["a", "c"], "b was used before a"
    read(cache, names["d"])
    assert copies(tmp_path) == ["c", "d"]
    assert opened.read() == b"a" * 100
    opened.close()


def test_a_pinned_file_stays_and_too_large_a_file_is_refused(tmp_path):
    cache = limited(tmp_path, 250)
    path = cache.pin(put("a", b"a" * 100))
    for name in "bcd":
        read(cache, put(name, b"x" * 100))
    assert pathlib.Path(path).read_bytes() == b"a" * 100
    assert cache.pin("memory://a") == path
    with pytest.raises(ValueError, match=r"No room for memory://e in the cache .*Raise it: data.FileCache"):
        cache.open(put("e", b"x" * 251))
    with pytest.raises(ValueError, match="No room for memory://f"):
        cache.open(put("f", b"x" * 200))


def test_compressed_files_are_copied_decompressed(tmp_path):
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"hello"))
    cache = limited(tmp_path / "cache", 10_000)
    assert read(cache, str(tmp_path / "a.txt.gz")) == b"hello"
    assert read(cache, put("b.txt.gz", gzip.compress(b"hello again"))) == b"hello again"
    assert copies(tmp_path / "cache") == ["a.txt", "b.txt"]
    (tmp_path / "cut.gz").write_bytes(gzip.compress(b"hello")[:-4])
    with pytest.raises(ValueError, match=r"cut.gz cannot be decompressed"):
        cache.open(str(tmp_path / "cut.gz"))
    assert list((tmp_path / "cache").glob(".*.part")) == []


def test_threads_and_caches_that_want_one_file_copy_it_once(tmp_path, monkeypatch):
    address, copied = put("a", b"a" * 100), []
    download = addresses.download
    monkeypatch.setattr(addresses, "download", lambda *args: (copied.append(args), download(*args)))
    found = []
    threads = [threading.Thread(target=lambda: found.append(read(limited(tmp_path, 1000), address))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [b"a" * 100] * 6
    assert len(copied) == 1


KILLED = """
import os, signal, sys
from jaxdist.data.remote import addresses, file_cache
def half(address, target):
    with open(target, "wb") as file:
        file.write(b"h" * 60)
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
addresses.download = half
addresses.file_facts = lambda address: addresses.FileFacts(100, "1")
file_cache.FileCache(sys.argv[1], limit_gb=1e-6).open("memory://killed")
"""


def test_a_process_killed_while_it_copies_leaves_no_half_file(tmp_path, monkeypatch):
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], env=os.environ | {"PYTHONPATH": os.getcwd()})
    assert done.returncode == -signal.SIGKILL
    assert len(list(tmp_path.glob(".*.part"))) == 1
    monkeypatch.setattr(addresses, "file_facts", lambda address: addresses.FileFacts(100, "1"))
    put("killed", b"w" * 100)
    assert read(limited(tmp_path, 150), "memory://killed") == b"w" * 100
    assert list(tmp_path.glob(".*.part")) == []


def test_a_text_about_a_file_is_made_once_while_the_file_is_the_same(tmp_path):
    address, made = put("a", b"one"), []

    def make():
        made.append(1)
        return f"text {len(made)}"

    assert [limited(tmp_path, 1000).kept_text(address, ".index", make) for _ in range(3)] == ["text 1"] * 3
    put("a", b"another")
    assert limited(tmp_path, 1000).kept_text(address, ".index", make) == "text 2"


def test_settings(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXDIST_CACHE", str(tmp_path / "chosen"))
    monkeypatch.setenv("JAXDIST_CACHE_GB", "3")
    made = file_cache.FileCache()
    assert (made.folder, made.limit) == (tmp_path / "chosen", 3 * 10**9)
    monkeypatch.setenv("JAXDIST_CACHE_GB", "much")
    with pytest.raises(ValueError, match="JAXDIST_CACHE_GB is a number of GB; got 'much'"):
        file_cache.FileCache()
    with pytest.raises(ValueError, match="a positive number of GB; got -1"):
        file_cache.FileCache(limit_gb=-1)
