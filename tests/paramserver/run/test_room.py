"""What the user of a parameter server is told about a full disk, and how a run ends that is asked to stop then."""

import pytest

from jaxdist.errors import RunFailedError
from jaxdist.paramserver.run import room
from jaxdist.rundir import full_disk


@pytest.fixture
def watch(tmp_path, monkeypatch):
    """Return a RoomWatch, its clock as a list of one time, and a function that fills the disk and makes room."""
    now, is_full = [0.0], [False]
    monkeypatch.setattr(full_disk, "has_no_room", lambda directory: is_full[0])
    return (
        room.RoomWatch(tmp_path, tmp_path / "ps", clock=lambda: now[0]),
        now,
        lambda full: is_full.__setitem__(0, full),
    )


def test_each_time_that_the_disk_is_full_is_told_once(watch, capsys):
    watcher, _, fill = watch
    for full in (False, True, True, False, True):
        fill(full)
        watcher.look(is_stopping=False)
    assert capsys.readouterr().err.count("The parameter server waits until there is room") == 2


def test_a_run_that_is_to_stop_waits_for_room_for_a_while(watch):
    watcher, now, fill = watch
    fill(True)
    watcher.look(is_stopping=False)
    now[0] = 1000.0
    watcher.look(is_stopping=True)
    now[0] += room.STOP_SECONDS - 0.1
    watcher.look(is_stopping=True)
    fill(False)
    watcher.look(is_stopping=True)
    fill(True)
    now[0] += 1.0
    watcher.look(is_stopping=True)
    now[0] += room.STOP_SECONDS
    with pytest.raises(RunFailedError, match="is full, so the newest state could not be saved"):
        watcher.look(is_stopping=True)


def test_checkpoints_that_do_not_fit_are_told_once_until_one_fits(watch, capsys):
    watcher, _, _ = watch
    for fitted in (True, False, False, True, False):
        watcher.note_save(fitted=fitted)
    assert capsys.readouterr().err.count("has no room for a checkpoint") == 2
