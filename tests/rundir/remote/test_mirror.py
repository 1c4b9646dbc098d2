import json
import pathlib
import shutil
import tempfile
import threading
import uuid

import faulty_files
import pytest
from faulty_files import FaultyFiles, Killed
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxdist.rundir.remote import fetching, job_object, mirror, run_store, uploads
from jaxdist.rundir.remote.run_address import Address


@pytest.fixture(autouse=True)
def empty_memory():
    yield
    MemoryFileSystem.store.clear()


MEMORY = pathlib.Path("/dev/shm")
"""Its folders are made and removed quickly."""


def open_memory():
    return run_store.open_store(Address(f"memory://{uuid.uuid4().hex}/run"))


def content(step):
    return {"state/a": f"params {step} " * 9, "state/b": "", "manifest/process-0.json": f"hashes {step}"}


def save(run_dir, step, *, keep_last=2, keep_every=None, best=None):
    """Save a checkpoint and remove old ones, as a run does."""
    for name, text in content(step).items():
        path = run_dir / "checkpoints" / str(step) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    steps = sorted(int(path.name) for path in (run_dir / "checkpoints").iterdir())
    for old in steps[:-keep_last]:
        if old != best and not (keep_every and old % keep_every == 0):
            shutil.rmtree(run_dir / "checkpoints" / str(old))
    kept = {"keep_last": keep_last, "keep_every": keep_every}
    shown = {"step": step, "config": {"checkpoints": kept}, "best": best and {"step": best}}
    (run_dir / "run.json").write_text(json.dumps(shown))


def newest_readable(store):
    """Return the newest step that a reader gets whole, None if there is none."""
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        found = fetching.fetch_checkpoints(store, pathlib.Path(folder), fetching.newest_and_best)
        if not found:
            return None
        step = max(map(int, found))
        assert {
            name: (pathlib.Path(folder) / "checkpoints" / str(step) / name).read_text() for name in content(step)
        } == (content(step))
        return step


def test_what_a_run_writes_is_uploaded_and_what_it_removes_is_removed(tmp_path):
    store = open_memory()
    made = mirror.Mirror(tmp_path, store)
    made.once()
    assert store.sizes() == {}  # there is no run yet
    for step in (4, 8, 12):
        save(tmp_path, step)
        (tmp_path / "metrics.jsonl").write_text("row\n" * step)
        (tmp_path / "lock").touch()
        (tmp_path / "board").mkdir(exist_ok=True)
        (tmp_path / "board" / "x").touch()
        made.once()
    here = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    indexes = {uploads.object_name(name) for name in ("8", "12")}
    assert set(store.sizes()) == (here - {"lock", "board/x"}) | indexes
    assert store.read("metrics.jsonl") == (tmp_path / "metrics.jsonl").read_bytes()
    (tmp_path / "metrics.jsonl").unlink()
    made.once()
    assert "metrics.jsonl" not in store.sizes()


def test_files_that_did_not_change_are_not_uploaded_again(tmp_path):
    store = open_memory()
    save(tmp_path, 4)
    made = mirror.Mirror(tmp_path, store, known=mirror.signatures(tmp_path))
    made.once()
    assert "run.json" not in store.sizes()


def test_older_checkpoints_of_earlier_jobs_go_by_the_rules_of_the_run(tmp_path):
    store = open_memory()
    earlier, now = tmp_path / "earlier", tmp_path / "now"
    for step in (10, 15, 20, 25):
        save(earlier, step, keep_last=9)
    mirror.Mirror(earlier, store).once()
    save(now, 30, keep_every=10, best=15)
    mirror.Mirror(now, store).once()
    # The newest two, the best, and multiples of ten.
    assert mirror.uploaded_names(store) == {"10", "15", "20", "25", "30"}
    save(now, 35, keep_every=10, best=15)
    mirror.Mirror(now, store).once()
    assert mirror.uploaded_names(store) == {"10", "15", "20", "30", "35"}


def test_what_an_interrupted_upload_left_is_removed(tmp_path):
    store = open_memory()
    store.write("checkpoints/6/state/a", b"torn")
    save(tmp_path, 8)
    mirror.Mirror(tmp_path, store).once()
    assert not store.sizes("checkpoints/6")


def test_a_run_is_replaced_once_the_new_one_has_a_checkpoint(tmp_path):
    store = open_memory()
    save(tmp_path / "old", 40)
    (tmp_path / "old" / "nonfinite.txt").touch()
    mirror.Mirror(tmp_path / "old", store).once()
    made = mirror.Mirror(tmp_path / "new", store, replaces=True)
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "run.json").write_text("{}")
    made.once()
    assert newest_readable(store) == 40
    save(tmp_path / "new", 4)
    made.once()
    assert newest_readable(store) == 4
    assert "nonfinite.txt" not in store.sizes()


def test_nothing_is_uploaded_after_another_job_took_over(tmp_path):
    store = open_memory()
    held = job_object.take(store, "ours", waits=False, say=print)
    made = mirror.Mirror(tmp_path, store, lock=held)
    store.write(job_object.NAME, job_object.JobOwner.this("theirs").to_bytes())
    save(tmp_path, 4)
    assert not made.finish(patience_seconds=30)
    assert isinstance(made.error, mirror.LostError)
    assert set(store.sizes()) == {job_object.NAME}
    held.release()


@settings(max_examples=20)
@given(plan=st.dictionaries(st.integers(0, 60), st.sampled_from(faulty_files.FAULTS), max_size=12), kills=st.booleans())
def test_a_reader_finds_a_whole_checkpoint_whenever_the_storage_fails_or_the_process_is_killed(plan, kills):
    MemoryFileSystem.store.clear()
    store = open_memory()
    reader = run_store.RunStore(store.address, store._files, store._root)
    store._files = FaultyFiles(store._files, plan, Killed if kills else TimeoutError)
    safe = 0
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        run_dir = pathlib.Path(folder)
        made = mirror.Mirror(run_dir, store)
        for step in (4, 8, 12, 16):
            save(run_dir, step)
            try:
                made.once()
                safe = step
            except run_store.StoreError:
                pass
            except Killed:
                made = mirror.Mirror(run_dir, store)  # the next process on the same machine
            assert (newest_readable(reader) or 0) >= safe
        store._files.plan.clear()
        made.once()
        assert newest_readable(reader) == 16
        assert mirror.uploaded_names(reader) == {"12", "16"}
        assert set(reader.sizes("checkpoints")) == {
            f"checkpoints/{step}/{name}" for step in (12, 16) for name in content(step)
        }


def test_a_storage_that_hangs_or_fails_is_said_once_and_given_up_in_time(tmp_path, capsys):
    store = open_memory()
    store._files = FaultyFiles(store._files, dict.fromkeys(range(1000), faulty_files.BEFORE))
    save(tmp_path, 4)
    made, said = mirror.Mirror(tmp_path, store), []

    def has_failed():
        said.append(capsys.readouterr().err)
        return "The run continues" in "".join(said)

    assert not made.finish(patience_seconds=200, stopped=has_failed)
    assert not made.finish(patience_seconds=0.1)
    assert "".join([*said, capsys.readouterr().err]).count("The run continues") == 1
    store._files.plan.clear()
    assert made.finish(patience_seconds=200)
    assert "can be written again" in capsys.readouterr().err
    hangs, go_on = mirror.Mirror(tmp_path, store), threading.Event()
    hangs.once = lambda **_: go_on.wait()
    assert not hangs.finish(patience_seconds=0.1)
    assert not hangs.finish(patience_seconds=200, stopped=lambda: True)
    go_on.set()


def test_a_thread_uploads_while_the_run_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(mirror, "_LOOK_SECONDS", 0.01)
    store, whole = open_memory(), threading.Event()
    write = store.write

    def watched(name, data):
        write(name, data)
        if name == "run.json":
            whole.set()

    store.write = watched
    made = mirror.Mirror(tmp_path, store)
    made.start()
    save(tmp_path, 4)
    assert whole.wait(200)
    assert newest_readable(store) == 4
    assert made.finish(patience_seconds=200)


def test_a_record_that_cannot_be_read_removes_nothing(tmp_path):
    (tmp_path / "run.json").write_text("{")
    assert mirror.kept_by_record(tmp_path) == ({"keep_last": 1, "keep_every": 1}, None)


@pytest.mark.parametrize("name", ["run.json.77.tmp", ".writable-7", "lock", "checkpoints/4/x", "replaced/run.json"])
def test_what_concerns_this_machine_alone_is_not_uploaded(tmp_path, name):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).touch()
    assert mirror.signatures(tmp_path) == {}
