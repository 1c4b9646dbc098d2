import uuid

import pytest

from jaxdist.errors import UserError
from jaxdist.rundir.remote import run_store
from jaxdist.rundir.remote.run_address import Address


@pytest.fixture(params=["memory", "file"])
def store(request, tmp_path):
    place = f"/{uuid.uuid4().hex}" if request.param == "memory" else str(tmp_path / "remote")
    return run_store.open_store(Address(f"{request.param}://{place}/run"))


def test_objects_are_written_read_listed_and_removed(store, tmp_path):
    assert (store.read("run.json"), store.sizes(), store.folders()) == (None, {}, [])
    store.write("run.json", b"1")
    store.write("run.json", b"22")
    (tmp_path / "a").write_bytes(b"333")
    store.upload({"checkpoints/4/state/a": tmp_path / "a", "checkpoints/4/b": tmp_path / "a"})
    assert store.read("run.json") == b"22"
    assert store.sizes() == {"run.json": 2, "checkpoints/4/state/a": 3, "checkpoints/4/b": 3}
    assert store.sizes("checkpoints/4/state") == {"checkpoints/4/state/a": 3}
    assert store.folders() == ["checkpoints"]
    store.download("checkpoints/4/state/a", tmp_path / "new" / "a")
    assert (tmp_path / "new" / "a").read_bytes() == b"333"
    store.remove("run.json")
    store.remove("run.json")
    assert store.read("run.json") is None


def test_an_object_is_created_once(store):
    assert [store.create("lock.json", content) for content in (b"a", b"b")] == [True, False]
    assert store.read("lock.json") == b"a"


def test_whatever_the_storage_raises_names_what_was_done(store, monkeypatch):
    class StrangeError(Exception):
        pass

    def fail(*_, **__):
        raise StrangeError("quota")

    monkeypatch.setattr(store._files, "pipe_file", fail)
    with pytest.raises(run_store.StoreError, match=r"could not write run\.json: quota"):
        store.write("run.json", b"")
    with pytest.raises(UserError, match="must be writable"):
        store.check_writable("probe")


def test_a_protocol_that_no_package_opens_names_the_package(monkeypatch):
    import fsspec

    def missing(*_, **__):
        raise ImportError("Please install gcsfs")

    with pytest.raises(UserError, match="s4"):
        run_store.open_store(Address("s4://bucket/run"))
    monkeypatch.setattr(fsspec, "url_to_fs", missing)
    with pytest.raises(UserError, match="pip install gcsfs"):
        run_store.open_store(Address("gs://bucket/run"))
