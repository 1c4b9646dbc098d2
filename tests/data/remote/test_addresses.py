import importlib

import file_server
import fsspec
import pytest

from jaxdist import extras
from jaxdist.data.remote import addresses


@pytest.fixture
def no_pauses(monkeypatch):
    monkeypatch.setattr(addresses, "_PAUSES", (0.0, 0.0))


def test_what_is_an_address():
    assert addresses.is_address("gs://bucket/x")
    assert not addresses.is_address("/data/x")
    assert addresses.without_file_protocol("file:///data/a%20b") == "/data/a b"
    assert addresses.without_file_protocol("gs://bucket/x") == "gs://bucket/x"
    assert addresses.file_name("https://host/a/b.tar?token=1") == "b.tar"


def test_a_file_in_memory(tmp_path):
    fsspec.filesystem("memory").pipe("/one/a.txt", b"hello")
    facts = addresses.file_facts("memory://one/a.txt")
    assert facts.size == 5
    addresses.download("memory://one/a.txt", str(tmp_path / "a"))
    assert (tmp_path / "a").read_bytes() == b"hello"
    with addresses.opened("memory://one/a.txt") as file:
        assert file.read() == b"hello"
    fsspec.filesystem("memory").pipe("/one/a.txt", b"HELLO")
    assert addresses.file_facts("memory://one/a.txt") != facts
    fsspec.filesystem("memory").pipe("/one/b.txt", b"")
    listed = ["memory:///one/a.txt", "memory:///one/b.txt"]
    assert addresses.list_folder("memory://one/", "*.txt") == listed == addresses.list_folder("memory://one/*", "")
    assert addresses.list_folder("memory://one/a.txt", "*") == ["memory://one/a.txt"]
    with pytest.raises(ValueError, match=r"No file matches \*\.tar in memory://one/"):
        addresses.list_folder("memory://one/", "*.tar")
    with pytest.raises(ValueError, match="is a folder, and a file is needed"):
        addresses.file_facts("memory://one")


def test_what_is_wrong_is_one_message(tmp_path, no_pauses):
    with file_server.serving() as files:
        files.contents["/a"] = b"x" * 1000
        addresses.download(f"{files.url}/a", str(tmp_path / "a"))
        assert (tmp_path / "a").read_bytes() == b"x" * 1000
        with pytest.raises(ValueError, match=r"There is no file http://127.0.0.1:\d+/b\. Check the address"):
            addresses.file_facts(f"{files.url}/b")
        files.fail[:] = [503, 503]
        addresses.download(f"{files.url}/a", str(tmp_path / "a"))
        files.fail[:] = [503] * 3
        with pytest.raises(
            ValueError, match=r"cannot be read: ClientResponseError: 503.*Check the address, the network"
        ):
            addresses.download(f"{files.url}/a", str(tmp_path / "a"))
        files.cut = True
        with pytest.raises(ValueError, match="cannot be read: ClientPayloadError"):
            addresses.download(f"{files.url}/a", str(tmp_path / "a"))
    with pytest.raises(ValueError, match=r"/a cannot be read: ClientConnectorError|/a cannot be read: .*[Cc]onnect"):
        addresses.download(f"{files.url}/a", str(tmp_path / "a"))
    with pytest.raises(ValueError, match="No such file: /none"):
        addresses.file_facts("/none")


def test_a_server_that_sends_nothing_more_is_not_waited_for(tmp_path, no_pauses, monkeypatch):
    monkeypatch.setattr(addresses, "_SILENCE_SECONDS", 0.2)
    with file_server.serving() as files:
        files.contents["/a"], files.stalls = b"x" * 1000, True
        with pytest.raises(ValueError, match=r"/a cannot be read: nothing came for too long\. Check the address"):
            addresses.download(f"{files.url}/a", str(tmp_path / "a"))
        with (
            pytest.raises(ValueError, match=r"/a cannot be read: nothing came for too long"),
            addresses.opened(f"{files.url}/a") as file,
        ):
            file.read()
        assert files.asked["/a"] >= 4


def test_settings_of_fsspec_for_a_protocol_are_kept(monkeypatch):
    monkeypatch.setitem(fsspec.config.conf, "https", {"client_kwargs": {"trust_env": True}})
    limits = addresses._limits(fsspec, "https")["client_kwargs"]
    assert limits["trust_env"]
    assert (limits["timeout"].total, limits["timeout"].sock_read) == (None, 60.0)
    assert addresses._limits(fsspec, "s3") == {}


def test_an_unknown_protocol_and_a_missing_package(monkeypatch):
    with pytest.raises(ValueError, match="what://x cannot be read: Protocol not known: what"):
        addresses.file_facts("what://x")

    def without(name):
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(importlib, "import_module", without)
    with pytest.raises(extras.MissingExtra, match=r"fsspec is not installed.*pip install 'jaxdist\[remote\]'"):
        addresses.file_facts("gs://bucket/x")


def test_a_size_that_differs_is_noticed(tmp_path, monkeypatch):
    fsspec.filesystem("memory").pipe("/cut", b"hello")
    monkeypatch.setattr(addresses, "file_facts", lambda address: addresses.FileFacts(7, ""))
    with pytest.raises(ValueError, match="memory://cut was read as 5 bytes, and it has 7"):
        addresses.download("memory://cut", str(tmp_path / "a"))
