import subprocess
import types

import pytest

from jaxdist.rundir import origin


def git(folder, *arguments):
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    return subprocess.run(
        ["git", "-C", folder, *identity, *arguments], check=True, capture_output=True, text=True
    ).stdout


@pytest.fixture
def repository(tmp_path):
    git(tmp_path, "init", "-q")
    (tmp_path / "inside").mkdir()
    (tmp_path / "inside" / "x.py").write_text("1\n")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "first")
    return tmp_path


def test_a_repository_says_its_commit_and_whether_a_file_was_changed(repository):
    commit = git(repository, "rev-parse", "HEAD").strip()
    assert origin.git(repository / "inside") == {"commit": commit, "dirty": False}
    (repository / "untracked.py").write_text("2\n")
    assert origin.git(repository) == {"commit": commit, "dirty": False}
    (repository / "inside" / "x.py").write_text("3\n")
    assert origin.git(repository / "inside") == {"commit": commit, "dirty": True}


def test_elsewhere_there_is_no_commit(tmp_path, monkeypatch):
    assert origin.git(tmp_path) is None
    assert origin.git(tmp_path / "missing") is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert origin.git(tmp_path) is None


def test_the_peak_is_told_by_the_devices_that_know_it():
    knows = types.SimpleNamespace(id=3, memory_stats=lambda: {"peak_bytes_in_use": 7})
    silent = types.SimpleNamespace(id=4, memory_stats=lambda: None)
    assert origin.peak_memory_bytes([knows, silent]) == {"3": 7}
    assert origin.peak_memory_bytes([silent]) is None
