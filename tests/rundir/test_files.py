"""Files that are replaced as a whole: readers see the old content or the new, whatever happens in between."""

import os
import pathlib
import zlib

import pytest

from jaxdist.errors import UserError
from jaxdist.rundir import files


def test_a_file_is_replaced_by_its_parts_and_their_checksum_returned(tmp_path):
    path = tmp_path / "state"
    path.write_bytes(b"old and longer than the new content")
    assert files.write(path, [b"new ", memoryview(b"content")]) == zlib.crc32(b"new content")
    assert path.read_bytes() == b"new content"
    files.write_text(path, "naïve")
    assert path.read_bytes() == "naïve".encode()
    assert list(tmp_path.iterdir()) == [path]


def failing_parts():
    yield b"half of the new"
    raise OSError(28, "No space left on device")


def test_a_write_that_fails_keeps_the_old_content_leaves_no_draft_and_names_the_file(tmp_path):
    path = tmp_path / "state"
    files.write(path, [b"old"])
    with pytest.raises(OSError, match=r"No space left on device: '.*state'$"):
        files.write(path, failing_parts())
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_cannot_be_made_is_named_as_the_user_named_it(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "folder" / "inside").mkdir(parents=True)
    for name in ("missing/state", "file/state", "folder", "n" * 300):
        with pytest.raises(OSError) as raised:
            files.write(tmp_path / name, [b"new"])
        assert raised.value.filename == str(tmp_path / name)
        assert ".tmp" not in str(raised.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def test_an_error_about_another_file_keeps_its_name(tmp_path):
    with pytest.raises(FileNotFoundError, match="another"), files.drafted(tmp_path / "state", tmp_path / "draft"):
        (tmp_path / "another").read_bytes()


@pytest.mark.parametrize("room", [0, 1, 6])
def test_what_is_appended_is_whole_or_not_there(tmp_path, monkeypatch, room):
    path, write, left = tmp_path / "log", os.write, [room]
    path.write_bytes(b"before;")

    def filling(descriptor, data):
        part = bytes(data[: left[0]])
        if not part:
            raise OSError(28, "No space left on device")
        left[0] -= len(part)
        return write(descriptor, part)

    with open(path, "ab", buffering=0) as file:
        monkeypatch.setattr(os, "write", filling)
        with pytest.raises(OSError, match="No space left"):
            files.append(file.fileno(), b"a record;")
        assert path.read_bytes() == b"before;"
        left[0] = 100
        files.append(file.fileno(), b"a record;")
    assert path.read_bytes() == b"before;a record;"


def test_the_content_is_durable_before_its_name_and_the_name_before_the_return(tmp_path, monkeypatch):
    events = []
    fsync, replace = os.fsync, os.replace

    def noted_fsync(descriptor):
        events.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def noted_replace(source, target):
        events.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    files.write(tmp_path / "state", [b"new"])
    assert events == [f"state.{os.getpid()}.tmp", "rename", tmp_path.name]


def test_a_file_that_need_not_be_durable_is_replaced_without_waiting_for_the_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: pytest.fail("waited for the disk"))
    path = tmp_path / "report"
    path.write_bytes(b"old")
    files.write_unsynced(path, [b"n", memoryview(b"ew")])
    assert path.read_bytes() == b"new"
    assert [each.name for each in tmp_path.iterdir()] == ["report"]


def test_a_new_file_has_a_name_that_is_free_and_a_folder_that_can_be_made(tmp_path, monkeypatch):
    files.check_new(tmp_path / "a" / "b" / "new", "A table")
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to("nothing")
    for name in ("file", "dangling"):
        with pytest.raises(UserError, match=f"A table does not overwrite anything, and .*{name} exists"):
            files.check_new(tmp_path / name, "A table")
    monkeypatch.chdir(tmp_path)
    for path in (tmp_path / "file" / "a" / "new", tmp_path / "dangling" / "new", pathlib.Path("file/new")):
        with pytest.raises(UserError, match=r"new cannot be written: .*(file|dangling) is no folder"):
            files.check_new(path, "A table")
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write to folders of any mode
    with pytest.raises(UserError, match="is no folder that you may write to"):
        files.check_new(tmp_path / "new", "A table")
