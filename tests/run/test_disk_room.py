import errno
import itertools
import shutil
import types

import jax
import jax.numpy as jnp
import pytest

from jaxdist.checkpoint import checkpoints
from jaxdist.run import disk_room


def no_space():
    error = checkpoints.CheckpointError("x")
    error.__cause__ = OSError(errno.EDQUOT, "Disk quota exceeded")
    return error


STATE = {"params": jnp.zeros((1024, 1024)), "key": jax.random.key(0)}


def set_free(monkeypatch, num_bytes, total=1 << 40):
    usage = types.SimpleNamespace(free=num_bytes, total=total)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)


def test_saves_are_left_out_while_the_disk_is_full_and_it_is_said_once(tmp_path, monkeypatch, capsys):
    saved = []
    hook = disk_room.unless_full(
        lambda info: saved.append(info.step), tmp_path, agreed=lambda number: number, clock=itertools.count().__next__
    )
    for step, free in enumerate([6 << 20, 4 << 20, 4 << 20, 6 << 20, 4 << 20], start=1):
        set_free(monkeypatch, free)
        hook(types.SimpleNamespace(step=step, state=STATE))
    assert saved == [1, 4]
    assert capsys.readouterr().err.count("has no room for a checkpoint") == 2, "once a time that it is full"


def test_the_disk_is_looked_at_once_a_second_however_short_the_steps(tmp_path, monkeypatch):
    looked, times = [], iter([0.0, 0.2, 0.9, 1.1, 1.5, 2.2])
    monkeypatch.setattr(disk_room, "has_room", lambda state, directory: looked.append(directory) or True)
    hook = disk_room.unless_full(lambda info: None, tmp_path, agreed=lambda number: number, clock=times.__next__)
    for step in range(6):
        hook(types.SimpleNamespace(step=step, state=STATE))
    assert len(looked) == 3


def test_process_0_decides(tmp_path, monkeypatch):
    """A process that sees room must not save where the others do not."""
    saved = []
    hook = disk_room.unless_full(lambda info: saved.append(info.step), tmp_path, agreed=lambda number: 0.0)
    set_free(monkeypatch, 1 << 40)
    hook(types.SimpleNamespace(step=1, state=STATE))
    assert saved == []


def test_a_disk_of_unknown_size_or_that_is_gone_is_left_to_the_save(tmp_path, monkeypatch):
    assert disk_room.has_room(STATE, tmp_path / "missing")
    set_free(monkeypatch, 0, total=0)
    assert disk_room.has_room(STATE, tmp_path)


@pytest.mark.parametrize("error", [checkpoints.NoRoomError("no room"), no_space()], ids=["foreseen", "quota"])
def test_a_save_that_fails_for_a_full_disk_is_left_out_and_other_failures_are_raised(tmp_path, capsys, error):
    """A quota shows only in the save itself."""
    errors, saved = iter([error, None, checkpoints.CheckpointError("of another run")]), []

    def save(info):
        if found := next(errors):
            raise found
        saved.append(info.step)

    hook = disk_room.unless_full(save, tmp_path, agreed=lambda number: number, clock=itertools.count().__next__)
    hook(types.SimpleNamespace(step=1, state=STATE))
    hook(types.SimpleNamespace(step=2, state=STATE))
    assert saved == [2]
    assert capsys.readouterr().err.count("has no room for a checkpoint") == 1
    with pytest.raises(checkpoints.CheckpointError, match="of another run"):
        hook(types.SimpleNamespace(step=3, state=STATE))
