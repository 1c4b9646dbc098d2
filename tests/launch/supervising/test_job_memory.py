"""Directories in memory: found by their own run alone, kept for it, and never taken from a running job."""

import os
import subprocess
import sys
import time

from jaxdist.launch.supervising import job_memory

KILLED_OWNER = """
import os, pathlib, signal, sys
from jaxdist.config.experiment import Recovery
from jaxdist.launch.supervising import job_memory, restart_events, restart_policy, supervisor
with job_memory.memory_directory(pathlib.Path(sys.argv[2]), root=pathlib.Path(sys.argv[1])):
    os.kill(os.getpid(), signal.SIGKILL)
"""


def leave_behind(root, run_dir):
    subprocess.run([sys.executable, "-c", KILLED_OWNER, str(root), str(run_dir)], timeout=200, check=False)


def test_memory_of_a_killed_job_is_found_by_its_run_alone_and_stays_for_it(tmp_path):
    root, run_dir, other = tmp_path / "root", tmp_path / "run", tmp_path / "other"
    for path in (root, run_dir, other):
        path.mkdir()
    leave_behind(root, run_dir)
    (left,) = root.iterdir()
    (root / "another").mkdir()
    assert list(job_memory.left_behind(other, root=root)) == []
    assert list(job_memory.left_behind(run_dir, root=root)) == [left]
    with job_memory.memory_directory(run_dir, root=root) as memory:
        assert memory.stat().st_mode & 0o777 == 0o700
        assert list(job_memory.left_behind(run_dir, root=root)) == [left], "its own is in use"
        assert memory.exists()
    run_dir.rmdir()
    assert list(job_memory.left_behind(other, root=root)) == []
    assert [path.name for path in root.iterdir()] == ["another"], "no run can use what is left"


def test_what_another_run_left_in_memory_is_kept_for_a_day_whatever_the_clock_says(tmp_path, monkeypatch):
    root, run_dir = tmp_path / "root", tmp_path / "run"
    root.mkdir()
    run_dir.mkdir()
    leave_behind(root, run_dir)
    (left,) = root.iterdir()
    os.utime(left, (0, 0))  # as if the wall clock had been set since
    since_boot = [time.clock_gettime(time.CLOCK_BOOTTIME)]
    monkeypatch.setattr(time, "clock_gettime", lambda clock: since_boot[0])
    for hours, kept in ((0, True), (23.9, True), (0.2, False)):
        since_boot[0] += hours * 3600.0
        assert list(job_memory.left_behind(tmp_path / "other", root=root)) == []
        assert left.exists() is kept


def test_jobs_that_start_at_the_same_moment_leave_each_other_alone(tmp_path, monkeypatch):
    """At each moment of one job's start, another one starts and cleans up."""
    run_dir, checked = tmp_path / "gone", []

    def intruding(name):
        original = getattr(os, name)

        def call(*args, **kwargs):
            result = original(*args, **kwargs)
            if not checked or checked[-1] != "in":
                checked.append("in")
                list(job_memory.left_behind(tmp_path / "other", root=tmp_path))
                checked.append(name)
            return result

        return call

    for name in ("open", "mkdir", "rename", "symlink", "pwrite", "ftruncate", "close"):
        monkeypatch.setattr(os, name, intruding(name))
    with job_memory.memory_directory(run_dir, root=tmp_path) as memory:
        list(job_memory.left_behind(tmp_path / "other", root=tmp_path))
        assert memory.exists()
    assert {"open", "mkdir", "rename"} <= set(checked)
