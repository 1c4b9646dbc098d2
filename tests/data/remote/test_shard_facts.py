import contextlib
import io
import pathlib
import types

import file_server
import pytest
import tar_files

from jaxdist import data
from jaxdist.data import fingerprints
from jaxdist.data.remote import addresses, shard_facts

SHARDS = [tar_files.shard(range(5 * number, 5 * number + 5), ("cls", "txt")) for number in range(3)]


def changed(content):
    """Return a shard in which one text differs, of the same size."""
    return content.replace(b"sample 7", b"Sample 7")


@pytest.fixture(params=["here", "there"])
def place(request, tmp_path, monkeypatch):
    """Yield where the shards are, and what writes one."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("JAXDIST_CACHE", str(tmp_path / "cache"))
    if request.param == "here":
        yield str(tmp_path), lambda number, content: (tmp_path / f"{number}.tar").write_bytes(content)
        return
    with file_server.serving() as files:
        yield files.url, lambda number, content: files.contents.update({f"/{number}.tar": content})


@pytest.mark.parametrize("kind", ["index", "stream"])
def test_a_change_that_keeps_the_size_is_noticed_wherever_the_shards_are(place, kind):
    url, write = place
    for number, content in enumerate(SHARDS):
        write(number, content)

    def source():
        if kind == "index":
            return data.TarSource(f"{url}/{{0..2}}.tar", sizes=[5] * 3)
        return data.tar_stream(f"{url}/{{0..2}}.tar", sizes=[5] * 3)

    before, strict = source().fingerprint(), fingerprints.strict_fingerprint(source())
    assert source().fingerprint() == before
    assert fingerprints.strict_fingerprint(source()) == strict != before
    write(1, changed(SHARDS[1]))
    assert source().fingerprint() != before
    assert fingerprints.strict_fingerprint(source()) != strict


def test_a_server_that_says_no_version_is_named_and_strict_reads_contents(monkeypatch, caplog):
    facts = {f"https://host/{number}.tar": addresses.FileFacts(10, "") for number in range(3)}
    contents = dict.fromkeys(facts, b"0123456789")
    monkeypatch.setattr(addresses, "file_facts", facts.__getitem__)
    opened = types.SimpleNamespace(read=None)

    def open_one(name):
        opened.read = name
        return contextlib.closing(io.BytesIO(contents[name]))

    monkeypatch.setattr(addresses, "opened", open_one)
    shards = list(facts)
    plain, strict = shard_facts.fingerprint_shards("tar", shards), shard_facts.whole_fingerprint(shards)
    assert "https://host/0.tar says of its files neither a version nor a time" in caplog.text
    contents[shards[2]] = b"987654321 "
    assert shard_facts.fingerprint_shards("tar", shards) == plain
    assert shard_facts.whole_fingerprint(shards) != strict
    assert opened.read == shards[2]


def test_files_of_one_place_are_told_from_those_of_both():
    assert list(shard_facts.local_files(["a.tar", "b.tar"])) == ["a.tar", "b.tar"]
    assert shard_facts.local_files(["a.tar", "s3://bucket/b.tar"]) is None
    assert pathlib.Path(shard_facts.local_files(["a.tar"]).place).name == "a.tar"
