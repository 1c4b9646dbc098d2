import errno
import fcntl
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading

import pytest

from jaxdist import errors
from jaxdist.rundir import lock

OWNER = """
import pathlib, sys, time
from jaxdist.rundir import lock
with lock.locked(pathlib.Path(sys.argv[1]), purpose="a test"):
    print("taken", flush=True)
    time.sleep(600)
"""


def start_owner(directory):
    owner = subprocess.Popen([sys.executable, "-c", OWNER, str(directory)], stdout=subprocess.PIPE, text=True)
    assert owner.stdout.readline() == "taken\n"
    return owner


def test_the_second_job_is_refused_and_told_who_the_first_is(tmp_path):
    owner = start_owner(tmp_path)
    try:
        with (
            pytest.raises(lock.LockedError, match=rf"process {owner.pid} on .* \(a test\) does"),
            lock.locked(tmp_path, purpose="another"),
        ):
            pass
        assert lock.is_locked(tmp_path)
        assert json.loads((tmp_path / lock.FILE_NAME).read_text())["process"] == owner.pid
    finally:
        owner.kill()
        owner.wait()
        owner.stdout.close()


def test_a_dead_owner_holds_nothing(tmp_path):
    owner = start_owner(tmp_path)
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    owner.stdout.close()
    assert not lock.is_locked(tmp_path)
    with lock.locked(tmp_path, purpose="the heir"):
        assert lock.is_locked(tmp_path)
    assert not lock.is_locked(tmp_path)


def test_a_child_does_not_keep_the_lock_of_its_dead_parent(tmp_path):
    with lock.locked(tmp_path, purpose="the parent"):
        child = subprocess.Popen(["sleep", "600"], close_fds=False)
    try:
        assert not lock.is_locked(tmp_path)
    finally:
        child.kill()
        child.wait()


def test_a_directory_is_made_and_an_unlocked_one_is_said_to_be(tmp_path):
    assert not lock.is_locked(tmp_path / "new")
    with lock.locked(tmp_path / "new", purpose="first"):
        assert os.path.isdir(tmp_path / "new")


def test_an_owner_that_has_not_said_who_it_is_is_still_the_owner(tmp_path):
    with lock.locked(tmp_path, purpose="first"):
        (tmp_path / lock.FILE_NAME).write_text("")
        with pytest.raises(lock.LockedError, match="another process does"), lock.locked(tmp_path, purpose="second"):
            pass


def test_a_directory_that_cannot_be_made_is_the_users_to_mend(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(errors.UserError, match=r"must be writable; .*file/run is not"),
        lock.locked(tmp_path / "file" / "run", purpose="first"),
    ):
        pass


def test_a_lock_can_be_taken_by_its_owner_alone(tmp_path):
    """A process that can open the file can lock it and keep the job from starting; older files are corrected."""
    (tmp_path / lock.FILE_NAME).touch(mode=0o644)
    with lock.locked(tmp_path, purpose="test"):
        assert (tmp_path / lock.FILE_NAME).stat().st_mode & 0o777 == 0o600


def test_a_job_is_not_refused_because_another_process_looks_whether_it_runs(tmp_path):
    """`is_locked` takes the lock for a moment; here that moment lasts until the job has found it taken once."""
    with lock.locked(tmp_path, purpose="before"):
        pass
    look = os.open(tmp_path / lock.FILE_NAME, os.O_RDWR)
    fcntl.flock(look, fcntl.LOCK_EX)
    threading.Timer(0.02, os.close, [look]).start()
    with lock.locked(tmp_path, purpose="job"):
        assert lock.is_locked(tmp_path)


def test_whether_a_job_runs_is_seen_where_nothing_can_be_written(tmp_path, monkeypatch):
    opened = os.open

    def on_a_read_only_disk(path, flags, *rest, **named):
        if flags & (os.O_WRONLY | os.O_RDWR):
            raise OSError(errno.EROFS, "Read-only file system")
        return opened(path, flags, *rest, **named)

    with lock.locked(tmp_path, purpose="train"), monkeypatch.context() as patched:
        patched.setattr(os, "open", on_a_read_only_disk)
        assert lock.is_locked(tmp_path)
    monkeypatch.setattr(os, "open", on_a_read_only_disk)
    assert not lock.is_locked(tmp_path)


def test_a_directory_is_found_free_or_taken_without_a_trace(tmp_path):
    lock.check_free(tmp_path / "new")
    lock.check_free(tmp_path)
    assert list(tmp_path.iterdir()) == []
    with lock.locked(tmp_path, purpose="a test"), pytest.raises(lock.LockedError, match=r"\(a test\) does"):
        lock.check_free(tmp_path)
    lock.check_free(tmp_path)
    assert not lock.is_locked(tmp_path)


@pytest.mark.parametrize("with_folder", [False, True])
def test_a_lock_that_its_owner_removes_is_not_held_by_the_next_job_alone(tmp_path, monkeypatch, with_folder):
    """The next job had opened the file before it was removed: a third one would find no lock, or a new one."""
    directory, take = tmp_path / "run", lock._take

    def remove_first(*arguments):
        monkeypatch.setattr(lock, "_take", take)
        (directory / lock.FILE_NAME).unlink()
        if with_folder:
            directory.rmdir()
        take(*arguments)

    monkeypatch.setattr(lock, "_take", remove_first)
    with lock.locked(directory, purpose="the next"):
        assert json.loads((directory / lock.FILE_NAME).read_text())["purpose"] == "the next"
        assert lock.is_locked(directory)


def test_a_folder_that_goes_before_the_lock_is_opened_is_made_again(tmp_path, monkeypatch):
    opened = os.open

    def remove_first(*arguments):
        monkeypatch.setattr(os, "open", opened)
        (tmp_path / "run").rmdir()
        return opened(*arguments)

    monkeypatch.setattr(os, "open", remove_first)
    with lock.locked(tmp_path / "run", purpose="the next"):
        assert lock.is_locked(tmp_path / "run")


def test_a_directory_that_cannot_be_made_or_locked_is_refused_at_once(tmp_path):
    (tmp_path / lock.FILE_NAME).symlink_to(tmp_path / "missing" / "file")
    for directory in (pathlib.Path("/proc/missing"), tmp_path):
        with pytest.raises(errors.UserError, match="must be writable"), lock.locked(directory, purpose="a test"):
            pass
