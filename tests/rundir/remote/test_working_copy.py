import json
import os
import shutil
import uuid

import faulty_files
import pytest

from jaxdist.errors import UserError
from jaxdist.rundir.lock import LockedError
from jaxdist.rundir.remote import mirror, run_store, working_copy
from jaxdist.rundir.remote.run_address import Address
from jaxdist.rundir.remote.working_copy import HowToBegin


@pytest.fixture(autouse=True)
def copies(tmp_path, monkeypatch):
    monkeypatch.setenv(working_copy.FOLDER_VARIABLE, str(tmp_path / "copies"))
    monkeypatch.setenv(working_copy.PATIENCE_VARIABLE, "60")
    return tmp_path / "copies"


@pytest.fixture
def address():
    return Address(f"memory://{uuid.uuid4().hex}/run")


def save(run_dir, step):
    path = run_dir / "checkpoints" / str(step) / "state"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.parent.joinpath("state").write_text(f"params {step}")
    (run_dir / "run.json").write_text(json.dumps({"step": step}))


def train(address, *steps, **how):
    """Train some steps, each saved; return what was there at the start."""
    with working_copy.opened(address, HowToBegin(**how), purpose="test") as run_dir:
        there = sorted(path.name for path in run_dir.glob("checkpoints/*"))
        for step in steps:
            save(run_dir, step)
    return there


def uploaded(address):
    return mirror.uploaded_names(run_store.open_store(address))


def refuse_uploads(monkeypatch):
    monkeypatch.setattr(run_store.RunStore, "upload", fail)
    monkeypatch.setenv(working_copy.PATIENCE_VARIABLE, "0.3")


def fail(*_):
    raise run_store.StoreError("no network")


def test_a_run_is_uploaded_whole_and_its_copy_removed(address, copies):
    assert train(address, 4, 8) == []
    assert uploaded(address) == {"4", "8"}
    assert list(copies.iterdir()) == []


def test_a_run_continues_from_the_newest_checkpoint_on_a_machine_that_has_nothing(address):
    train(address, 4)
    assert train(address, 8, resume=True) == ["4"]
    assert train(address, restartable=True) == ["8"]
    assert {"4", "8"} <= uploaded(address)


def test_a_run_that_is_there_is_refused_continued_or_replaced(address, copies):
    train(address, 40)
    with pytest.raises(UserError, match=r"already holds a run.*--resume.*--overwrite"):
        train(address, 4)
    assert uploaded(address) == {"40"}
    assert train(address, 4, overwrite=True) == []
    assert uploaded(address) == {"4"}
    with pytest.raises(UserError, match="holds none"):
        train(Address("memory://nothing/there"), resume=True)
    assert list(copies.iterdir()) == []


def test_what_could_not_be_uploaded_stays_and_is_continued_on_this_machine(address, copies, monkeypatch, capsys):
    train(address, 4)
    with monkeypatch.context() as patch:
        refuse_uploads(patch)
        with pytest.raises(working_copy.NotUploadedError, match=str(copies)):
            train(address, 8, resume=True)
    assert uploaded(address) == {"4"}
    assert "no network" in capsys.readouterr().err
    assert train(address, resume=True) == ["4", "8"]
    assert uploaded(address) == {"4", "8"}
    assert list(copies.iterdir()) == []


def test_a_run_that_was_never_uploaded_is_not_overwritten_by_chance(address, copies, monkeypatch):
    with monkeypatch.context() as patch:
        refuse_uploads(patch)
        with pytest.raises(working_copy.NotUploadedError):
            train(address, 8)
    with pytest.raises(UserError, match=f"never uploaded is in {copies}"):
        train(address, 4)
    assert train(address, resume=True) == ["8"]


def test_what_another_machine_continued_makes_the_copy_here_obsolete(address, copies, monkeypatch):
    train(address, 4)
    with monkeypatch.context() as patch:
        refuse_uploads(patch)
        with pytest.raises(working_copy.NotUploadedError):
            train(address, 8, resume=True)
    monkeypatch.setenv(working_copy.FOLDER_VARIABLE, str(copies.parent / "another machine"))
    assert train(address, 12, resume=True) == ["4"]
    monkeypatch.setenv(working_copy.FOLDER_VARIABLE, str(copies))
    assert train(address, 16, resume=True) == ["12"]
    kept = list(copies.glob("*/run-obsolete-1/checkpoints/8"))
    assert len(kept) == 1


def test_a_job_that_is_killed_leaves_what_the_next_one_on_this_machine_continues(address, monkeypatch):
    train(address, 4)
    with monkeypatch.context() as patch:
        patch.setattr(mirror.Mirror, "start", lambda self: None)
        patch.setattr(mirror.Mirror, "finish", killed)
        with pytest.raises(faulty_files.Killed):
            train(address, 8, resume=True)
    assert train(address, resume=True) == ["4", "8"]


def killed(*_, **__):
    raise faulty_files.Killed


def test_a_download_that_breaks_leaves_no_half_of_a_run(address, copies, monkeypatch):
    train(address, 4)
    with monkeypatch.context() as patch:
        patch.setattr(run_store.RunStore, "download", fail)
        with pytest.raises(UserError, match="cannot be read"):
            train(address, 8, resume=True)
    assert list(copies.iterdir()) == []
    assert train(address, resume=True) == ["4"]


def test_an_error_of_the_run_is_shown_and_what_was_trained_is_uploaded(address):
    def fail_after_a_step():
        with working_copy.opened(address, HowToBegin(), purpose="test") as run_dir:
            save(run_dir, 4)
            raise UserError(f"{run_dir} is wrong")

    with pytest.raises(UserError, match=f"{address} is wrong"):
        fail_after_a_step()
    assert uploaded(address) == {"4"}


def test_a_replacement_without_a_checkpoint_replaces_nothing(address, capsys):
    train(address, 40)
    with working_copy.opened(address, HowToBegin(overwrite=True), purpose="test") as run_dir:
        run_dir.mkdir()
        (run_dir / "run.json").write_text("{}")
    assert uploaded(address) == {"40"}
    assert f"is in {run_dir}" in capsys.readouterr().err
    shutil.rmtree(run_dir.parent)


def test_one_job_at_a_time_works_in_an_address(address):
    with working_copy.opened(address, HowToBegin(), purpose="first"), pytest.raises(LockedError, match=str(address)):
        train(address)


def test_a_place_that_cannot_be_written_is_refused_before_anything_is_trained(address, copies, monkeypatch):
    monkeypatch.setattr(run_store.RunStore, "write", fail)
    with pytest.raises(UserError, match="must be writable"):
        train(address)
    assert list(copies.iterdir()) == []


def test_going_back_fetches_what_is_set_aside(address):
    train(address, 4)
    train(address, 8, 12, resume=True)
    assert train(address, resume=True, checkpoint=4) == ["12", "4", "8"]


def test_the_user_is_shown_the_address_of_a_copy(address, tmp_path):
    with working_copy.opened(address, HowToBegin(), purpose="test") as run_dir:
        assert working_copy.shown(run_dir) == str(address)
        assert working_copy.shown(tmp_path) == str(tmp_path)
    assert working_copy.ADDRESS_VARIABLE not in os.environ
    assert working_copy.shown(run_dir) == str(run_dir)
