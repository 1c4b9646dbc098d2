import json
import uuid

import pytest

from jaxdist.errors import UserError
from jaxdist.rundir import lock
from jaxdist.rundir.remote import fetching, job_object, run_store, uploads
from jaxdist.rundir.remote.run_address import Address


@pytest.fixture
def store():
    return run_store.open_store(Address(f"memory://{uuid.uuid4().hex}/runs/first"))


def fill(store, tmp_path, *steps, best=None):
    for step in steps:
        path = tmp_path / "source" / str(step) / "state" / "a"
        path.parent.mkdir(parents=True)
        path.write_text(f"params {step}")
        made = uploads.UploadedCheckpoint.of(path.parents[1])
        store.upload({f"{made.folder}/state/a": path})
        store.write(uploads.object_name(made.name), made.to_bytes())
    store.write("run.json", json.dumps({"step": 1, "best": best and {"step": best}}).encode())
    store.write("logs/x", b"log")
    store.write("profile/big", b"trace")


def names(run_dir):
    return {path.name for path in (run_dir / "checkpoints").iterdir()}


def test_a_run_is_fetched_with_its_newest_and_its_best_checkpoint(store, tmp_path):
    fill(store, tmp_path, 10, 20, 30, best=10)
    with fetching.fetched(str(store.address), fetching.newest_and_best) as run_dir:
        assert run_dir.name == "first"
        assert names(run_dir) == {"10", "30"}
        assert (run_dir / "checkpoints" / "30" / "state" / "a").read_text() == "params 30"
        assert (run_dir / "logs" / "x").read_text() == "log"
        assert not (run_dir / "profile").exists()
    assert not run_dir.exists()


@pytest.mark.parametrize(
    ("choose", "found"),
    [
        (fetching.one("last"), {"30"}),
        (fetching.one("best"), {"10"}),
        (fetching.one(20), {"20"}),
        (fetching.since(20), {"10", "20", "30"}),
        (fetching.since(30), {"10", "30"}),
        (fetching.newest_before(30), {"20"}),
        (fetching.newest_before(31), {"30"}),
    ],
)
def test_those_that_are_asked_for_are_fetched(store, tmp_path, choose, found):
    fill(store, tmp_path, 10, 20, 30, best=10)
    with fetching.fetched(store.address, choose) as run_dir:
        assert names(run_dir) == found


def test_a_step_that_is_not_there_is_refused_with_those_that_are(store, tmp_path):
    fill(store, tmp_path, 10, 20)
    with pytest.raises(UserError, match="steps 10, 20"), fetching.fetched(store.address, fetching.one(15)):
        pass


@pytest.mark.parametrize("damage", ["changed", "missing", "index"])
def test_a_damaged_checkpoint_is_refused_and_never_half_there(store, tmp_path, damage):
    fill(store, tmp_path, 10, 20)
    if damage == "changed":
        store.write("checkpoints/20/state/a", b"PARAMS 20")
    elif damage == "missing":
        store.remove("checkpoints/20/state/a")
    else:
        store.write("uploaded/20.json", b"{}")
    with pytest.raises(UserError, match=r"step 20.*damaged.*steps 10"):
        fetching.fetch_checkpoints(store, tmp_path / "run", fetching.newest_and_best)
    assert not (tmp_path / "run" / "checkpoints" / "20").exists()


def test_what_was_not_uploaded_whole_does_not_exist(store, tmp_path):
    fill(store, tmp_path, 10)
    store.write("checkpoints/20/state/a", b"half")
    with fetching.fetched(store.address, fetching.newest_and_best) as run_dir:
        assert names(run_dir) == {"10"}


def test_mistakes_name_the_address(store, tmp_path):
    with pytest.raises(UserError, match=str(store.address)), fetching.fetched(store.address):
        pass
    fill(store, tmp_path, 10)
    with pytest.raises(UserError, match=f"{store.address} is bad"), fetching.fetched(store.address) as run_dir:
        raise UserError(f"{run_dir} is bad")


def test_a_local_run_directory_is_used_as_it_is(tmp_path):
    with fetching.all_fetched([tmp_path, str(tmp_path)]) as found:
        assert found == [tmp_path, tmp_path]
    with fetching.folder_fetched(tmp_path) as found:
        assert found == tmp_path


def test_a_folder_of_runs_is_fetched_by_its_records_and_shows_which_run(store, tmp_path):
    fill(store, tmp_path, 10)
    held = job_object.take(store, "test", waits=False, say=print)
    folder = Address(str(store.address).rpartition("/")[0])
    with fetching.folder_fetched(folder) as found:
        assert [path.name for path in found.iterdir()] == ["first"]
        assert json.loads((found / "first" / "run.json").read_text())["step"] == 1
        assert lock.is_locked(found / "first")
    held.release()
    with fetching.folder_fetched(folder) as found:
        assert not lock.is_locked(found / "first")
