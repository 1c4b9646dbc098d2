"""What runs after a supervisor that was killed."""

import pathlib

import pytest
from left_in_memory import leave

from jaxdist.checkpoint import checkpoints
from jaxdist.run import killed_supervisor
from jaxdist.rundir import lock


@pytest.fixture
def left(tmp_path):
    return leave(tmp_path)


def test_the_program_saves_and_removes_the_memory_and_keeps_it_where_that_fails(left, capsys):
    rescued, memory = left
    pathlib.Path(rescued.checkpoints).write_text("no directory")
    killed_supervisor.main([rescued.to_text(), str(memory)])
    assert "was not saved" in capsys.readouterr().err
    assert memory.exists()
    pathlib.Path(rescued.checkpoints).unlink()
    killed_supervisor.main([rescued.to_text(), str(memory)])
    assert "Step 3 was saved from memory" in capsys.readouterr().err
    assert not memory.exists()
    with checkpoints.Checkpointer(rescued.checkpoints, identity="mine") as checkpointer:
        assert checkpointer.latest_step() == 3


def test_a_run_that_is_in_use_again_is_left_alone(left, capsys):
    rescued, memory = left
    with lock.locked(pathlib.Path(rescued.run_dir), purpose="a test"):
        killed_supervisor.main([rescued.to_text(), str(memory)])
    assert "was not saved" in capsys.readouterr().err
    assert memory.exists()
    assert not pathlib.Path(rescued.checkpoints).exists()
